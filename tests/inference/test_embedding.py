import dataclasses
import functools
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples

from gecko_jax.formats import model_folder
from gecko_jax.inference import embedding
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import sharding
from gecko_jax.text import vocabularies


@pytest.fixture(scope="module")
def texts():
    words = ["the", "index", "of", "a", "table", "rows", "that", "sort", "key"]
    rng = random.Random(0)
    return [" ".join(rng.choices(words, k=rng.randint(1, 90))) for _ in range(60)]


@functools.cache
def _encoder(config):
    def encode(params, tokens):
        segment_ids = (tokens > 0).astype(jnp.int32)
        projected = dual_encoder.DualEncoder(config).apply(
            {"params": params}, tokens, segment_ids
        )
        return dual_encoder.normalize(projected[0, 0][..., : config.embedding_dim])

    return jax.jit(encode)


def _alone(files, formatted, max_length):
    """Encodes one text in one row; the model truncates and normalizes."""
    vocab = vocabularies.Vocabulary(files.vocabulary_proto, files.extra_ids)
    (ids,) = vocab.encode([formatted], max_length)
    tokens = np.zeros((1, 200), np.int32)
    tokens[0, : len(ids)] = ids
    return _encoder(files.encoder_config)(files.params, tokens)


def test_packing_does_not_change_vectors(tiny_files, tiny_gecko, texts):
    vectors = tiny_gecko.encode_passages(texts)
    assert vectors.dtype == np.float32
    for position in (0, 1, 7, 30, 59):
        formatted = f"title: none | text: {texts[position]}"
        expected = _alone(tiny_files, formatted, tiny_files.passage_length)
        np.testing.assert_allclose(vectors[position], expected, atol=1e-5)


def test_batch_order_and_chunk_size_do_not_change_vectors(
    tiny_gecko, texts, monkeypatch
):
    whole = tiny_gecko.encode_passages(texts)
    np.testing.assert_allclose(
        tiny_gecko.encode_passages(texts[::-1])[::-1], whole, atol=1e-5
    )
    np.testing.assert_allclose(
        tiny_gecko.encode_passages(texts[5:6]), whole[5:6], atol=1e-5
    )
    monkeypatch.setattr(embedding, "TEXTS_PER_CHUNK", 17)
    np.testing.assert_allclose(tiny_gecko.encode_passages(texts), whole, atol=1e-5)


def test_equal_texts_have_equal_vectors(tiny_gecko, texts, monkeypatch):
    # Other row widths and chunk sizes.
    monkeypatch.setattr(embedding, "TEXTS_PER_CHUNK", 7)
    twice = [*texts, "a  table", *texts[::-1], "a table"]
    encoded = []
    project = embedding.Gecko._project

    def count(self, tokens):
        encoded.extend(tokens)
        return project(self, tokens)

    monkeypatch.setattr(embedding.Gecko, "_project", count)
    vectors = tiny_gecko.encode_passages(twice)
    assert len(encoded) == len(set(texts)) + 1
    np.testing.assert_array_equal(vectors[:60], vectors[61:-1][::-1])
    np.testing.assert_array_equal(vectors[60], vectors[-1])  # one space equals two
    alone = tiny_gecko.encode_passages(texts[:3])
    np.testing.assert_allclose(vectors[:3], alone, atol=1e-5)
    # Texts that are equal after normalization and truncation.
    start = "list sort " * 300
    cut = tiny_gecko.encode_passages([start, f"{start} more"])
    np.testing.assert_array_equal(cut[0], cut[1])


def test_progress_counts_repeated_texts(tiny_gecko, monkeypatch):
    monkeypatch.setattr(embedding, "TEXTS_PER_CHUNK", 2)
    steps = []
    update = embedding.progress.Progress.update

    def record(self, step, text=""):
        steps.append(step)
        update(self, step, text)

    monkeypatch.setattr(embedding.progress.Progress, "update", record)
    tiny_gecko.encode_passages(["a", "b", "a", "b", "c"], description="x")
    assert steps[-1] == 5
    assert steps == sorted(steps)


def test_each_side_has_its_format(tiny_files, tiny_gecko):
    for vectors, formatted in (
        (tiny_gecko.encode_queries(["x"]), "task: search result | query: x"),
        (
            tiny_gecko.encode_queries(["x"], "sts"),
            "task: semantic similarity | query: x",
        ),
        (tiny_gecko.encode_queries(["x"], task="my own"), "task: my own | query: x"),
        (tiny_gecko.encode_passages(["x"]), "title: none | text: x"),
        (tiny_gecko.encode_passages(["x"], ["T"]), "title: T | text: x"),
        (tiny_gecko.encode_passages(["x"], [None]), "title: none | text: x"),
        (
            tiny_gecko.encode(["x"], side="passage", task="sts"),
            "task: semantic similarity | query: x",
        ),
        (
            tiny_gecko.encode(["x"], side="passage", task="docs"),
            "title: none | text: x",
        ),
    ):
        expected = _alone(tiny_files, formatted, 64)
        np.testing.assert_allclose(vectors[0], expected, atol=1e-5)


def test_long_texts_are_cut_to_the_trained_or_given_length(tiny_files, tiny_gecko):
    long = "list sort " * 300
    for vectors, formatted, length in (
        (tiny_gecko.encode_queries([long]), f"task: search result | query: {long}", 64),
        (tiny_gecko.encode_passages([long]), f"title: none | text: {long}", 200),
        (
            tiny_gecko.encode([long], side="passage", max_length=20),
            f"title: none | text: {long}",
            20,
        ),
    ):
        expected = _alone(tiny_files, formatted.strip(), length)
        np.testing.assert_allclose(vectors[0], expected, atol=1e-5)


def test_a_smaller_dim_is_a_normalized_prefix(tiny_gecko, texts):
    full = tiny_gecko.encode_passages(texts[:4])
    assert full.shape == (4, 16)
    small = tiny_gecko.encode_passages(texts[:4], dim=4)
    np.testing.assert_allclose(np.linalg.norm(small, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embedding.cut(full, 4), small, atol=1e-6)
    np.testing.assert_allclose(
        dual_encoder.normalize(jnp.asarray(full)[..., :4]), small, atol=1e-6
    )


def test_no_texts_give_no_vectors(tiny_gecko):
    assert tiny_gecko.encode_queries([]).shape == (0, 16)


def test_properties_of_the_model(tiny_gecko):
    assert tiny_gecko.dims == (4, 8, 16)
    assert tiny_gecko.embedding_dim == 16
    assert tiny_gecko.revision == "tiny-7"
    assert tiny_gecko.task_descriptions["docs"] == "search result"


@pytest.mark.parametrize("empty", ["", " \n\t"])
def test_the_error_for_an_empty_text_names_its_index(tiny_gecko, empty):
    with pytest.raises(ValueError, match=r"texts\[1\]: text .* is empty"):
        tiny_gecko.encode_queries(["fine", empty])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 5}, r"dim=5: .* not trained for it; choose one of 4, 8, 16"),
        ({"dim": 32}, r"choose one of 4, 8, 16"),
        ({"titles": ["a", "b"]}, r"2 titles for 1 texts"),
        ({"titles": ["a"], "side": "query"}, r"titles for passages only"),
        ({"max_length": 1}, r"max_length=1"),
    ],
)
def test_wrong_arguments_are_refused(tiny_gecko, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_gecko.encode(["x"], **{"side": "passage", **arguments})


def test_a_single_string_is_refused(tiny_gecko):
    with pytest.raises(ValueError, match="pass a list"):
        tiny_gecko.encode_queries("text")


def test_errors_name_the_position_of_a_value_that_is_not_text(tiny_files, tmp_path):
    """Runs in a new process, in which jaxtyping and beartype do not check types."""
    model_folder.save_model(tmp_path / "model", tiny_files)
    program = """
import sys
import numpy as np
import gecko_jax
from gecko_jax import index
model = gecko_jax.load(sys.argv[1])
for wrong in (
    lambda: model.encode_queries(["a", float("nan")]),
    lambda: model.encode_queries([b"a"]),
    lambda: model.encode_queries(None),
    lambda: model.encode_queries(text for text in "ab"),
    lambda: model.encode_passages(["a", "b"], np.array(["t", 3], object)),
    lambda: index.Index(np.ones((1, 2)), ["a"]).search(np.ones(2), 1),
):
    try:
        print(wrong())
    except ValueError as error:
        print(error)
"""
    found = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "model"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines() == [
        "texts[1] is nan: it must be a string",
        "texts[0] is b'a': it must be a string",
        "texts has type NoneType: pass a list, such as [text]",
        "texts has type generator: pass a list, such as [text]",
        "titles[1] is 3: it must be a string",
        "queries have shape (2,): it must be [queries, dims]",
    ]


def test_a_vocabulary_larger_than_the_model_is_refused(tiny_files):
    config = dataclasses.replace(tiny_files.encoder_config, vocab_size=100)
    with pytest.raises(ValueError, match=r"vocabulary has [\d,]+ ids and .*=100"):
        embedding.Gecko(dataclasses.replace(tiny_files, encoder_config=config))


def test_parameters_on_a_mesh_give_the_same_vectors(tiny_files, tiny_gecko, texts):
    mesh = sharding.build_mesh(data=4, fsdp=2, tensor=1)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(tiny_files.params, whole)
    shared = embedding.Gecko(dataclasses.replace(tiny_files, params=params))
    np.testing.assert_allclose(
        shared.encode_passages(texts), tiny_gecko.encode_passages(texts), atol=1e-5
    )


def test_a_saved_model_gives_the_same_vectors(tmp_path, tiny_files, tiny_gecko, texts):
    model_folder.save_model(tmp_path / "export", tiny_files)
    loaded = embedding.load(tmp_path / "export")
    np.testing.assert_array_equal(
        loaded.encode_passages(texts[:5]), tiny_gecko.encode_passages(texts[:5])
    )
    assert loaded.revision == "tiny-7"


def test_each_query_may_have_its_own_task(tiny_gecko):
    texts, tasks = ["a gecko", "a wall", "a gecko"], ["docs", "sts", "fact checking"]
    together = tiny_gecko.encode_queries(texts, tasks)
    for row, (text, task) in enumerate(zip(texts, tasks, strict=True)):
        (alone,) = tiny_gecko.encode_queries([text], task)
        np.testing.assert_allclose(together[row], alone, atol=1e-5)
    assert np.abs(together[0] - together[2]).max() > 1e-3
    with pytest.raises(ValueError, match="2 tasks for 3 texts"):
        tiny_gecko.encode_queries(texts, tasks[:2])


def test_parameters_are_in_memory_once(tiny_files, tmp_path):
    model_folder.save_model(tmp_path / "model", tiny_files)
    read = samples.load_model(tmp_path / "model")
    for gecko in (embedding.Gecko(read), embedding.load(tmp_path / "model")):
        # The host has no copy in addition to the parameters that encode.
        for leaf in jax.tree.leaves(gecko.files.params):
            assert isinstance(leaf, jax.Array)
            assert leaf.devices() == {jax.local_devices()[0]}
