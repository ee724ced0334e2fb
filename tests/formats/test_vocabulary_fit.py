"""The vocabulary of another model is refused before weights are read."""

import dataclasses
import json
import pathlib

import json_tokenizers
import pytest

from gecko_jax.data import task_table
from gecko_jax.formats import (
    detection,
    from_hugging_face,
    vocabulary_fit,
)
from gecko_jax.text import vocabularies
from tests.formats import test_family_configs as configs

T5X = pathlib.Path(__file__).parents[1] / "testdata" / "t5x_tiny"
# <|endoftext|> of the small tokenizer, which ends texts.
QWEN_END = 600
QWEN_IDS = {"bos_token_id": QWEN_END, "eos_token_id": QWEN_END + 2}


def build(kind):
    if kind == "sentencepiece":
        return vocabularies.load(task_table.QUICKSTART_VOCABULARY)
    return vocabularies.build(json_tokenizers.to_bytes(json_tokenizers.closed(kind)))


def check(vocab, values, *, rows=None, is_given=False):
    """Checks a vocabulary against `config.json` with so many rows, or enough."""
    config = from_hugging_face.encoder_config(values, "m")
    config = dataclasses.replace(config, vocab_size=rows or vocab.size)
    vocabulary_fit.check(vocab, config, values, source="m", is_given=is_given)


def t5gemma2(**ids):
    text = configs.T5GEMMA2_TEXT | ids
    return configs.T5GEMMA2 | {"encoder": {"text_config": text}}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("gemma", configs.GEMMA),
        ("gemma", configs.GEMMA | {"bos_token_id": 2, "eos_token_id": [1, 106]}),
        ("gemma", t5gemma2(bos_token_id=2, eos_token_id=1, pad_token_id=0)),
        ("gemma", configs.EMBEDDINGGEMMA2),
        ("qwen", configs.QWEN3),
        ("qwen", configs.QWEN3 | QWEN_IDS),
        ("qwen", configs.QWEN3 | {"eos_token_id": 7, "pad_token_id": QWEN_END}),
        # An encoder that was trained here without BOS, and exported.
        ("qwen", configs.GEMMA | {"bos_token_id": None, "eos_token_id": QWEN_END}),
    ],
)
def test_the_tokenizer_of_the_model_is_taken(kind, values):
    assert build("qwen").eos_id == QWEN_END
    check(build(kind), values)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            "qwen",
            configs.GEMMA,
            f"m: its vocabulary begins texts with no token and ends them with the id "
            f"{QWEN_END}, and the model needs the id 2 and the id 1;",
        ),
        ("qwen", configs.EMBEDDINGGEMMA2, "needs the id 2 and the id 1;"),
        ("qwen", t5gemma2(), "needs the id 2 and the id 1;"),
        # SentencePiece models do not write BOS, not even Gemma's.
        ("sentencepiece", configs.GEMMA, "begins texts with no token"),
        ("gemma", configs.GEMMA | {"bos_token_id": 3}, "the id 3 and the id 1;"),
        ("gemma", configs.GEMMA | {"eos_token_id": [5, 6]}, "the id 5 or 6;"),
        (
            "gemma",
            configs.QWEN3,
            "begins texts with the id 2 and ends them with the id 1, and the model "
            "needs no token and any;",
        ),
        ("sentencepiece", configs.QWEN3 | QWEN_IDS, "needs no token and the id "),
    ],
)
def test_a_tokenizer_with_other_ends_is_refused(kind, values, message):
    with pytest.raises(ValueError, match=message):
        check(build(kind), values)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("qwen", configs.GEMMA | {"vocab_size": 960}, "needs the id 2 and the id 1;"),
        ("gemma", configs.GEMMA | {"vocab_size": 262_144}, "do not belong together"),
        ("gemma", configs.QWEN3 | {"vocab_size": 960}, "needs no token"),
        ("gemma", configs.GEMMA | {"vocab_size": 400}, "do not belong together"),
        ("gemma", configs.GEMMA | {"eos_token_id": "x"}, "eos_token_id must be a tok"),
    ],
)
def test_a_folder_is_refused_before_its_weights_are_read(
    tmp_path, kind, values, message
):
    """There are no weights in this folder, so reading them would be another error."""
    json_tokenizers.write(tmp_path, kind)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        detection.open_model(tmp_path)
    named = {"vocabulary": tmp_path / "tokenizer.json"}
    with pytest.raises(ValueError, match=message):
        detection.open_model(tmp_path, **named)


@pytest.mark.parametrize("kind", ["gemma", "qwen"])
def test_a_t5_takes_no_vocabulary_of_other_families(tmp_path, kind):
    folder = json_tokenizers.write(tmp_path / "v", kind)
    given = {"vocabulary": folder / "tokenizer.json"}
    with pytest.raises(ValueError, match="do not belong together"):
        detection.open_model(T5X / "legacy_f32", **given)
    config = json.loads((T5X / "hf" / "config.json").read_text())
    config["vocab_size"] = build(kind).size
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = "the model needs no token and the id 1;"
    with pytest.raises(ValueError, match=message):
        detection.open_model(tmp_path, **given)


def test_the_rows_of_a_table_fit_the_ids(caplog):
    qwen, values = build("qwen"), configs.QWEN3
    check(qwen, values, rows=qwen.size + 1_023, is_given=True)
    for rows in (qwen.size - 1, qwen.size + 1_024):
        with pytest.raises(ValueError, match="do not belong together"):
            check(qwen, values, rows=rows)
    t5, values = (
        build("sentencepiece"),
        json.loads((T5X / "hf/config.json").read_text()),
    )
    check(t5, values, rows=t5.size + 127, is_given=True)
    assert not caplog.text
    check(t5, values, rows=t5.size + 128)
    assert (
        "8,000 ids (0 of them sentinels), and the embedding table 8,128 rows"
        in caplog.text
    )
    with pytest.raises(ValueError, match=r"sentinels with --extra-ids \(T5: 100\)"):
        check(t5, values, rows=t5.size + 128, is_given=True)
