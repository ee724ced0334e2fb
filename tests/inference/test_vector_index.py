import dataclasses
import errno
import json

import numpy as np
import pytest
import samples

from gecko_jax.inference import embedding, quantization, vector_files, vector_index


def _random(count, dim=6, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def _ids(count):
    return [f"p{i}" for i in range(count)]


def _loop(queries, corpus, k):
    """Returns scores and positions by definition; ties keep the order of passages."""
    scores, positions = [], []
    for query in queries:
        row = [float(np.dot(query, passage)) for passage in corpus]
        order = sorted(range(len(row)), key=lambda p: (-row[p], p))[:k]
        scores.append([row[p] for p in order])
        positions.append(order)
    return np.array(scores), positions


@pytest.mark.parametrize(
    ("block_rows", "k"), [(4, 50), (7, 1), (7, 5), (50, 5), (64, 50)]
)
def test_blockwise_search_equals_the_definition(monkeypatch, block_rows, k):
    monkeypatch.setattr(vector_index, "CPU_BLOCK_ROWS", block_rows)
    monkeypatch.setattr(vector_index, "BLOCK_QUERIES", 3)
    queries, corpus = _random(7, seed=1), _random(50)
    scores, ids = vector_index.Index(corpus, _ids(50)).search(queries, k)
    expected, positions = _loop(queries, corpus, k)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert ids == [[f"p{p}" for p in row] for row in positions]


def test_the_earlier_of_equal_passages_wins_across_blocks(monkeypatch):
    monkeypatch.setattr(vector_index, "CPU_BLOCK_ROWS", 4)
    corpus = np.tile(_random(1), (11, 1))
    _, ids = vector_index.Index(corpus, _ids(11)).search(corpus[:2], 6)
    assert ids == [_ids(6)] * 2


def test_a_small_corpus_gives_fewer_and_negative_scores_count():
    corpus = -np.eye(3, dtype=np.float32)
    scores, ids = vector_index.Index(corpus, _ids(3)).search(
        np.ones((1, 3), np.float32), 10
    )
    assert ids == [["p0", "p1", "p2"]]
    np.testing.assert_allclose(scores, [[-1, -1, -1]])


def test_no_queries_give_nothing():
    scores, ids = vector_index.Index(_random(5), _ids(5)).search(_random(0), 3)
    assert scores.shape == (0, 3)
    assert ids == []


def test_saving_and_loading_changes_nothing(tmp_path):
    built = vector_index.Index(
        _random(5),
        _ids(5),
        titles=["T", "", "", "", ""],
        texts=[f"text é {i}\u2028" for i in range(5)],
        revision="r1",
    )
    built.save(tmp_path / "index")
    loaded = vector_index.load(tmp_path / "index")
    np.testing.assert_array_equal(loaded.codes.values, built.codes.values)
    assert loaded.ids == built.ids
    assert (len(loaded), loaded.dim, loaded.revision) == (5, 6, "r1")
    assert loaded.text("p0") == "T: text é 0\u2028"
    assert loaded.text("p4") == "text é 4\u2028"
    vector_index.Index(_random(2), _ids(2)).save(tmp_path / "index")
    assert len(vector_index.load(tmp_path / "index")) == 2
    assert vector_index.load(tmp_path / "index").text("p1") is None
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vectors": _random(0), "ids": []}, "empty corpus"),
        ({"ids": ["a"]}, "1 ids for 2 vectors"),
        ({"texts": ["a"]}, "1 texts for 2 vectors"),
        ({"ids": ["a", "a"]}, "duplicate id 'a'"),
        ({"vectors": np.array([[1, 2], [1, np.nan]])}, "vector of 'b' is not finite"),
    ],
)
def test_inconsistent_parts_are_refused(arguments, message):
    arguments = {"vectors": _random(2), "ids": ["a", "b"], **arguments}
    with pytest.raises(ValueError, match=message):
        vector_index.Index(**arguments)


def test_queries_of_another_width_and_a_k_of_zero_are_refused():
    built = vector_index.Index(_random(5), _ids(5))
    with pytest.raises(ValueError, match="queries have 4 dims and the index has 6"):
        built.search(_random(2, 4), 3)
    with pytest.raises(ValueError, match="k=0"):
        built.search(_random(2), 0)
    with pytest.raises(ValueError, match="query vector is not finite"):
        built.search(np.full((1, 6), np.nan, np.float32), 3)


def _damage(folder, name, change):
    path = folder / name
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("change", ["gone", "cut"])
@pytest.mark.parametrize("name", ["index.json", "vectors.npy", "passages.jsonl"])
def test_errors_name_a_missing_or_truncated_file(tmp_path, name, change):
    vector_index.Index(_random(5), _ids(5), texts=["text"] * 5).save(tmp_path / "index")
    _damage(tmp_path / "index", name, change)
    with pytest.raises(ValueError, match=name):
        vector_index.load(tmp_path / "index")


EDITS = {
    "index.json": [
        ('"dim": 6', '"dim": "6"', r'index\.json.*dim must be .*, not "6"'),
        ('"dim": 6', '"dim": 0', r"index\.json.*dim must be .*, not 0"),
        ('"revision"', '"version"', r"index\.json.*no revision"),
        ('"float32"', '"float31"', r'index\.json.*must be .*, not "float31"'),
    ],
    "passages.jsonl": [
        ('"p3"', "[3]", r"passages\.jsonl:4: .*_id must be text, not a list"),
        ('"text": "t3"', '"text": 3', r"jsonl:4: .*text must be .*, not 3"),
        ('"p3"', '"p2"', "index: .*duplicate id 'p2'"),
        (', "text": "t3"', "", r"jsonl:4: .*lines before have"),
        ('{"_id": "p3"', '{"_id" "p3"', r"jsonl:4: damaged"),
    ],
    "vectors.npy": [("{'descr'", "{('escr'", r"vectors\.npy: damaged")],
}


@pytest.mark.parametrize(
    ("name", "before", "after", "message"),
    [(name, *case) for name, cases in EDITS.items() for case in cases],
)
def test_errors_name_an_edited_file(tmp_path, name, before, after, message):
    texts = [f"t{i}" for i in range(5)]
    vector_index.Index(_random(5), _ids(5), texts=texts).save(tmp_path / "index")
    path = tmp_path / "index" / name
    content = path.read_bytes()
    assert before.encode() in content
    samples.forget_checksums(tmp_path / "index" / "index.json")
    content = path.read_bytes()
    path.write_bytes(content.replace(before.encode(), after.encode()))
    with pytest.raises(ValueError, match=message) as error:
        vector_index.load(tmp_path / "index")
    assert "build the index again" in str(error.value)


def test_other_folders_are_neither_loaded_nor_overwritten(tmp_path):
    with pytest.raises(ValueError, match="not an index"):
        vector_index.load(tmp_path / "nothing")
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ValueError, match=r"\(no index\.json\); choose another"):
        vector_index.Index(_random(2), _ids(2)).save(tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_full_disk_keeps_the_old_index(tmp_path, monkeypatch):
    vector_index.Index(_random(5), _ids(5)).save(tmp_path / "index")

    def save(*unused):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(OSError, match=r"no disk space left for .*index"):
        vector_index.Index(_random(2), _ids(2)).save(tmp_path / "index")
    assert len(vector_index.load(tmp_path / "index")) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_an_index_from_a_folder_of_vectors(tmp_path, tiny_files, tiny_gecko):
    records = [{"_id": f"p{i}", "text": f"rows sorted by key {i}"} for i in range(9)]
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    vector_files.embed_file(tiny_gecko, source, tmp_path / "v", shard_rows=4, dim=8)
    built = vector_index.from_embeddings(tmp_path / "v")
    built.check_model(tiny_gecko)
    scores, ids = built.search(
        tiny_gecko.encode_passages(["rows sorted by key 3"], dim=8), 2
    )
    assert ids[0][0] == "p3"
    assert scores[0][0] == pytest.approx(1, abs=1e-5)
    assert built.text("p3") == "rows sorted by key 3"

    other = embedding.Gecko(dataclasses.replace(tiny_files, revision="other"))
    with pytest.raises(ValueError, match="built with model revision tiny-7, not other"):
        built.check_model(other)
    fewer = embedding.Gecko(dataclasses.replace(tiny_files, mrl_dims=(16,)))
    with pytest.raises(ValueError, match=r"dim=8: .* not trained"):
        built.check_model(fewer)

    source.write_text('{"_id": "p0", "text": "changed"}\n')
    assert vector_index.from_embeddings(tmp_path / "v").texts is None
    with pytest.raises(ValueError, match="not the file that"):
        vector_index.from_embeddings(tmp_path / "v", source)


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_searching_codes_equals_searching_decoded_vectors(precision, tmp_path):
    rng = np.random.default_rng(3)
    vectors, queries = (
        embedding.cut(rng.normal(size=(n, 20)).astype(np.float32), 20) for n in (50, 4)
    )
    codes = quantization.encode(vectors, precision)
    names = [str(n) for n in range(50)]
    built = vector_index.Index(codes, names)
    scores, ids = built.search(queries, 5)
    expected_scores, expected = vector_index.Index(codes.decode(), names).search(
        queries, 5
    )
    assert ids == expected
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    built.save(tmp_path / "index")
    loaded = vector_index.load(tmp_path / "index")
    assert loaded.dim == 20
    assert loaded.codes.values.nbytes == 50 * codes.bytes_per_vector
    np.testing.assert_array_equal(loaded.search(queries, 5)[0], scores)


def test_an_index_of_the_first_format_still_loads(tmp_path):
    built = vector_index.Index(np.eye(3, dtype=np.float32), ["a", "b", "c"])
    built.save(tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    samples.forget_checksums(path)
    about = json.loads(path.read_text())
    del about["precision"]
    path.write_text(json.dumps(about | {"format_version": 1}))
    assert vector_index.load(tmp_path / "index").search(np.eye(3)[1:2], 1)[1] == [["b"]]


def test_int8_codes_without_their_ranges_are_refused(tmp_path):
    codes = quantization.encode(np.eye(3, dtype=np.float32), "int8")
    vector_index.Index(codes, ["a", "b", "c"]).save(tmp_path / "index")
    (tmp_path / "index" / "ranges.npy").unlink()
    with pytest.raises(ValueError, match=r"ranges\.npy: missing"):
        vector_index.load(tmp_path / "index")


def test_texts_are_read_from_the_file_on_access(tmp_path):
    path = tmp_path / "index"
    titles, texts = ['a "quoted" title', ""], ['with \\ and "x", "text": "y"', "é\n"]
    odd = ['id "1"', "é"]
    vector_index.Index(_random(2), odd, titles=titles, texts=texts).save(path)
    loaded = vector_index.load(path)
    assert (loaded.ids, list(loaded.titles), loaded.texts[:]) == (odd, titles, texts)
    # Saving another index over it does not change the loaded one.
    vector_index.Index(_random(2), odd, texts=["no", "no"]).save(path)
    assert loaded.text("é") == "é\n"

    samples.forget_checksums(path / "index.json")
    lines = (path / "passages.jsonl").read_text().replace('"text"', '"text": 1, "b"')
    (path / "passages.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=r"passages\.jsonl:1: text must be"):
        vector_index.load(path)
    (path / "passages.jsonl").write_text(lines.replace('"text": 1', '"text": "1'))
    with pytest.raises(ValueError, match=r"passages\.jsonl:1: damaged"):
        vector_index.load(path)


@pytest.mark.parametrize("precision", quantization.PRECISIONS)
@pytest.mark.parametrize("offset", [0, 4])
def test_blocks_stay_between_searches_and_are_held_once(monkeypatch, precision, offset):
    monkeypatch.setattr(vector_index, "CPU_BLOCK_ROWS", 64)
    memory = np.empty(300 * 64 * 4 + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    corpus = memory[start : start + 300 * 64 * 4].view(np.float32).reshape(300, 64)
    corpus[...] = _random(300, 64)
    built = vector_index.Index(quantization.encode(corpus, precision), _ids(300))
    queries = _random(3, 64, seed=1)
    first = built.search(queries, 9)
    blocks = built._resident
    again = built.search(queries, 9)
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1]
    assert built._resident is blocks
    # All blocks are read in place, except the last, which may start anywhere.
    for number, block in enumerate(blocks[:-1]):
        here = built.codes.values[64 * number :].ctypes.data
        assert block.unsafe_buffer_pointer() == here


def test_vectors_too_large_for_the_device_are_transferred_in_each_search(monkeypatch):
    monkeypatch.setattr(vector_index, "CPU_BLOCK_ROWS", 7)
    queries, built = _random(3, seed=1), vector_index.Index(_random(50), _ids(50))
    expected = built.search(queries, 9)
    built._resident = None
    monkeypatch.setattr(vector_index, "_fits_on_device", lambda unused: False)
    scores, ids = built.search(queries, 9)
    assert built._resident is None
    np.testing.assert_array_equal(scores, expected[0])
    assert ids == expected[1]


@pytest.mark.parametrize("count", [1, 2, 16, 17, 256, 257])
def test_any_number_of_queries_can_be_searched(count):
    queries, corpus = _random(count, seed=1), _random(40)
    scores, positions = vector_index.Index(corpus, _ids(40)).search_positions(
        queries, 3
    )
    expected, expected_positions = _loop(queries, corpus, 3)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_array_equal(positions, expected_positions)
