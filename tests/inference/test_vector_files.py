import errno
import json
import shutil

import numpy as np
import pytest

from gecko_jax.inference import vector_files


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "corpus.jsonl"
    records = [
        {"_id": f"p{i}", "title": "T" * (i % 2), "text": f"passage number {i}"}
        for i in range(10)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "vectors"


def test_shards_hold_the_vectors_of_the_texts_in_order(tiny_gecko, source, folder):
    vector_files.embed_file(tiny_gecko, source, folder, shard_rows=4, dim=8)
    assert sorted(path.name for path in folder.iterdir()) == [
        "embeddings.json",
        "shard-00000.npz",
        "shard-00001.npz",
        "shard-00002.npz",
    ]
    ids, codes = vector_files.read_codes(folder)
    found = codes.decode()
    assert ids == [f"p{i}" for i in range(10)]
    assert found.dtype == np.float32
    expected = tiny_gecko.encode_passages(
        [f"passage number {i}" for i in range(10)],
        ["T" * (i % 2) for i in range(10)],
        dim=8,
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    settings = vector_files.read_settings(folder)
    assert (settings["revision"], settings["dim"]) == ("tiny-7", 8)
    assert (settings["side"], settings["task"]) == ("passage", None)
    assert settings["num_texts"] == 10


def test_queries_of_a_txt_file(tiny_gecko, tmp_path, folder):
    (tmp_path / "q.txt").write_text("one\ntwo\n")
    vector_files.embed_file(
        tiny_gecko, tmp_path / "q.txt", folder, side="query", task="docs"
    )
    ids, codes = vector_files.read_codes(folder)
    found = codes.decode()
    assert ids == ["1", "2"]
    expected = tiny_gecko.encode_queries(["one", "two"], "docs")
    np.testing.assert_allclose(found, expected, atol=1e-5)


class _Counting:
    """A model that counts the texts that it encodes, and stops at a limit."""

    def __init__(self, gecko, limit=1_000, error=KeyboardInterrupt):
        self.gecko, self.limit, self.error, self.count = gecko, limit, error, 0
        self.revision, self.check_dim = gecko.revision, gecko.check_dim

    def encode(self, texts, **settings):
        self.count += len(texts)
        if self.count > self.limit:
            raise self.error
        return self.gecko.encode(texts, **settings)


def _embed(gecko, source, folder, **settings):
    function = vector_files.embed_file
    while hasattr(function, "__wrapped__"):  # Skip the run-time type checks.
        function = function.__wrapped__
    return function(gecko, source, folder, shard_rows=4, **settings)


def test_a_rerun_embeds_only_what_is_missing(tiny_gecko, source, folder, tmp_path):
    stopped = _Counting(tiny_gecko, limit=8)
    with pytest.raises(KeyboardInterrupt):
        _embed(stopped, source, folder)
    with pytest.raises(
        ValueError, match=r"shard-00002.npz: missing .* \(shard 3 of 3\)"
    ):
        vector_files.read_codes(folder)
    again = _Counting(tiny_gecko)
    _embed(again, source, folder)
    assert again.count == 2
    _embed(tiny_gecko, source, tmp_path / "other")
    np.testing.assert_array_equal(
        vector_files.read_codes(folder)[1].decode(),
        vector_files.read_codes(tmp_path / "other")[1].decode(),
    )


def test_a_damaged_shard_is_refused_and_embedded_again(tiny_gecko, source, folder):
    _embed(tiny_gecko, source, folder)
    path = folder / "shard-00001.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"shard-00001.npz: missing or damaged"):
        vector_files.read_codes(folder)
    again = _Counting(tiny_gecko)
    _embed(again, source, folder)
    assert again.count == 4
    assert len(vector_files.read_codes(folder)[0]) == 10


@pytest.mark.parametrize("ids", [np.arange(4), np.array([["a"]] * 4), np.array("a")])
def test_a_shard_with_other_ids_than_strings_is_damaged(
    tiny_gecko, source, folder, ids
):
    _embed(tiny_gecko, source, folder)
    path = folder / "shard-00001.npz"
    np.savez(path, ids=ids, vectors=np.load(path)["vectors"])
    with pytest.raises(ValueError, match=r"shard-00001.npz: missing or damaged"):
        vector_files.read_codes(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "a list"), ("{}", "no revision; no dim"), ("[" * 9_999, "not JSON")],
)
def test_errors_name_edited_settings(tmp_path, content, message):
    (tmp_path / "embeddings.json").write_text(content)
    with pytest.raises(ValueError, match=rf"embeddings\.json: .*{message}.*again"):
        vector_files.read_settings(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 4}, "dim was 16 and is now 4"),
        ({"side": "query"}, "side was 'passage' and is now 'query'"),
        ({"task": "docs"}, "task was None and is now 'docs'"),
    ],
)
def test_a_folder_with_other_settings_is_refused(
    tiny_gecko, source, folder, settings, message
):
    _embed(tiny_gecko, source, folder)
    with pytest.raises(ValueError, match=message):
        _embed(tiny_gecko, source, folder, **settings)


def test_a_folder_of_another_source_or_model_is_refused(tiny_gecko, source, folder):
    _embed(tiny_gecko, source, folder)
    other = _Counting(tiny_gecko)
    other.revision = "tiny-8"
    with pytest.raises(ValueError, match="revision was 'tiny-7' and is now 'tiny-8'"):
        _embed(other, source, folder)
    source.write_text(source.read_text().replace("number 3", "number three"))
    with pytest.raises(ValueError, match="source_sha256 was"):
        _embed(tiny_gecko, source, folder)


def test_a_moved_source_is_accepted(tiny_gecko, source, folder, tmp_path):
    _embed(tiny_gecko, source, folder)
    moved = shutil.move(source, tmp_path / "moved.jsonl")
    _embed(tiny_gecko, moved, folder)


def test_a_bad_line_is_reported_before_anything_is_written(tiny_gecko, source, folder):
    source.write_text(source.read_text() + '{"_id": "p10", "text": " "}\n')
    with pytest.raises(ValueError, match=r"corpus.jsonl:11: text .* is empty"):
        vector_files.embed_file(tiny_gecko, source, folder)
    assert not folder.exists()


def test_an_empty_file_and_a_foreign_folder_are_refused(tiny_gecko, tmp_path, folder):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.jsonl: no texts"):
        vector_files.embed_file(tiny_gecko, tmp_path / "empty.jsonl", folder)
    with pytest.raises(ValueError, match=r"no embeddings.json"):
        vector_files.read_codes(tmp_path)


def test_a_full_disk_keeps_finished_shards_only(
    tiny_gecko, source, folder, monkeypatch
):
    real, calls = np.savez, []

    def savez(file, **arrays):
        calls.append(file)
        if len(calls) == 2:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, **arrays)

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OSError, match=r"no disk space left for .*shard-00001.npz"):
        _embed(tiny_gecko, source, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "embeddings.json",
        "shard-00000.npz",
    ]
    _embed(tiny_gecko, source, folder)
    assert len(vector_files.read_codes(folder)[0]) == 10


@pytest.mark.parametrize(("precision", "size"), [("int8", 8), ("binary", 1)])
def test_shards_of_codes_approximate_the_vectors(
    tiny_gecko, source, folder, tmp_path, precision, size
):
    _embed(tiny_gecko, source, folder, precision=precision, dim=8)
    _embed(tiny_gecko, source, tmp_path / "exact", dim=8)
    ids, codes = vector_files.read_codes(folder)
    assert codes.values.nbytes == 10 * size
    exact = vector_files.read_codes(tmp_path / "exact")[1].decode()
    found = vector_files.read_codes(folder)[1].decode()
    cosines = np.sum(exact * found, axis=1) / np.linalg.norm(found, axis=1)
    assert cosines.mean() > (0.95 if precision == "int8" else 0.6)
    assert ids == vector_files.read_codes(tmp_path / "exact")[0]


def test_all_shards_share_the_ranges_of_the_first(tiny_gecko, source, folder):
    _embed(tiny_gecko, source, folder, precision="int8", dim=8)
    before = vector_files.read_codes(folder)[1]
    # A rerun reads the ranges from the existing shards.
    (folder / "shard-00001.npz").unlink()
    _embed(tiny_gecko, source, folder, precision="int8", dim=8)
    after = vector_files.read_codes(folder)[1]
    np.testing.assert_array_equal(after.values, before.values)
    np.testing.assert_array_equal(after.ranges, before.ranges)
    with np.load(folder / "shard-00002.npz") as shard:
        arrays = dict(shard)
    np.savez(folder / "shard-00002.npz", **arrays | {"ranges": arrays["ranges"] * 2})
    with pytest.raises(ValueError, match=r"shard-00002.npz: missing or damaged"):
        vector_files.read_codes(folder)


def test_a_folder_has_one_precision(tiny_gecko, source, folder):
    _embed(tiny_gecko, source, folder)
    path = folder / "embeddings.json"
    settings = json.loads(path.read_text())
    # A folder of an earlier version, without a precision, continues in float32.
    del settings["precision"]
    path.write_text(json.dumps(settings))
    _embed(tiny_gecko, source, folder)
    with pytest.raises(ValueError, match="precision was 'float32' and is now 'int8'"):
        _embed(tiny_gecko, source, folder, precision="int8")


def test_a_compressed_shard_is_not_unpacked(tiny_gecko, source, folder, monkeypatch):
    """A member may decompress to any size: 5.8 GB of zeros are 6 MB on disk."""
    vector_files.embed_file(tiny_gecko, source, folder)
    path = sorted(folder.glob("shard-*"))[0]
    with path.open("wb") as file:
        np.savez_compressed(file, ids=np.array(["a"]), vectors=np.zeros((10_000, 16)))
    monkeypatch.setattr(np.lib.format, "read_array", None)  # Allocates.
    with pytest.raises(ValueError, match=rf"{path.name}: missing or damaged"):
        vector_files.read_codes(folder)
