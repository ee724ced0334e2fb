"""The parts of the encoder that need neither mteb nor torch."""

import dataclasses
import types

import numpy as np
import pytest

from gecko_jax.evaluation import mteb_encoder, vector_store
from gecko_jax.inference import embedding
from gecko_jax.text import text_formats


class Recorder(vector_store.Store):
    """A store that records the requested texts."""

    def __init__(self, gecko):
        self.gecko = gecko
        self.asked = []

    def encode(self, texts, *, max_length, description, **settings):
        formatted = self.gecko.format_texts(texts, **settings)
        self.asked += [(t, max_length) for t in formatted]
        return np.eye(len(texts), 16, dtype=np.float32)


def _task(name, kind, made_from=None):
    return types.SimpleNamespace(name=name, type=kind, adapted_from=made_from)


def _encode(encoder, batches, task, prompt_type=None):
    return encoder.encode(
        batches,
        task_metadata=task,
        hf_split="test",
        hf_subset="default",
        prompt_type=prompt_type,
        batch_size=32,
    )


@pytest.fixture
def recorder(tiny_gecko):
    return Recorder(tiny_gecko)


@pytest.fixture
def encoder(tiny_gecko, recorder):
    return mteb_encoder.Encoder(
        tiny_gecko, recorder, dim=8, name="a/b", query_length=20, passage_length=50
    )


QUERY = types.SimpleNamespace(value="query")
DOCUMENT = types.SimpleNamespace(value="document")
CORPUS = [{"text": ["Title body"], "title": ["Title"], "body": ["body"]}]


def test_both_sides_of_retrieval(encoder, recorder):
    task = _task("SciFact", "Retrieval")
    _encode(encoder, [{"text": ["one"]}, {"text": ["two"]}], task, QUERY)
    _encode(encoder, CORPUS, task, DOCUMENT)
    _encode(encoder, [{"text": ["no title"], "body": ["no title"]}], task, DOCUMENT)
    assert recorder.asked == [
        ("task: fact checking | query: one", 20),
        ("task: fact checking | query: two", 20),
        ("title: Title | text: body", 50),
        ("title: none | text: no title", 50),
    ]


def test_both_sides_of_a_symmetric_task_are_queries(encoder, recorder):
    task = _task("QuoraRetrieval", "Retrieval")
    _encode(encoder, [{"text": ["one"]}], task, QUERY)
    _encode(encoder, CORPUS, task, DOCUMENT)
    _encode(encoder, [{"text": ["pair"]}], _task("STS12", "STS"))
    assert recorder.asked == [
        ("task: search result | query: one", 50),
        ("task: search result | query: Title body", 50),
        ("task: semantic similarity | query: pair", 50),
    ]


def test_a_variant_has_the_instruction_of_its_original(encoder, recorder):
    task = _task("FEVERHardNegatives", "Retrieval", ["FEVER"])
    _encode(encoder, [{"text": ["q"]}], task, QUERY)
    assert recorder.asked == [("task: search result | query: q", 20)]


def test_a_local_task_names_the_task_of_every_text(encoder, recorder):
    own = mteb_encoder.TASK_COLUMN
    batch = {"text": ["a", "b", "c"], own: ["docs", "code search", "docs"]}
    vectors = _encode(encoder, [batch], _task("mine", "Retrieval"), QUERY)
    _encode(encoder, [CORPUS[0] | {own: ["sts"]}], _task("mine", "Retrieval"), DOCUMENT)
    assert recorder.asked == [
        ("task: search result | query: a", 20),
        ("task: code search | query: b", 20),
        ("task: search result | query: c", 20),
        ("task: semantic similarity | query: Title body", 50),
    ]
    assert vectors.argmax(axis=1).tolist() == [0, 1, 2]


def test_empty_and_overlong_texts_do_not_stop_a_run(encoder, recorder):
    task = _task("X", "Retrieval")
    corpus = {"text": [" ", "T"], "title": ["", "T"], "body": [" ", ""]}
    _encode(encoder, [corpus], task, DOCUMENT)
    _encode(
        encoder, [{"text": ["", "x" * (text_formats.MAX_CHARACTERS + 1)]}], task, QUERY
    )
    formatted = [asked for asked, _ in recorder.asked]
    assert formatted[:3] == [
        "title: none | text: none",
        "title: T | text: T",
        "task: search result | query: none",
    ]
    assert len(formatted[3]) < text_formats.MAX_CHARACTERS


def test_an_empty_text_is_encoded_alike_in_all_formats(tiny_files):
    # An imported model has no placeholder for a missing title.
    plain = text_formats.TextFormat(query="{text}", passage="{text}", no_title="")
    gecko = embedding.Gecko(dataclasses.replace(tiny_files, text_format=plain))
    recorder = Recorder(gecko)
    encoder = mteb_encoder.Encoder(
        gecko, recorder, dim=8, name="a/b", query_length=20, passage_length=50
    )
    _encode(encoder, [{"text": ["", " "]}], _task("STS12", "STS"))
    corpus = {"text": [" "], "title": [""], "body": [" "]}
    _encode(encoder, [corpus], _task("X", "Retrieval"), DOCUMENT)
    assert [asked for asked, _ in recorder.asked] == ["none"] * 3


def test_equal_vectors_have_equal_cosines(encoder):
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(37, 8)).astype(np.float32)
    passages = rng.normal(size=(101, 8)).astype(np.float32)
    passages[51:] = passages[:50]
    cosines = encoder.similarity(queries, passages)
    np.testing.assert_allclose(cosines, queries @ passages.T, atol=1e-6)
    np.testing.assert_array_equal(cosines[:, 51:], cosines[:, :50])
    # mteb's summarization compares single vectors.
    single = encoder.similarity(queries[0], passages)
    np.testing.assert_allclose(single, cosines[0], atol=1e-5)
    single = encoder.similarity(queries[0], passages[0])
    assert single == pytest.approx(cosines[0, 0], abs=1e-5)


def test_vectors_are_truncated_and_similarities_are_cosines(tiny_gecko, tmp_path):
    vectors = vector_store.Store(tmp_path, tiny_gecko, max_gib=1)
    small, large = (
        mteb_encoder.Encoder(
            tiny_gecko,
            vectors,
            dim=dim,
            name="a/b",
            query_length=64,
            passage_length=200,
        )
        for dim in (8, 16)
    )
    texts = ["a list", "a table", "a file of strings"]
    batches = [{"text": texts[:2]}, {"text": texts[2:]}]
    task = _task("SciFact", "Retrieval")
    found = {e.dim: _encode(e, batches, task, QUERY) for e in (large, small)}
    assert vectors.num_encoded == 3  # once for both dims
    for dim, got in found.items():
        expected = tiny_gecko.encode_queries(texts, "fact checking", dim=dim)
        np.testing.assert_allclose(got, expected, atol=1e-6)
    cosines = small.similarity(found[8], found[8][:2])
    assert cosines.shape == (3, 2)
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-6)
    pairwise = small.similarity_pairwise(found[8][:2], found[8][1:])
    np.testing.assert_allclose(pairwise, [cosines[1, 0], cosines[2, 1]], atol=1e-6)


def test_no_texts_give_no_vectors(tiny_gecko, tmp_path):
    encoder = mteb_encoder.Encoder(
        tiny_gecko,
        vector_store.Store(tmp_path, tiny_gecko, max_gib=1),
        dim=8,
        name="a/b",
        query_length=64,
        passage_length=64,
    )
    for side in (QUERY, DOCUMENT):
        assert _encode(encoder, [], _task("X", "Retrieval"), side).shape == (0, 8)
