"""Ids are compared with those of the `tokenizers` library on the whole file."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import tokenizers

from gecko_jax.data import task_table
from gecko_jax.text import vocabularies
from tests import json_tokenizers

KINDS = pytest.mark.parametrize("kind", ["gemma", "qwen"])


def build(values, config=b""):
    content = json_tokenizers.to_bytes(values)
    return vocabularies.build(content, tokenizer_config=config)


@KINDS
@pytest.mark.parametrize("length", [None, 4, 9])
def test_ids_are_those_of_the_library(kind, length):
    values = json_tokenizers.closed(kind)
    library = tokenizers.Tokenizer.from_str(json.dumps(values))
    if length:
        library.enable_truncation(length)
    texts = [t for t in json_tokenizers.TEXTS if "<image_soft_token>" not in t]
    vocab = build(values)
    encoded = vocab.encode(texts, length)
    for text, ids in zip(texts, encoded, strict=True):
        assert ids == library.encode(text).ids
        # Opened and closed once, and cut texts are closed, too.
        assert ids[: len(vocab.opening)] == list(vocab.opening)
        assert ids[-1] == vocab.eos_id


@KINDS
def test_text_comes_back_from_its_tokens(kind):
    vocab = build(json_tokenizers.closed(kind))
    for text in json_tokenizers.TEXTS:
        expected = text.replace("e\u0301", "é") if kind == "qwen" else text
        expected = expected.replace("▁", " ") if kind == "gemma" else expected
        assert vocab.decode(vocab.encode([text])[0]) == expected


def test_special_tokens_in_a_text_are_tokens_unless_the_config_splits_them():
    values = json_tokenizers.closed("gemma")
    vocab = build(values)
    assert vocab.encode(["a<eos>"])[0][-2:] == [1, 1]
    split = build(values, b'{"split_special_tokens": true}')
    assert 1 not in split.encode(["a<eos>"])[0][:-1]
    assert vocab.fingerprint != split.fingerprint
    assert build(values, b"{}").fingerprint == vocab.fingerprint


def test_placeholders_of_media_after_the_table_are_text():
    values = json_tokenizers.closed("gemma")
    vocab = build(values)
    assert vocab.size == values["added_tokens"][-1]["id"]
    [ids] = vocab.encode(["<image_soft_token>"])
    assert max(ids) < vocab.size


@KINDS
def test_a_base_tokenizer_gets_an_end(kind, tmp_path):
    folder = json_tokenizers.write(tmp_path, kind, json_tokenizers.base(kind))
    vocab = vocabularies.load(folder / "tokenizer.json")
    expected = build(json_tokenizers.closed(kind))
    assert vocab.encode(json_tokenizers.TEXTS) == expected.encode(json_tokenizers.TEXTS)
    # The library does the same with the new file, so an export has it, too.
    library = tokenizers.Tokenizer.from_str(vocab.model_proto.decode())
    assert library.encode("a gecko").ids == vocab.encode(["a gecko"])[0]
    folder = json_tokenizers.write(tmp_path, kind)
    vocab = vocabularies.load(folder)
    assert vocab.model_proto == (folder / "tokenizer.json").read_bytes()
    assert json.loads(vocab.tokenizer_config) == json_tokenizers.CONFIGS[kind]


def test_a_folder_with_both_files_has_a_sentencepiece_vocabulary(tmp_path):
    folder = json_tokenizers.write(tmp_path, "qwen")
    content = task_table.QUICKSTART_VOCABULARY.read_bytes()
    (folder / "vocabulary.model").write_bytes(content)
    assert vocabularies.load(folder).model_proto == content
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty/tokenizer.json: no such vocabulary"):
        vocabularies.load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "Unigram"}}, "a Unigram tokenizer.*`.model`"),
        ({"model": {"type": "WordPiece"}}, "type"),
        ({"model": {"dropout": 0.1}}, "dropout"),
        ({"model": {"vocab": {"a": 1, "b": 1}}}, "share an id"),
        ({"model": {"vocab": {"a": -1}}}, "vocab"),
        ({"truncation": {"direction": "Left"}}, "truncation"),
        ({"post_processor": {"type": "RobertaProcessing"}}, "RobertaProcessing"),
        ({"post_processor": {"type": "TemplateProcessing"}}, "damaged"),
        ({"post_processor": None}, "does not end texts"),
        ({"added_tokens": [{"id": "x"}]}, "added_tokens"),
    ],
)
def test_what_cannot_be_read_is_refused(change, message):
    values = json_tokenizers.closed("gemma")
    for key, value in change.items():
        is_part = key == "model"
        values[key] = {**values[key], **value} if is_part else value
    with pytest.raises(ValueError, match=message):
        build(values)


def test_other_faults_are_refused(tmp_path):
    content = json_tokenizers.to_bytes(json_tokenizers.closed("gemma"))
    with pytest.raises(ValueError, match=r"tokenizer.json: not JSON.*copy it again"):
        vocabularies.build(content[:-20])
    with pytest.raises(ValueError, match=r"extra_ids=5: .* set extra_ids to 0"):
        vocabularies.build(content, 5)
    with pytest.raises(ValueError, match="truncation_side"):
        vocabularies.build(content, tokenizer_config=b'{"truncation_side": "left"}')
    with pytest.raises(ValueError, match="max_length=2: must be at least 3"):
        vocabularies.build(content).encode(["a"], 2)
    with pytest.raises(ValueError, match="max_length=1: must be at least 2"):
        build(json_tokenizers.closed("qwen")).encode(["a"], 1)


@pytest.mark.parametrize("merge", [["no", "such"], "no such", ["one"], "one"])
def test_a_merge_of_tokens_that_the_vocabulary_lacks_is_refused(merge):
    values = json_tokenizers.closed("gemma")
    values["model"]["merges"].append(merge)
    # Before anything is encoded, so an import refuses the file.
    with pytest.raises(ValueError, match=r"model.merges: .*copy it again"):
        build(values)


def test_without_the_package_only_encoding_fails(monkeypatch):
    values = json_tokenizers.closed("qwen")
    values["version"] = "another, so that nothing is cached"
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    vocab = build(values)
    assert vocab.eos_id == vocab.size - 4
    assert len(vocab.fingerprint) == 16
    with pytest.raises(ImportError, match=r"gecko-jax\[tokenizers\]"):
        vocab.encode(["a"])
    with pytest.raises(ImportError, match=r"gecko-jax\[tokenizers\]"):
        vocab.decode([1])


def test_a_pickle_is_the_same_vocabulary():
    vocab = build(json_tokenizers.closed("gemma"), b"{}")
    vocab.encode(["a"])
    again = pickle.loads(pickle.dumps(vocab))
    assert again == vocab
    assert again.encode(["a gecko"]) == vocab.encode(["a gecko"])


_FORK = """
import os, sys, warnings
from gecko_jax.text import vocabularies
vocab = vocabularies.load(sys.argv[1])
texts = [f"text {n} about geckos, lizards " * (n % 7) for n in range(500)]
parent = repr(vocab.encode(texts))
warnings.simplefilter("ignore")
read, write = os.pipe()
if not os.fork():
    os.write(write, str(repr(vocab.encode(texts)) == parent).encode())
    os._exit(0)
print(os.read(read, 10).decode(), hash(parent))
"""


def test_processes_forks_and_threads_give_the_same_ids(tmp_path):
    folder = json_tokenizers.write(tmp_path, "gemma")
    outputs = set()
    for changes in ({}, {"TOKENIZERS_PARALLELISM": "false"}):
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        environment.pop("TOKENIZERS_PARALLELISM", None)
        environment |= changes
        run = subprocess.run(
            [sys.executable, "-c", _FORK, str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        outputs.add(run.stdout)
    [output] = outputs
    assert output.startswith("True ")
