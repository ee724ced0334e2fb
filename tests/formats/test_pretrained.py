"""Bundled models: usable by name wherever a model is named."""

import dataclasses
import pathlib

import pytest

from gecko_jax.cli import flags
from gecko_jax.data import task_table
from gecko_jax.formats import detection, model_folder, pretrained
from gecko_jax.inference import embedding
from gecko_jax.text import vocabularies
from gecko_jax.training import initialization

ROOT = pathlib.Path(__file__).parents[2]
MOST_BYTES = 20e6


@pytest.fixture
def named(tiny_files, tmp_path, monkeypatch):
    """A bundled model "tiny", and an empty working directory."""
    model_folder.save_model(tmp_path / "shipped" / "tiny", tiny_files)
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "shipped")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "shipped" / "tiny"


def test_a_name_opens_the_model_that_comes_along(named, tiny_files):
    assert pretrained.names() == ("tiny",)
    assert embedding.load("tiny").revision == tiny_files.revision
    assert model_folder.open_model("tiny").revision == tiny_files.revision
    assert detection.find_format("tiny") == (detection.Format.GECKO, str(named))
    assert task_table.vocabulary_path("tiny") == str(named / "vocabulary.model")


def test_other_sources_stay_as_they_are(named):
    for source in ("runs/tiny", "tiny.model", "./tiny", "owner/tiny"):
        assert pretrained.find(source) == source
    assert task_table.vocabulary_path("tiny.model") == "tiny.model"


@pytest.mark.parametrize("name", pretrained.RELEASED)
def test_a_missing_released_model_is_an_error_with_its_command(name, tmp_path):
    config = flags.load(f"{ROOT / 'configs' / 'finetune.py'}:{name}")
    path = config.init.checkpoint
    message = f"{path}: no such folder; write it with `gecko import .* --output={path}`"
    vocab = vocabularies.load(task_table.QUICKSTART_VOCABULARY)
    with pytest.raises(ValueError, match=message):
        initialization.open_start(config, vocab)
    with pytest.raises(ValueError, match=message):
        task_table.vocabulary_path(config.data.vocabulary)
    # A model of that name on the hub is another source.
    pretrained.check_imported(f"owner/{name}")
    (tmp_path / "models" / name).mkdir(parents=True)
    pretrained.check_imported(tmp_path / "models" / name)


def test_a_path_that_exists_takes_precedence_over_a_name(named, tiny_files, tmp_path):
    mine = dataclasses.replace(tiny_files, revision="mine")
    model_folder.save_model(tmp_path / "here" / "tiny", mine)
    assert embedding.load("tiny").revision == "mine"


def test_a_folder_that_hides_a_model_is_reported(named, tmp_path):
    (tmp_path / "here" / "tiny").mkdir()
    with pytest.raises(ValueError, match=r"this folder hides the bundled model 'tiny'"):
        embedding.load("tiny")


def test_training_names_the_vocabulary_of_a_bundled_model(named, tiny_files):
    config = flags.load(f"{ROOT / 'configs' / 'finetune.py'}:local")
    config.init.checkpoint = "tiny"
    config.data.vocabulary = "other.model"
    other = vocabularies.Vocabulary(tiny_files.vocabulary_proto, extra_ids=3)
    with pytest.raises(ValueError, match=r"set data.vocabulary=tiny and data.extra"):
        initialization.check_vocabulary(other, config, tiny_files)


def test_bundled_models_are_small_and_complete():
    assert pretrained.names() == ("mini",)
    for name in pretrained.names():
        folder = pretrained.FOLDER / name
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        assert sum(files.values()) < MOST_BYTES
        card = (folder / "README.md").read_text()
        model = embedding.load(name)
        assert model.revision in card
        # The example of the README.
        queries = model.encode_queries(
            ["how do I sort a list in Python", "a small lizard"], task="search result"
        )
        passages = model.encode_passages(
            ["Lists have a sort() method.", "Any of various small tropical lizards."]
        )
        assert (queries @ passages.T).argmax(axis=1).tolist() == [0, 1]


def test_fine_tuning_starts_from_what_comes_along():
    config = flags.load(f"{ROOT / 'configs' / 'finetune.py'}:local,shipped")
    files = model_folder.open_model(config.init.checkpoint)
    for name in (
        "num_layers", "vocab_size", "model_dim", "embedding_dim", "num_heads",
        "head_dim", "mlp_dim",
    ):  # fmt: skip
        assert config.model[name] == getattr(files.encoder_config, name), name
    assert tuple(config.loss.mrl_dims) == files.mrl_dims
    assert config.data.extra_ids == files.extra_ids
    # `plain`, as the model was distilled: no task and no title.
    assert config.data.text_format == "plain"
    assert (files.text_format.query, files.text_format.passage) == ("{text}", "{text}")
    vocabulary = pretrained.FOLDER / "mini" / "vocabulary.model"
    assert task_table.vocabulary_path(config.data.vocabulary) == str(vocabulary)


def test_a_config_for_the_shipped_size_names_no_other():
    for words in ("shipped", "local,base,shipped", "local,shipped,taught"):
        with pytest.raises(ValueError, match="shipped"):
            flags.load(f"{ROOT / 'configs' / 'finetune.py'}:{words}")
