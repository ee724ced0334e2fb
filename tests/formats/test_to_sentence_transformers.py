"""An export, opened by sentence-transformers itself, gives our embeddings."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import random_params

from gecko_jax.formats import (
    model_card,
    model_folder,
    names,
    parameters,
    to_sentence_transformers,
)
from gecko_jax.inference import embedding
from gecko_jax.text import text_formats

QUERIES = ["what  do geckos\neat", "café </s> <pad>", "漢字 👨‍👩‍👧 ①½", "e\u0301 x"]
PASSAGES = ["Most geckos eat insects.", " two\t spaces ", "long " * 300]


@pytest.fixture(scope="module")
def scaled_files(tiny_files):
    """Larger parameters: a freshly initialized model is nearly a bag of words."""
    params = jax.tree.map(lambda leaf: leaf * 1.7, tiny_files.params)
    return dataclasses.replace(tiny_files, params=params)


@pytest.fixture(scope="module")
def folder(scaled_files, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model"
    to_sentence_transformers.save(path, scaled_files)
    return path


def _read(folder, name):
    return json.loads((folder / name).read_text())


def _cosines(a, b):
    return np.sum(embedding.cut(a, a.shape[1]) * embedding.cut(b, b.shape[1]), axis=1)


@pytest.fixture(scope="module")
def opened(folder):
    import sentence_transformers

    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


@pytest.mark.torch
@pytest.mark.parametrize("task", ["docs", "sts", "query"])
def test_queries_get_our_vectors_by_the_name_of_the_task(opened, scaled_files, task):
    gecko = embedding.Gecko(scaled_files)
    ours = gecko.encode_queries(QUERIES, "search result" if task == "query" else task)
    theirs = opened.encode(QUERIES, prompt_name=task)
    assert theirs.dtype == np.float32
    assert _cosines(ours, theirs).min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-5)
    # The prompt matters; otherwise this test would prove nothing.
    assert _cosines(ours, opened.encode(QUERIES, prompt="")).min() < 0.999


@pytest.mark.torch
def test_passages_get_our_vectors(opened, scaled_files):
    gecko = embedding.Gecko(scaled_files)
    ours = gecko.encode_passages(PASSAGES)
    for theirs in (
        opened.encode(PASSAGES, prompt_name="document"),
        opened.encode(PASSAGES),
        opened.encode_document(PASSAGES),
    ):
        assert _cosines(ours, theirs).min() >= 0.99999
    symmetric = gecko.encode(PASSAGES, side="passage", task="sts")
    theirs = opened.encode(PASSAGES, prompt_name="sts")
    assert _cosines(symmetric, theirs).min() >= 0.99999
    titled = gecko.encode_passages(PASSAGES, ["A", "B | C", "D"])
    written = [
        f"title: {title} | text: {passage}"
        for title, passage in zip(["A", "B | C", "D"], PASSAGES, strict=True)
    ]
    assert _cosines(titled, opened.encode(written, prompt="")).min() >= 0.99999


@pytest.mark.torch
def test_a_long_query_needs_the_length_of_queries(opened, scaled_files):
    gecko = embedding.Gecko(scaled_files)
    queries = ["long words of all kinds " * 40]
    ours = gecko.encode_queries(queries, "docs")
    assert _cosines(ours, opened.encode(queries, prompt_name="docs")) < 0.9999
    opened.max_seq_length = scaled_files.query_length
    try:
        theirs = opened.encode(queries, prompt_name="docs")
    finally:
        opened.max_seq_length = scaled_files.passage_length
    assert _cosines(ours, theirs) >= 0.99999


@pytest.mark.torch
def test_each_dim_gets_our_vectors(scaled_files, tmp_path):
    import sentence_transformers

    gecko = embedding.Gecko(scaled_files)
    to_sentence_transformers.save(tmp_path / "m", scaled_files, truncate_dim=8)
    for dim, given in ((8, None), (4, 4), (16, 16)):
        opened = sentence_transformers.SentenceTransformer(
            str(tmp_path / "m"), device="cpu", truncate_dim=given
        )
        ours = gecko.encode_queries(QUERIES, "docs", dim=dim)
        theirs = opened.encode(QUERIES, prompt_name="docs", normalize_embeddings=True)
        assert theirs.shape == (len(QUERIES), dim)
        np.testing.assert_allclose(theirs, ours, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_activations": ("relu",)},
        {"mlp_activations": ("silu", "linear")},
        {"mlp_activations": ("gelu",)},
        {"shared_relative_bias": False, "projection": False},
        {"l2_epsilon": 1e-6, "relpos_num_buckets": 16, "relpos_max_distance": 40},
    ],
)
def test_every_kind_of_encoder_keeps_its_vectors(tiny_files, tmp_path, changes):
    import sentence_transformers

    config = dataclasses.replace(tiny_files.encoder_config, **changes)
    files = dataclasses.replace(
        tiny_files,
        encoder_config=config,
        params=random_params.random_params(config, 1),
    )
    to_sentence_transformers.save(tmp_path / "m", files)
    opened = sentence_transformers.SentenceTransformer(
        str(tmp_path / "m"), device="cpu"
    )
    ours = embedding.Gecko(files).encode_passages(PASSAGES)
    assert _cosines(ours, opened.encode(PASSAGES)).min() >= 0.99999


def test_parameters_are_stored_once_and_transposed(folder, scaled_files):
    import safetensors.numpy

    found = safetensors.numpy.load_file(folder / "model.safetensors")
    dense = safetensors.numpy.load_file(folder / "2_Dense" / "model.safetensors")
    params = parameters.flatten(scaled_files.params)
    table = names.hugging_face_names(scaled_files.encoder_config)
    assert found.keys() == {there.name for there in table.values()}
    for name, there in table.items():
        back = found[there.name].T if there.transposed else found[there.name]
        np.testing.assert_array_equal(back, params[name])
    np.testing.assert_array_equal(dense[names.DENSE_WEIGHT].T, params[names.PROJECTION])
    assert len(list(folder.rglob("*.safetensors"))) == 2


def test_our_settings_are_stored(folder, scaled_files):
    settings = model_folder.load_settings(folder)
    for field in dataclasses.fields(settings):
        if field.name != "params":
            assert getattr(settings, field.name) == getattr(scaled_files, field.name)


def test_the_settings_say_what_the_model_was_trained_with(folder):
    settings = _read(folder, "config_sentence_transformers.json")
    assert settings["prompts"] == {
        "docs": "task: search result | query: ",
        "sts": "task: semantic similarity | query: ",
        "query": "task: search result | query: ",
        "document": "title: none | text: ",
    }
    assert settings["default_prompt_name"] == "document"
    assert settings["similarity_fn_name"] == "cosine"
    assert "truncate_dim" not in settings
    assert _read(folder, "sentence_bert_config.json")["max_seq_length"] == 200
    assert _read(folder, "tokenizer_config.json")["model_max_length"] == 200
    kinds = [module["type"] for module in _read(folder, "modules.json")]
    assert [kind.split(".")[-1] for kind in kinds] == [
        "Transformer",
        "Pooling",
        "Dense",
        "Normalize",
    ]


def test_the_card_says_what_must_be_known(scaled_files, tmp_path):
    files = dataclasses.replace(
        scaled_files,
        provenance={
            "tasks": {"docs": {"licence": "CC0", "num_examples": 1_374}},
            "config": {"loss": {"temperature": 0.05}},
            "started_from": "abc",
        },
    )
    row = {"set": "nfcorpus", "system": "model", "dim": 8, "task": "all", "count": 5}
    scores = {"rows": [row | {"metrics": {"ndcg_at_10": 0.4321}}], "about": {}}
    to_sentence_transformers.save(tmp_path / "m", files, truncate_dim=8, scores=scores)
    card = (tmp_path / "m" / "README.md").read_text()
    for fact in (
        "library_name: sentence-transformers",
        "| docs | 1,374 | CC0 |",
        "`temperature=0.05`",
        "| model | 8 | 0.432 |",
        "4, 8, 16",
        "`task: search result \\| query: `",
        "`title: TITLE | text: TEXT`",
        "Texts are cut to 200 tokens",
        "vectors have 8 entries",
    ):
        assert fact in card, fact


@pytest.mark.torch
def test_the_entry_for_mteb_is_valid(scaled_files):
    from mteb.models import model_meta

    imported = {"imported": {"source": "google/t5-v1_1-base", "format": "T5X"}}
    files = dataclasses.replace(scaled_files, provenance=imported)
    values = {}
    exec(model_card.mteb_meta(files, "my-lab/my-gecko"), values)
    meta = values["model"]
    assert isinstance(meta, model_meta.ModelMeta)
    assert (meta.name, meta.adapted_from) == ("my-lab/my-gecko", "google/t5-v1_1-base")
    leaves = jax.tree.leaves(files.params)
    assert meta.n_parameters == sum(leaf.size for leaf in leaves)
    assert meta.n_embedding_parameters == 8_064 * 16
    assert (meta.embed_dim, meta.max_tokens) == ([16, 8, 4], 200)
    assert meta.use_instructions


def test_a_format_that_writes_after_the_text_is_refused(tiny_files, tmp_path):
    files = dataclasses.replace(
        tiny_files, text_format=text_formats.TextFormat(passage="{text} ({title})")
    )
    with pytest.raises(ValueError, match="only write before a text"):
        to_sentence_transformers.save(tmp_path / "m", files)
    assert not (tmp_path / "m").exists()


def test_an_encoder_that_is_no_t5_is_refused(tiny_files, tmp_path):
    config = dataclasses.replace(
        tiny_files.encoder_config, mlp_activations=("linear", "gelu")
    )
    files = dataclasses.replace(tiny_files, encoder_config=config)
    with pytest.raises(ValueError, match=r"mlp_activations.*--to=t5x"):
        to_sentence_transformers.save(tmp_path / "m", files)


def test_a_folder_of_something_else_is_not_overwritten(tiny_files, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"not an earlier export.*choose another"):
        to_sentence_transformers.save(tmp_path, tiny_files)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_earlier_export_is_replaced_unless_it_holds_more(scaled_files, tmp_path):
    to_sentence_transformers.save(tmp_path, scaled_files)
    # An encoder without a projection has fewer files.
    config = dataclasses.replace(
        scaled_files.encoder_config, projection=False, embedding_dim=16
    )
    flat = parameters.flatten(scaled_files.params)
    flat.pop(names.PROJECTION)
    plain = dataclasses.replace(
        scaled_files, encoder_config=config, params=parameters.unflatten(flat)
    )
    to_sentence_transformers.save(tmp_path, plain)
    assert not (tmp_path / "2_Dense").exists()
    for added in ("notes.txt", "1_Pooling/notes.txt", "eval/scores.csv"):
        (tmp_path / added).parent.mkdir(exist_ok=True)
        (tmp_path / added).write_text("mine")
        with pytest.raises(ValueError, match=rf"also holds {added}, which would be"):
            to_sentence_transformers.save(tmp_path, scaled_files)
        assert (tmp_path / added).read_text() == "mine"
        (tmp_path / added).unlink()
    to_sentence_transformers.save(tmp_path, scaled_files)
    assert (tmp_path / "2_Dense").exists()


def test_a_model_of_others_is_not_overwritten(scaled_files, tmp_path):
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ValueError, match=r"no gecko\.json"):
        to_sentence_transformers.save(tmp_path, scaled_files)
    assert (tmp_path / "modules.json").read_text() == "[]"
