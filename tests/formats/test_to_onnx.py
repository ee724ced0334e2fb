"""The ONNX graph, run by onnxruntime, gives our embeddings."""

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import random_params
import tokenizers

from gecko_jax.formats import to_onnx
from gecko_jax.inference import embedding

TEXTS = ["one", "most geckos  eat insects", "café 漢字", "long words " * 90]


def _run(folder, texts, prefix):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    tokenizer.enable_truncation(200)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch([prefix + text for text in texts])
    session = onnxruntime.InferenceSession(folder / to_onnx.MODEL)
    (vectors,) = session.run(
        ["sentence_embedding"],
        {
            "input_ids": np.array([e.ids for e in encoded]),
            "attention_mask": np.array([e.attention_mask for e in encoded]),
        },
    )
    return vectors


def _with_config(files, config):
    params = random_params.random_params(config, 1)
    return dataclasses.replace(files, encoder_config=config, params=params)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp_activations": ("relu",), "l2_epsilon": 1e-6},
        {
            "mlp_activations": ("silu", "linear"),
            "shared_relative_bias": False,
            "projection": False,
            "relpos_num_buckets": 16,
            "relpos_max_distance": 20,
        },
    ],
)
def test_ragged_batches_of_any_length_get_our_vectors(tiny_files, tmp_path, changes):
    config = dataclasses.replace(tiny_files.encoder_config, **changes)
    files = _with_config(tiny_files, config)
    to_onnx.save(tmp_path / "m", files, dim=8)
    onnx.checker.check_model(tmp_path / "m" / to_onnx.MODEL, full_check=True)
    ours = embedding.Gecko(files).encode_passages(TEXTS, dim=8)
    for texts in (TEXTS, TEXTS[:1], TEXTS[1:3]):
        found = _run(tmp_path / "m", texts, "title: none | text: ")
        assert found.shape == (len(texts), 8)
        assert found.dtype == np.float32
        expected = ours[[TEXTS.index(text) for text in texts]]
        assert np.sum(found * expected, axis=1).min() >= 0.99999
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_default_dim_is_the_largest(tiny_files, tmp_path):
    to_onnx.save(tmp_path / "m", tiny_files)
    assert _run(tmp_path / "m", TEXTS[:1], "").shape == (1, 16)


def test_large_weights_are_in_a_separate_file(tiny_files, tmp_path, monkeypatch):
    to_onnx.save(tmp_path / "small", tiny_files)
    monkeypatch.setattr(to_onnx, "_INLINE_BYTES", 1_000)
    to_onnx.save(tmp_path / "large", tiny_files)
    assert (tmp_path / "large" / "model.onnx_data").stat().st_size > 500_000
    np.testing.assert_array_equal(
        _run(tmp_path / "large", TEXTS, ""), _run(tmp_path / "small", TEXTS, "")
    )


def test_an_earlier_export_is_replaced_unless_it_holds_more(tiny_files, tmp_path):
    to_onnx.save(tmp_path, tiny_files, dim=4)
    to_onnx.save(tmp_path, tiny_files, dim=8)
    assert _run(tmp_path, TEXTS[:1], "").shape == (1, 8)
    (tmp_path / "model.int8.onnx").write_text("mine")
    with pytest.raises(ValueError, match=r"also holds model\.int8\.onnx, which"):
        to_onnx.save(tmp_path, tiny_files)
    assert (tmp_path / "model.int8.onnx").read_text() == "mine"


def test_a_folder_of_something_else_is_not_overwritten(tiny_files, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not an earlier export"):
        to_onnx.save(tmp_path, tiny_files)
    assert (tmp_path / "thesis.txt").exists()
