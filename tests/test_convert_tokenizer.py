"""Vocabularies of Hugging Face folders cut texts as they do there."""

import base64
import json
import pathlib
import shutil

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

import gecko_jax
from gecko_jax import vocabulary
from gecko_jax.convert import tokenizer

QUICKSTART = pathlib.Path(gecko_jax.__file__).parent / "quickstart" / "vocabulary.model"
TEXTS = [
    "how do I store a list of values in a table column?",
    "  ＡＢＣ  ﬁne\tcafé naïve ½ x² — “quoted” ",
    "日本語のテキスト ☃ 🦎 \u200b zero width",
    "def f(x):\n    return x**2  # square",
    "MiXeD caSe and numbers 3.14159 1,000,000",
]


WORDS = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
CLOSED = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}],
    "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
}


def _added(number, content, **options):
    defaults = {"single_word": False, "lstrip": False, "rstrip": False}
    defaults |= {"normalized": True, "special": False}
    return {"id": number, "content": content, **defaults, **options}


def _json(proto, extra_ids=0, *, normalizer=None):
    """Writes what transformers' converter does, without transformers."""
    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    vocab = [[piece.piece, piece.score] for piece in model.pieces]
    vocab += [[f"<extra_id_{n}>", 0.0] for n in reversed(range(extra_ids))]
    charsmap = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    return {
        "added_tokens": [
            _added(number, name, normalized=False, special=True)
            for number, name in enumerate(["<pad>", "</s>", "<unk>"])
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, WORDS],
        },
        "post_processor": CLOSED,
        "normalizer": normalizer
        or {
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": charsmap},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            ],
        },
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "vocab": vocab,
            "byte_fallback": model.trainer_spec.byte_fallback,
        },
    }


@pytest.mark.parametrize("extra_ids", [0, 7])
def test_the_model_is_written_again_from_json(tmp_path, extra_ids):
    proto = QUICKSTART.read_bytes()
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(_json(proto, extra_ids)))
    found = tokenizer.read(tmp_path)
    assert found.extra_ids == extra_ids
    assert not found.added_tokens
    ours = found.build()
    original = vocabulary.Vocabulary(proto, extra_ids)
    assert ours.size == original.size
    assert ours.encode(TEXTS) == original.encode(TEXTS)
    assert ours.decode(ours.encode(TEXTS)[0]) == TEXTS[0]


@pytest.mark.torch
@pytest.mark.parametrize("kept", ["tokenizer.json", "spiece.model"])
def test_tokens_are_those_of_transformers(tmp_path, kept):
    import transformers

    # As T5's, which never spells an unknown character in bytes.
    model = sentencepiece_model_pb2.ModelProto.FromString(QUICKSTART.read_bytes())
    model.trainer_spec.byte_fallback = False
    for piece in model.pieces:
        if piece.type == piece.BYTE:
            piece.type = piece.UNUSED
    (tmp_path / "spiece.model").write_bytes(model.SerializeToString())
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=5)
    theirs.save_pretrained(tmp_path)
    if kept == "tokenizer.json":
        (tmp_path / "spiece.model").unlink()
    found = tokenizer.read(tmp_path)
    assert found.extra_ids == 5
    ours = found.build()
    assert ours.encode(TEXTS) == theirs(TEXTS).input_ids


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 0),
        ({"tokenizer_config.json": {"model_max_length": 512}}, 100),
        ({"tokenizer_config.json": {"extra_ids": 12}}, 12),
        (
            {
                "tokenizer_config.json": {
                    "added_tokens_decoder": {
                        "0": {"content": "<pad>"},
                        "8000": {"content": "<extra_id_0>"},
                    }
                }
            },
            1,
        ),
        ({"tokenizer.json": {"added_tokens": [_added(8_000, "<extra_id_0>")]}}, 1),
    ],
)
def test_sentinels_are_counted(tmp_path, files, expected):
    shutil.copy(QUICKSTART, tmp_path / "spiece.model")
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    found = tokenizer.read(tmp_path)
    assert found == tokenizer.Tokenizer(QUICKSTART.read_bytes(), expected)


def test_pieces_that_are_sentinels_are_not_counted_twice(tmp_path):
    """mT5's SentencePiece model holds its own."""
    proto = vocabulary.Vocabulary(QUICKSTART.read_bytes(), 100).full_proto
    (tmp_path / "spiece.model").write_bytes(proto)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer.read(tmp_path).extra_ids == 0


def test_other_tokenizers_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    values = _json(QUICKSTART.read_bytes())
    path.write_text(json.dumps({**values, "model": {"type": "BPE", "vocab": {"a": 1}}}))
    with pytest.raises(ValueError, match="a BPE tokenizer; a T5 encoder needs Unigram"):
        tokenizer.read(tmp_path)
    values = _json(QUICKSTART.read_bytes(), normalizer={"type": "Lowercase"})
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="its normalizer has a step Lowercase"):
        tokenizer.read(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a JSON object"):
        tokenizer.read(tmp_path)


def test_too_few_ids_are_a_warning_for_a_folder_and_an_error_by_hand(caplog):
    proto = QUICKSTART.read_bytes()
    size = sentencepiece.SentencePieceProcessor(model_proto=proto).GetPieceSize()
    found = tokenizer.Tokenizer(proto, 0)
    tokenizer.check_size(found, size, source="m", is_given=True)
    tokenizer.check_size(found, size + 127, source="m", is_given=True)
    assert not caplog.text
    tokenizer.check_size(found, size + 128, source="m", is_given=False)
    assert "8,000 ids (0 of them sentinels), and the table 8,128 rows" in caplog.text
    with pytest.raises(ValueError, match=r"sentinels with --extra-ids \(T5: 100\)"):
        tokenizer.check_size(found, size + 128, source="m", is_given=True)
