"""Settings that a format does or does not store."""

import pathlib

import flax.serialization
import numpy as np
import pytest

from gecko_jax.formats import detection, parameters

DATA = pathlib.Path(__file__).parents[1] / "testdata"
HF = DATA / "t5x_tiny" / "hf"
VOCABULARY = DATA / "model_v1" / "vocabulary.model"


def write_t5x(folder, *, buckets):
    """Writes a T5X checkpoint with a number of relative-bias buckets."""
    with np.load(DATA / "t5x_tiny" / "params.npz") as stored:
        flat = {name: stored[name] for name in stored}
    name = "encoder/relpos_bias/rel_embedding"
    flat[name] = np.zeros((len(flat[name]), buckets), np.float32)
    content = {"state": {"step": np.int32(7)}, "target": parameters.unflatten(flat)}
    folder.mkdir()
    (folder / "checkpoint").write_bytes(
        flax.serialization.msgpack_serialize({"version": 3, "optimizer": content})
    )
    return folder


def test_the_distance_of_a_t5x_checkpoint_is_a_setting(tmp_path, caplog, gecko):
    source = write_t5x(tmp_path / "checkpoint_7", buckets=16)
    opened = detection.open_model(source, vocabulary=VOCABULARY)
    assert opened.encoder_config.relpos_max_distance == 128
    assert "has 16 buckets, T5's has 32" in caplog.text
    assert "--relpos-max-distance" in caplog.text
    caplog.clear()
    arguments = [f"--vocabulary={VOCABULARY}", f"--output={tmp_path / 'out'}"]
    status, _, _ = gecko("import", source, "--relpos-max-distance=40", *arguments)
    assert status == 0
    assert not caplog.text
    written = detection.open_model(tmp_path / "out").encoder_config
    assert (written.relpos_num_buckets, written.relpos_max_distance) == (16, 40)


def test_the_usual_number_of_buckets_is_no_warning(tmp_path, caplog):
    source = write_t5x(tmp_path / "checkpoint_7", buckets=32)
    detection.open_model(source, vocabulary=VOCABULARY)
    assert not caplog.text


@pytest.mark.parametrize(
    ("buckets", "distance"), [(16, 4), (18, 4), (2, 128), (7, 128)]
)
def test_buckets_and_distance_must_fit(tmp_path, buckets, distance):
    source = write_t5x(tmp_path / "checkpoint_7", buckets=buckets)
    with pytest.raises(ValueError, match=f"bias of {buckets} buckets up to a distance"):
        detection.open_model(
            source, vocabulary=VOCABULARY, relpos_max_distance=distance
        )


def test_a_format_that_holds_the_distance_refuses_another(tiny_folder):
    for source, name in ((HF, "Hugging Face"), (tiny_folder, "gecko_jax")):
        with pytest.raises(ValueError, match=f"a {name} model, which holds the dist"):
            detection.open_model(source, relpos_max_distance=40)
