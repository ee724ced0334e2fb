"""Tensors on disk: what the safetensors library reads, one at a time."""

import numpy as np
import pytest
import safetensors.numpy

from gecko_jax import tensors


def _tensor(array, source="", log=None):
    def read():
        if log is not None:
            log.append(source)
        return array

    return tensors.Tensor(array.shape, read, source)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 7), (2, 3, 4)])
def test_what_is_written_the_library_reads(tmp_path, shape):
    arrays = {
        "a": np.random.default_rng(0).standard_normal(shape).astype(np.float32),
        "é": np.ones(3, np.float32),
    }
    tensors.write(tmp_path, {k: tensors.as_tensor(v) for k, v in arrays.items()})
    path = tmp_path / "model.safetensors"
    loaded = safetensors.numpy.load_file(path)
    opened = tensors.read(tmp_path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert opened[name].shape == array.shape
        np.testing.assert_array_equal(opened[name].read(), array)
    # The numbers begin at a multiple of 8 bytes, as the format asks.
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_half_precision_is_half_as_large_and_read_as_float32(tmp_path):
    array = np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32)
    rounded = tensors.as_tensor(array).round("float16")
    for dtype in tensors.DTYPES:
        (tmp_path / dtype).mkdir()
        tensors.write(tmp_path / dtype, {"a": rounded}, dtype=dtype)
        opened = tensors.read(tmp_path / dtype)["a"].read()
        assert opened.dtype == np.float32
        np.testing.assert_array_equal(opened, array.astype(np.float16))
    sizes = [
        (tmp_path / dtype / "model.safetensors").stat().st_size - array.size * width
        for dtype, width in (("float32", 4), ("float16", 2))
    ]
    assert max(map(abs, sizes)) < 200  # the header


def test_a_weight_beyond_half_precision_is_refused():
    array = np.array([1.0, -70_000.0], np.float32)
    with pytest.raises(ValueError, match=r"70000, is beyond what float16 holds"):
        tensors.as_tensor(array).round("float16").read()


def test_tensors_of_one_source_are_read_one_after_another(tmp_path):
    log = []
    leaf = np.zeros((2, 2), np.float32)
    tensors.write(
        tmp_path,
        {f"layer_{n}/{kind}": _tensor(leaf, kind, log) for n in "012" for kind in "ba"},
    )
    assert log == ["a"] * 3 + ["b"] * 3


def test_only_one_tensor_is_in_memory_at_a_time(tmp_path):
    import tracemalloc

    def make():
        return np.ones((500, 1_000), np.float32)  # 2 MB

    lazy = {str(n): tensors.Tensor((500, 1_000), make, str(n)) for n in range(10)}
    tracemalloc.start()
    tensors.write(tmp_path, lazy)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * 2e6


def test_a_transposed_tensor_is_written_in_its_new_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = _tensor(array).transpose()
    assert tensor.shape == (3, 2)
    tensors.write(tmp_path, {"a": tensor})
    loaded = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(loaded["a"], array.T)


def test_another_stem_names_other_files(tmp_path):
    tensors.write(tmp_path, {"a": tensors.as_tensor(np.ones(2))}, stem="dense")
    assert tensors.has_tensors(tmp_path, "dense")
    assert not tensors.has_tensors(tmp_path)
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        tensors.read(tmp_path)
