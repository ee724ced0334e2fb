import dataclasses

import jax
import numpy as np
import pytest

from gecko_jax.llm import decoder_weights, gguf
from tests import tiny_decoder


def _load(path, mesh=None):
    file = gguf.Gguf(path)
    mesh = mesh or tiny_decoder.mesh()
    return file, decoder_weights.load(file, dtype=np.float32, mesh=mesh)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_file_gives_back_what_was_written(family, tmp_path):
    config = getattr(tiny_decoder, family.upper())
    path = tiny_decoder.write_gguf(tmp_path / "tiny.gguf", family=family)
    file, params = _load(path)
    expected = dataclasses.replace(config, norm_epsilon=file.config.norm_epsilon)
    assert file.config == expected
    jax.tree.map(np.testing.assert_array_equal, params, tiny_decoder.params(config))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_0", "F16"])
def test_quantized_tensors_are_those_of_the_gguf_package(kind, tmp_path):
    import gguf as package

    path = tiny_decoder.write_gguf(tmp_path / "tiny.gguf", {"ffn_down": kind})
    _, params = _load(path)
    quantization = package.GGMLQuantizationType[kind]
    for layer, found in enumerate(params["layers"]["down"]):
        plain = tiny_decoder.params(tiny_decoder.LLAMA)["layers"]["down"][layer].T
        packed = package.quantize(np.ascontiguousarray(plain), quantization)
        expected = package.dequantize(packed, quantization)
        np.testing.assert_array_equal(found.T, expected)
        assert 0 < np.abs(expected - plain).max() < 0.2


def test_parameters_on_eight_devices_are_split_by_the_rules(tmp_path):
    path = tiny_decoder.write_gguf(tmp_path / "tiny.gguf")
    _, params = _load(path, tiny_decoder.mesh(8, tensor=2))
    tensor = params["layers"]["gate"].sharding.spec
    assert tensor[2] == "tensor"
    assert params["layers"]["query"].sharding.spec[2] == "tensor"
    jax.tree.map(
        np.testing.assert_array_equal, params, tiny_decoder.params(tiny_decoder.LLAMA)
    )


def test_a_cut_off_file_is_named(tmp_path):
    path = tiny_decoder.write_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for size in (0, 3, 200, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"tiny\.gguf: not a complete GGUF file"):
            gguf.Gguf(path)


def test_tensors_that_are_not_those_of_the_settings_are_listed_together(tmp_path):
    config = dataclasses.replace(tiny_decoder.LLAMA, mlp_dim=48)
    path = tiny_decoder.write_gguf(tmp_path / "tiny.gguf", config=config)
    with pytest.raises(ValueError, match=r"wrong shape: blk\.0\.ffn_gate.*, \.\.\."):
        gguf.Gguf(path)


def test_another_family_is_refused(tmp_path):
    path = tiny_decoder.write_gguf(tmp_path / "tiny.gguf")
    # The same length, so that the file stays whole.
    path.write_bytes(path.read_bytes().replace(b"llama", b"qwen9"))
    with pytest.raises(
        ValueError, match=r"architecture 'qwen9'.*llama, qwen2, .*gemma3"
    ):
        gguf.Gguf(path)
