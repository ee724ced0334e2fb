"""Tensors in safetensors files, read and written one at a time."""

import json

import numpy as np
import pytest
import safetensors.numpy

from gecko_jax.formats import safetensors_files, tensors


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
    safetensors_files.write(
        tmp_path, {k: tensors.as_tensor(v) for k, v in arrays.items()}
    )
    path = tmp_path / "model.safetensors"
    loaded = safetensors.numpy.load_file(path)
    opened = safetensors_files.read(tmp_path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert opened[name].shape == array.shape
        np.testing.assert_array_equal(opened[name].read(), array)
    # The format requires values to begin at a multiple of 8 bytes.
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_half_precision_is_half_as_large_and_read_as_float32(tmp_path):
    array = np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32)
    rounded = tensors.as_tensor(array).round("float16")
    for dtype in safetensors_files.DTYPES:
        (tmp_path / dtype).mkdir()
        safetensors_files.write(tmp_path / dtype, {"a": rounded}, dtype=dtype)
        opened = safetensors_files.read(tmp_path / dtype)["a"].read()
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
    safetensors_files.write(
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
    safetensors_files.write(tmp_path, lazy)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * 2e6


def test_a_transposed_tensor_is_written_in_its_new_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = _tensor(array).transpose()
    assert tensor.shape == (3, 2)
    safetensors_files.write(tmp_path, {"a": tensor})
    loaded = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(loaded["a"], array.T)


def test_missing_weights_are_named(tmp_path):
    assert not safetensors_files.has_tensors(tmp_path)
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        safetensors_files.read(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": 5}}, r'\["a"\] must be a \.safetensors file name, not 5'),
        ({"weight_map": {"a": None}}, r'\["a"\] must be .*, not null'),
        ({"weight_map": {"a": ["x.safetensors"]}}, r'\["a"\] must be .*, not a list'),
        ({"weight_map": {"a": {}}}, r'\["a"\] must be .*, not an object'),
        ({"weight_map": {"a": ""}}, r'\["a"\] must be a \.safetensors file name'),
        ({"weight_map": {"a": "x\0.safetensors"}}, r'\["a"\] must be .*, not "x'),
        ({"weight_map": {"a": "../x.safetensors"}}, r'\["a"\] must be .*, not "\.\./x'),
        ({"weight_map": []}, "weight_map must be an object"),
        ({"weight_map": {}}, "an empty weight_map"),
        ({"weight_map": None}, "weight_map must be an object"),
        ({}, "no weight_map"),
        ([], r"index\.json: a list, not an object"),
        (5, r"index\.json: a number, not an object"),
    ],
)
def test_a_damaged_index_is_one_error(tmp_path, index, message):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message) as error:
        safetensors_files.read(tmp_path)
    assert str(path) in str(error.value)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: not JSON"):
        safetensors_files.read(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_named_when_it_is_read(bad):
    array = np.array([[1, bad], [3, 4]], np.float32)
    tensor = tensors.Tensor((2, 2), lambda: array, "file:a").require_finite("wo")
    with pytest.raises(ValueError, match=r"wo \(file:a\): 1 of 4 weights are NaN"):
        tensor.read()
    with pytest.raises(ValueError, match="1 of 4"):
        tensor.transpose().read()
    assert tensors.is_finite(np.zeros((0, 3), np.float32))
