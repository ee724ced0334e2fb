"""The T5X checkpoint, read with the libraries of t5x."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import tensorstore
from flax import serialization

from gecko_jax.formats import model_folder, parameters, to_t5x
from gecko_jax.models import dual_encoder

FIXTURE = pathlib.Path(__file__).parents[1] / "testdata" / "t5x_tiny"


@pytest.fixture(scope="module")
def files(tiny_files):
    """Parameters of a checkpoint that t5x wrote."""
    info = json.loads((FIXTURE / "info.json").read_text())["config"]
    config = dual_encoder.EncoderConfig(
        vocab_size=info["vocab"],
        model_dim=info["emb"],
        num_layers=info["layers"],
        num_heads=info["heads"],
        head_dim=info["head_dim"],
        mlp_dim=info["mlp"],
        embedding_dim=info["proj"],
    )
    flat = dict(np.load(FIXTURE / "params.npz"))
    return dataclasses.replace(
        tiny_files,
        encoder_config=config,
        params=parameters.unflatten(flat),
        mrl_dims=(4, 8),
        step=1_000,
    )


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "t5x"
    to_t5x.save(path, files)
    return path


def _restore(folder):
    return serialization.msgpack_restore(
        (folder / "checkpoint_1000" / "checkpoint").read_bytes()
    )


def test_the_map_is_the_one_t5x_writes(folder):
    contents = _restore(folder)
    assert contents.keys() == {"version", "optimizer"}
    assert contents["version"] == 3
    optimizer = contents["optimizer"]
    assert optimizer.keys() == {"state", "target"}
    assert optimizer["state"].keys() == {"step"}
    assert optimizer["state"]["step"] == 1_000
    assert optimizer["state"]["step"].dtype == np.int32
    # Copied from a checkpoint of the same model by t5x.
    assert optimizer["target"]["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"] == {
        "driver": "zarr",
        "dtype": "float32",
        "kvstore": {
            "driver": "file",
            "path": "target.encoder.layers_0.mlp.wi_0.kernel/",
        },
        "metadata": {
            "chunks": [16, 24],
            "compressor": {"id": "gzip", "level": 1},
            "shape": [16, 24],
        },
    }


def test_the_arrays_are_as_t5x_writes_them(folder):
    array = folder / "checkpoint_1000" / "target.encoder.layers_0.mlp.wi_0.kernel"
    assert {path.name for path in array.iterdir()} == {".zarray", "0.0"}
    assert json.loads((array / ".zarray").read_text()) == {
        "chunks": [16, 24],
        "compressor": {"id": "gzip", "level": 1},
        "dimension_separator": ".",
        "dtype": "<f4",
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": [16, 24],
        "zarr_format": 2,
    }


def test_every_parameter_comes_back_bit_for_bit(files, folder):
    checkpoint = folder / "checkpoint_1000"
    specs = _restore(folder)["optimizer"]["target"]
    found = {}

    def collect(node, name):
        if "driver" not in node:
            for key, child in node.items():
                collect(child, f"{name}/{key}" if name else key)
            return
        node["kvstore"]["path"] = str(checkpoint / node["kvstore"]["path"])
        store = tensorstore.open(
            {"driver": node["driver"], "kvstore": node["kvstore"]}
        ).result()
        found[name] = store.read().result()

    collect(specs, "")
    expected = parameters.flatten(files.params)
    assert found.keys() == expected.keys()
    assert "projection_layer/kernel" in found
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[name])


def test_settings_that_t5x_cannot_store_are_in_gecko(files, folder):
    settings = model_folder.load_settings(folder / "gecko")
    assert settings.encoder_config == files.encoder_config
    assert settings.text_format == files.text_format
    assert settings.vocabulary_proto == files.vocabulary_proto


def test_large_arrays_are_cut_evenly():
    chunks = to_t5x.choose_chunks((32_128, 4_096))
    assert 32 * 2**20 <= 4 * chunks[0] * chunks[1] <= 64 * 2**20
    assert 32_128 % chunks[0] == 4_096 % chunks[1] == 0


def test_an_export_may_lie_upwards(files, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    to_t5x.save(pathlib.Path("../m"), files)
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        "checkpoint_1000",
        "gecko",
    }


def test_a_folder_of_something_else_is_not_overwritten(files, tmp_path):
    (tmp_path / "checkpoint_999").mkdir()
    (tmp_path / "checkpoint_999" / "checkpoint").write_text("training")
    with pytest.raises(ValueError, match="not an earlier export"):
        to_t5x.save(tmp_path, files)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_999"]


def test_an_earlier_export_is_replaced(files, tmp_path):
    to_t5x.save(tmp_path / "m", dataclasses.replace(files, step=3))
    to_t5x.save(tmp_path / "m", files)
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {"checkpoint_1000", "gecko"}


def test_a_checkpoint_that_t5x_added_is_kept(files, tmp_path):
    """t5x continues in the folder from which it started."""
    to_t5x.save(tmp_path, files)
    added = tmp_path / "checkpoint_2000" / "checkpoint"
    added.parent.mkdir()
    added.write_text("trained further")
    with pytest.raises(ValueError, match=r"also holds checkpoint_2000/checkpoint, w"):
        to_t5x.save(tmp_path, files)
    assert added.read_text() == "trained further"


def test_a_project_with_a_folder_named_gecko_is_not_overwritten(tiny_files, tmp_path):
    (tmp_path / "gecko").mkdir()
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"no gecko/gecko\.json"):
        to_t5x.save(tmp_path, tiny_files)
    assert (tmp_path / "thesis.txt").exists()
