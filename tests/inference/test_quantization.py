import numpy as np
import pytest

from gecko_jax.inference import embedding, quantization


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    return embedding.cut(rng.normal(size=(300, 20)).astype(np.float32), 20)


def test_int8_codes_are_off_by_half_a_step_at_most(vectors):
    codes = quantization.encode(vectors, "int8")
    assert codes.values.dtype == np.int8
    step = (vectors.max(0) - vectors.min(0)) / 255
    assert (np.abs(codes.decode() - vectors) <= step * 0.5 + 1e-6).all()
    assert (codes.values.min(), codes.values.max()) == (-128, 127)


def test_each_dim_has_its_own_ranges(vectors):
    scaled = vectors * np.linspace(0.01, 10, 20, dtype=np.float32)
    codes = quantization.encode(scaled, "int8")
    np.testing.assert_array_equal(codes.ranges[0], scaled.min(0))
    np.testing.assert_array_equal(codes.ranges[1], scaled.max(0))
    # Rounding decides on which side of the last step the largest value is.
    assert (np.ptp(codes.values.astype(int), axis=0) >= 254).all()


def test_values_outside_the_ranges_are_clipped(vectors):
    ranges = quantization.encode(vectors[:100], "int8").ranges
    codes = quantization.encode(vectors * 5, "int8", ranges)
    step = (ranges[1] - ranges[0]) / 255
    decoded = codes.decode()
    assert (decoded >= ranges[0] - step).all()
    assert (decoded <= ranges[1] + step).all()
    assert decoded.max() > ranges.max() - step.max()


def test_a_constant_dim_is_exact(vectors):
    constant = vectors.copy()
    constant[:, 3] = 0.25
    decoded = quantization.encode(constant, "int8").decode()
    np.testing.assert_array_equal(decoded[:, 3], np.float32(0.25))


def test_binary_codes_are_the_signs(vectors):
    codes = quantization.encode(vectors, "binary")
    assert codes.values.shape == (300, 3)
    assert codes.values.dtype == np.uint8
    expected = np.where(vectors > 0, 1, -1) / np.sqrt(20)
    np.testing.assert_allclose(codes.decode(), expected, atol=1e-6)


def test_float32_is_unchanged(vectors):
    np.testing.assert_array_equal(
        quantization.encode(vectors, "float32").decode(), vectors
    )


@pytest.mark.parametrize(
    ("precision", "size"), [("float32", 3072), ("int8", 768), ("binary", 96)]
)
def test_bytes_of_a_vector(precision, size):
    assert quantization.bytes_per_vector(precision, 768) == size
    codes = quantization.encode(np.ones((2, 768), np.float32), precision)
    assert codes.values[0].nbytes == codes.bytes_per_vector == size


def test_an_unknown_precision_is_refused(vectors):
    with pytest.raises(ValueError, match=r"'fp4'.*float32, int8, binary"):
        quantization.encode(vectors, "fp4")


def test_int8_needs_two_vectors(vectors):
    with pytest.raises(ValueError, match="int8 needs at least 2"):
        quantization.encode(vectors[:1], "int8")


@pytest.mark.torch
def test_codes_equal_those_of_sentence_transformers(vectors):
    from sentence_transformers.util import quantization as theirs

    np.testing.assert_array_equal(
        quantization.encode(vectors, "binary").values,
        theirs.quantize_embeddings(vectors, "ubinary"),
    )
    ranges = quantization.encode(vectors[:100], "int8").ranges
    np.testing.assert_array_equal(
        quantization.encode(vectors, "int8", ranges).values,
        theirs.quantize_embeddings(vectors, "int8", ranges=ranges),
    )
    np.testing.assert_array_equal(
        quantization.encode(vectors, "int8").values,
        theirs.quantize_embeddings(
            vectors, "int8", calibration_embeddings=vectors.copy()
        ),
    )


@pytest.mark.parametrize("precision", ["int8", "binary"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite_have_no_code(vectors, precision, bad):
    damaged = vectors.copy()
    damaged[3, 1] = bad
    with pytest.raises(ValueError, match=rf"vectors\[3\]: .* no {precision} code"):
        quantization.encode(damaged, precision)
