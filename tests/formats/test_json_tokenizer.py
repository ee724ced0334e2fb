"""Models with a `tokenizer.json`: import, model folder, export."""

import dataclasses
import json
import re

import numpy as np
import pytest
import samples

import gecko_jax
from gecko_jax.formats import (
    model_folder,
    to_hugging_face_tokenizer,
    to_sentence_transformers,
    tokenizer,
)
from gecko_jax.text import vocabularies
from tests import json_tokenizers

KINDS = pytest.mark.parametrize("kind", ["gemma", "qwen"])
NAMES = (vocabularies.JSON_FILE, vocabularies.JSON_CONFIG)


@pytest.fixture
def files(tiny_files, tmp_path):
    vocab = tokenizer.read_json(
        json_tokenizers.write(tmp_path / "qwen", "qwen"), is_base=False
    )
    return dataclasses.replace(
        tiny_files,
        text_format=dataclasses.replace(tiny_files.text_format, verbatim=True),
        vocabulary_proto=vocab.model_proto,
        tokenizer_config=vocab.tokenizer_config,
    )


def test_a_model_folder_keeps_the_tokenizer(files, tmp_path):
    written = dataclasses.replace(files, revision="")
    written = model_folder.save_model(tmp_path / "m", written)
    assert not (tmp_path / "m" / "vocabulary.model").exists()
    for name in NAMES:
        source = (tmp_path / "qwen" / name).read_bytes()
        assert (tmp_path / "m" / name).read_bytes() == source
    opened = gecko_jax.load(tmp_path / "m")
    assert opened.files.tokenizer_config == files.tokenizer_config
    assert opened.files.text_format == files.text_format
    texts = ["line\nbreaks\t!", "line breaks !", "!"]
    encoded = opened.encode_passages(texts)
    # Whitespace is not cleaned, so these are three texts.
    assert len(np.unique(encoded.round(6), axis=0)) == 3
    alone = opened.encode_passages(texts[:1])
    np.testing.assert_allclose(encoded[:1], alone, atol=1e-5)
    # Another config is another model.
    other = dataclasses.replace(files, revision="", tokenizer_config=b"{}")
    assert model_folder.save_model(tmp_path / "n", other).revision != written.revision


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_folder_is_refused(files, tmp_path, name):
    model_folder.save_model(tmp_path / "m", files)
    path = tmp_path / "m" / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b"o", b"0", 1))
    with pytest.raises(ValueError, match=f"{name}: .*copy it again"):
        model_folder.load_settings(tmp_path / "m")
    path.unlink()
    with pytest.raises(ValueError, match=f"{name}.* missing"):
        model_folder.load_settings(tmp_path / "m")


def test_an_export_hands_the_files_back(files, tmp_path):
    model_folder.save_model(tmp_path / "m", files)
    opened = samples.load_model(tmp_path / "m")
    to_sentence_transformers.save(tmp_path / "st", opened)
    for name in NAMES:
        source = (tmp_path / "qwen" / name).read_bytes()
        assert (tmp_path / "st" / name).read_bytes() == source
    assert not (tmp_path / "st" / "spiece.model").exists()
    again = gecko_jax.load(tmp_path / "st")
    np.testing.assert_array_equal(
        again.encode_queries(["a\nb!"]),
        gecko_jax.load(tmp_path / "m").encode_queries(["a\nb!"]),
    )
    to_sentence_transformers.save(tmp_path / "st", opened)  # Replaces it.
    with pytest.raises(ValueError, match="st: exported by gecko_jax, with its own voc"):
        gecko_jax.load(tmp_path / "st", vocabulary=tmp_path / "st" / "tokenizer.json")


@KINDS
def test_a_tokenizer_without_a_config_gets_one(kind, tmp_path):
    content = json_tokenizers.to_bytes(json_tokenizers.closed(kind))
    vocab = vocabularies.build(content)
    to_hugging_face_tokenizer.write_tokenizer(tmp_path, vocab, 64)
    config = json.loads((tmp_path / vocabularies.JSON_CONFIG).read_text())
    end = {"gemma": "<eos>", "qwen": "<|endoftext|>"}[kind]
    assert config["eos_token"] == end
    assert config["pad_token"] == end


def test_more_ids_than_rows_are_refused(files):
    config = dataclasses.replace(files.encoder_config, vocab_size=32)
    with pytest.raises(ValueError, match="ids and the model has vocab_size=32"):
        gecko_jax.Gecko(dataclasses.replace(files, encoder_config=config))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<new>": 999}),
        ("added_tokens.json", {"<eos>": 7}),
        ("special_tokens_map.json", {"sep_token": "<new>"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "<n>"}}}),
    ],
)
def test_tokens_that_only_another_file_has_are_refused(tmp_path, name, content):
    folder = json_tokenizers.write(tmp_path, "gemma")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{re.escape(name)}: the token '<.*or none"):
        tokenizer.read_json(folder, is_base=False)


@KINDS
def test_only_base_models_get_an_end(kind, tmp_path):
    folder = json_tokenizers.write(tmp_path, kind, json_tokenizers.base(kind))
    assert tokenizer.read_json(folder, is_base=True).eos_id
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*does not end texts"):
        tokenizer.read_json(folder, is_base=False)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json: missing; save"):
        tokenizer.read_json(folder, is_base=True)


@pytest.mark.torch
@KINDS
def test_transformers_and_sentence_transformers_have_the_same_ids(kind, tmp_path):
    import sentence_transformers
    import transformers
    from sentence_transformers.sentence_transformer import modules

    folder = json_tokenizers.write(tmp_path / "in", kind, json_tokenizers.base(kind))
    vocab = tokenizer.read_json(folder, is_base=True)
    out = tmp_path / "out"
    out.mkdir()
    config = transformers.Qwen3Config(
        vocab_size=vocab.size + 1,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    transformers.Qwen3Model(config).save_pretrained(out)
    to_hugging_face_tokenizer.write_tokenizer(out, vocab, 64)
    texts = [*json_tokenizers.TEXTS, "a long text " * 50]
    if kind == "gemma":  # An id after the table, where transformers' model fails.
        texts = [t.replace("<image_soft_token>", "") for t in texts]
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert type(theirs).__name__ == json_tokenizers.CONFIGS[kind]["tokenizer_class"]
    assert vocab.encode(texts) == theirs(texts)["input_ids"]
    transformer = modules.Transformer(str(out), max_seq_length=16)
    st = sentence_transformers.SentenceTransformer(
        modules=[transformer, modules.Pooling(8)], device="cpu"
    )
    for prompt in ("", "Instruct: x\nQuery:", "title: none | text: "):
        ours = vocab.encode([prompt + text for text in texts], 16)
        found = st.preprocess(texts, prompt=prompt)
        ids, mask = found["input_ids"].numpy(), found["attention_mask"].numpy()
        for row, expected in enumerate(ours):
            assert ids[row][mask[row] == 1].tolist() == expected
