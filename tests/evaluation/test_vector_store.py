import dataclasses

import numpy as np
import pytest

from gecko_jax.evaluation import vector_store
from gecko_jax.inference import embedding

TEXTS = [f"text number {n}" for n in range(40)]
SIDE = {"side": "query", "task": "search result", "max_length": 32}


@pytest.fixture
def store(tmp_path, tiny_gecko):
    return vector_store.Store(tmp_path, tiny_gecko, max_gib=1)


def _again(store, gecko, tmp_path):
    return vector_store.Store(tmp_path, gecko, max_gib=1)


def test_vectors_equal_those_of_the_model_and_are_encoded_once(
    store, tiny_gecko, tmp_path
):
    expected = tiny_gecko.encode(TEXTS, **SIDE)
    np.testing.assert_allclose(store.encode(TEXTS, **SIDE), expected, atol=1e-6)
    assert store.num_encoded == len(TEXTS)
    # In another order, with repeated texts and one new text.
    mixed = [TEXTS[3], "new", TEXTS[3], *TEXTS[::-1]]
    found = store.encode(mixed, **SIDE)
    assert store.num_encoded == len(TEXTS) + 1
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_allclose(found[3:], expected[::-1], atol=1e-6)
    opened = _again(store, tiny_gecko, tmp_path)
    assert len(opened) == len(TEXTS) + 1
    np.testing.assert_array_equal(opened.encode(mixed, **SIDE), found)
    assert opened.num_encoded == 0


@pytest.mark.parametrize(
    "change",
    [
        {"task": "fact checking"},
        {"max_length": 16},
        {"side": "passage", "task": None},
        {"side": "passage", "task": None, "titles": ["a title"] * len(TEXTS)},
    ],
)
def test_settings_that_change_the_vector_change_the_key(store, tiny_gecko, change):
    store.encode(TEXTS, **SIDE)
    settings = SIDE | change
    found = store.encode(TEXTS, **settings)
    assert store.num_encoded == 2 * len(TEXTS)
    expected = tiny_gecko.encode(TEXTS, **settings)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_another_revision_has_its_own_vectors(store, tiny_files, tmp_path):
    store.encode(TEXTS, **SIDE)
    other = embedding.Gecko(dataclasses.replace(tiny_files, revision="other/1"))
    assert len(vector_store.Store(tmp_path, other, max_gib=1)) == 0


def test_an_interrupted_run_resumes(store, tiny_gecko, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "TEXTS_PER_CHUNK", 16)
    encode = embedding.Gecko.encode
    calls = []

    def fail_third(self, texts, **settings):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, texts, **settings)

    monkeypatch.setattr(embedding.Gecko, "encode", fail_third)
    with pytest.raises(KeyboardInterrupt):
        store.encode(TEXTS, **SIDE)
    monkeypatch.setattr(embedding.Gecko, "encode", encode)
    opened = _again(store, tiny_gecko, tmp_path)
    assert len(opened) == 32
    opened.encode(TEXTS, **SIDE)
    assert opened.num_encoded == 8


@pytest.mark.parametrize("part", ["keys", "vectors"])
def test_a_damaged_shard_is_encoded_again(store, tiny_gecko, tmp_path, part):
    expected = store.encode(TEXTS, **SIDE)
    (path,) = store.folder.glob(f"*.{part}.npy")
    path.write_bytes(path.read_bytes()[:-100])
    opened = _again(store, tiny_gecko, tmp_path)
    assert len(opened) == 0
    np.testing.assert_allclose(opened.encode(TEXTS, **SIDE), expected, atol=1e-6)
    assert opened.num_encoded == len(TEXTS)


def test_trim_removes_the_least_recently_used_shards(tmp_path, tiny_gecko):
    store = vector_store.Store(tmp_path, tiny_gecko, max_gib=1)
    for start in (0, 10, 20, 30):
        store.encode(TEXTS[start : start + 10], **SIDE)
    store.encode(TEXTS[:10], **SIDE)  # used again
    shards = sorted(store.folder.glob("*.npy"))
    assert len(shards) == 8
    size = sum(path.stat().st_size for path in shards) / 4
    store._max_bytes = int(2.5 * size)
    store.trim()
    left = _again(store, tiny_gecko, tmp_path)
    assert len(left) == 20
    assert len(list(store.folder.iterdir())) == 6
    for opened in (store, left):
        before = opened.num_encoded
        opened.encode(TEXTS[:10] + TEXTS[30:], **SIDE)
        assert opened.num_encoded == before
        opened.encode(TEXTS[10:30], **SIDE)
        assert opened.num_encoded == before + 20
