"""Folders of the newer families: the same vectors, in and out."""

import dataclasses
import json
import shutil

import family_folders
import numpy as np
import pytest
import safetensors.numpy

import gecko_jax
from gecko_jax.formats import (
    detection,
    model_folder,
    names,
    parameters,
    to_sentence_transformers,
)
from gecko_jax.inference import embedding

pytestmark = pytest.mark.torch

PUBLISHED = ("gemma", "embeddinggemma2", "qwen3")
TEXTS = family_folders.TEXTS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A sentence-transformers folder of each published family, and its model."""
    root = tmp_path_factory.mktemp("families")
    return {
        family: (
            root / family,
            family_folders.write_sentence_transformers(root / family, family),
        )
        for family in PUBLISHED
    }


@pytest.fixture(scope="module")
def t5gemma2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5gemma2") / "plain"
    return folder, family_folders.write_hugging_face(folder, "t5gemma2")


def _open_theirs(folder, **settings):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", **settings)


def _load_tensors(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


def _assert_same(ours, theirs, *, least=0.999999):
    cosines = np.sum(ours * theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosines.min() >= least
    # Otherwise, all texts might have one vector.
    assert np.abs(ours @ ours.T - np.eye(len(ours))).max() < 0.999


def _assert_same_model(ours, theirs, family, **limits):
    prompts = theirs.prompts
    for prompt, task in family_folders.TASKS.items():
        if prompt in prompts:
            found = ours.encode_queries(TEXTS, task)
            _assert_same(found, theirs.encode(TEXTS, prompt_name=prompt), **limits)
    found = ours.encode_passages(TEXTS)
    _assert_same(found, theirs.encode_document(TEXTS), **limits)
    queries = ours.encode_queries(TEXTS)
    _assert_same(queries, theirs.encode_query(TEXTS), **limits)
    if prompts["query"]:
        # The prompts matter; otherwise this test would prove nothing.
        assert np.sum(found * queries, axis=1).min() < 0.999


@pytest.mark.parametrize("family", PUBLISHED)
def test_an_import_has_the_vectors_of_sentence_transformers(folders, family):
    folder, theirs = folders[family]
    ours = gecko_jax.load(folder)
    assert ours.files.encoder_config.family == family
    assert ours.files.query_length == 64
    _assert_same_model(ours, theirs, family)


@pytest.mark.parametrize("family", PUBLISHED)
def test_an_export_has_our_vectors_and_the_imported_weights(folders, family, tmp_path):
    folder, _ = folders[family]
    model_folder.save_model(tmp_path / "ours", detection.open_model(folder))
    ours = gecko_jax.load(tmp_path / "ours")
    files = model_folder.open_model(tmp_path / "ours")
    to_sentence_transformers.save(tmp_path / "st", files)
    theirs = _open_theirs(tmp_path / "st")
    _assert_same_model(ours, theirs, family, least=0.99999)
    assert (
        theirs.prompts.items()
        >= json.loads((folder / "config_sentence_transformers.json").read_text())[
            "prompts"
        ].items()
    )
    first, last = _load_tensors(folder), _load_tensors(tmp_path / "st")
    assert first.keys() == last.keys()
    for name, tensor in first.items():
        assert tensor.tobytes() == last[name].tobytes(), name
    # The export is a source again, by our settings and by those of the format.
    again = gecko_jax.load(tmp_path / "st")
    np.testing.assert_array_equal(
        again.encode_queries(TEXTS), ours.encode_queries(TEXTS)
    )
    (tmp_path / "st" / "gecko.json").unlink()
    other = gecko_jax.load(tmp_path / "st")
    np.testing.assert_allclose(
        other.encode_queries(TEXTS), ours.encode_queries(TEXTS), atol=1e-6
    )


def test_two_dense_layers_become_one_projection(folders, tmp_path):
    folder, _ = folders["gemma"]
    read = model_folder.read_params(detection.open_model(folder))
    first = _load_tensors(folder / "2_Dense")[names.DENSE_WEIGHT].astype(np.float64)
    second = _load_tensors(folder / "3_Dense")[names.DENSE_WEIGHT].astype(np.float64)
    kernel = parameters.flatten(read.params)[names.PROJECTION]
    assert kernel.dtype == np.float32
    assert kernel.shape == (32, 28)
    np.testing.assert_array_equal(kernel, (second @ first).T.astype(np.float32))
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "3_Dense" / "model.safetensors"
    weights = {names.DENSE_WEIGHT: np.full(second.shape, np.nan, np.float32)}
    safetensors.numpy.save_file(weights, path)
    with pytest.raises(ValueError, match=r"2_Dense.* times .*3_Dense"):
        model_folder.read_params(detection.open_model(copy))
    shutil.copytree(copy / "2_Dense", copy / "3_Dense", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"3_Dense: reads vectors of 32 entries.* 64"):
        detection.open_model(copy)


@pytest.mark.parametrize("family", PUBLISHED)
def test_an_export_is_cut_to_a_dim(folders, family, tmp_path):
    folder, _ = folders[family]
    config = json.loads((folder / "config.json").read_text())
    files = model_folder.read_params(detection.open_model(folder))
    files = dataclasses.replace(files, mrl_dims=(8, files.mrl_dims[0]))
    to_sentence_transformers.save(tmp_path / "st", files, truncate_dim=8)
    theirs = _open_theirs(tmp_path / "st")
    ours = embedding.Gecko(files)
    found = theirs.encode_query(TEXTS, normalize_embeddings=True)
    assert found.shape == (len(TEXTS), 8)
    _assert_same(ours.encode_queries(TEXTS, dim=8), found, least=0.99999)
    written = json.loads((tmp_path / "st" / "config.json").read_text())
    assert written["matryoshka_dimensions"] == sorted(files.mrl_dims)
    for key in ("model_type", "hidden_size", "layer_types", "sliding_window"):
        if config.get(key) is not None:
            assert written[key] == config[key], key


def test_t5gemma2_is_its_text_encoder(t5gemma2, tmp_path):
    import torch
    import transformers

    folder, model = t5gemma2
    ours = gecko_jax.load(folder)
    config = ours.files.encoder_config
    assert (config.local_window, config.rope_factor) == ((3, 4), 8.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = []
    for content in TEXTS:
        batch = tokenizer([content], return_tensors="pt")
        with torch.no_grad():
            hidden = model.model.encoder(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            )
        expected.append(hidden.last_hidden_state.mean(1)[0].numpy())
    _assert_same(ours.encode_passages(TEXTS), np.stack(expected))
    to_sentence_transformers.save(tmp_path / "st", ours.files)
    theirs = _open_theirs(tmp_path / "st")
    found = theirs.encode(TEXTS)
    _assert_same(ours.encode_passages(TEXTS), found, least=0.99999)
    first = {
        name.removeprefix("model.encoder."): tensor
        for name, tensor in _load_tensors(folder).items()
        if name.startswith(("model.encoder.layers", "model.encoder.norm"))
        or name == "model.encoder.embed_tokens.weight"
    }
    last = _load_tensors(tmp_path / "st")
    assert len(first) == 3 * 13 + 2
    for name, tensor in first.items():
        assert tensor.tobytes() == last[name].tobytes(), name
    again = gecko_jax.load(tmp_path / "st")
    np.testing.assert_array_equal(
        again.encode_passages(TEXTS), ours.encode_passages(TEXTS)
    )


def test_embeddinggemma2_without_its_towers(tmp_path):
    import transformers

    text = family_folders.build("embeddinggemma2")
    whole = transformers.EmbeddingGemma2Model(
        transformers.EmbeddingGemma2Config(
            text_config=text.config.to_dict(), vision_config=None, audio_config=None
        )
    )
    whole.language_model.load_state_dict(text.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    tensors = _load_tensors(tmp_path / "whole")
    tensors["vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
    tensors["embed_audio.embedding_projection.weight"] = np.zeros((2, 2), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "whole" / "model.safetensors")
    family_folders.write_hugging_face(tmp_path / "text", "embeddinggemma2")
    family_folders.write_tokenizer(tmp_path / "whole", "embeddinggemma2")
    for ours, theirs in zip(
        *(
            sorted(
                parameters.flatten(gecko_jax.load(tmp_path / n).files.params).items()
            )
            for n in ("whole", "text")
        ),
        strict=True,
    ):
        assert ours[0] == theirs[0]
        np.testing.assert_array_equal(ours[1], theirs[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_in_half_precision_are_read(folders, tmp_path, dtype):
    import torch

    model = family_folders.build("gemma").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "half", max_shard_size="40KB")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 2
    family_folders.write_tokenizer(tmp_path / "half", "gemma")
    read = model_folder.read_params(detection.open_model(tmp_path / "half"))
    flat = parameters.flatten(read.params)
    state = {name: value.float().numpy() for name, value in model.state_dict().items()}
    name = "encoder/layers_2/attention/query/kernel"
    np.testing.assert_array_equal(
        flat[name].T, state["layers.2.self_attn.q_proj.weight"]
    )
    assert all(leaf.dtype == np.float32 for leaf in flat.values())


def test_missing_and_unexpected_tensors_are_listed_together(folders, tmp_path):
    folder, _ = folders["gemma"]
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = _load_tensors(copy)
    tensors["layers.0.self_attn.sinks"] = tensors.pop(
        "layers.1.self_attn.k_norm.weight"
    )
    tensors["norm.weight"] = np.zeros(8, np.float32)
    safetensors.numpy.save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit the model") as error:
        detection.open_model(copy)
    for fault in (
        "missing encoder/layers_1/attention/key_norm/scale (16,)",
        "unexpected layers.0.self_attn.sinks (16,)",
        "wrong shape encoder/encoder_norm/scale: (8,), needs (32,)",
    ):
        assert fault in str(error.value)


@pytest.mark.parametrize("family", ["gemma", "qwen3"])
def test_a_vocabulary_of_another_model_is_refused(folders, tmp_path, family):
    folder, _ = folders[family]
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    tensors = _load_tensors(copy)
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"][:400]
    safetensors.numpy.save_file(tensors, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    with pytest.raises(ValueError, match="the embedding table 400 rows"):
        detection.open_model(copy)


def test_a_parameter_under_two_names_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["gemma"][0], tmp_path / "copy")
    (path,) = folder.glob("model*.safetensors")
    weights = safetensors.numpy.load_file(path)
    name = next(
        name for name in weights if name.endswith("layers.0.mlp.up_proj.weight")
    )
    prefix = "model."
    other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
    safetensors.numpy.save_file(weights | {other: 3 * weights[name]}, path)
    with pytest.raises(ValueError, match="are the same parameter; keep the one"):
        detection.open_model(folder)
