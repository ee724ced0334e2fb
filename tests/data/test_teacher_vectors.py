"""A teacher's vectors: from files to a folder, and from there into batches."""

import json
import os

import numpy as np
import pytest

from gecko_jax.data import features, pipeline, selection, task_table, teacher_vectors
from gecko_jax.text import text_formats, vocabularies

LINES = [
    {
        "task": "docs",
        "query": "sort a list",
        "positive": "sorted()",
        "title": "Sorting",
    },
    {"task": "docs", "query": "sort a list", "positive": "list.sort()"},
    {"task": "faq", "query": "sort a list", "positive": "sorted()", "negative": "bird"},
    {"task": "faq", "query": "bird", "positive": "a bird", "negatives": ["x", "bird"]},
]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return str(path)


def random(number, width=6):
    return np.random.default_rng(0).standard_normal((number, width))


def build(pairs, folder, dim=0, width=6):
    texts = list(teacher_vectors.list_texts([pairs]))
    vectors = random(len(texts), width)
    teacher_vectors.write(
        folder,
        [each.key for each in texts],
        [vectors[:5], vectors[5:]],
        made_by="random",
        dim=dim,
    )
    return texts, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def open_batches(pairs, tmp_path, teacher="", teacher_dim=0):
    chosen = selection.select(
        mixture="",
        files=(pairs,),
        vocabulary=vocabularies.load(task_table.QUICKSTART_VOCABULARY),
        text_format=text_formats.TextFormat(),
        cache_dir=tmp_path / "cache",
    )
    shape = features.Shape(16, 16, 2, packing=True, teacher_dim=teacher_dim)
    return pipeline.Batches(
        chosen, shape, batch_size=4, one_task_per_batch=False, seed=0, teacher=teacher
    )


def test_each_text_is_listed_once_for_a_side_and_a_task(pairs):
    found = [
        (t.side, t.task, t.text, t.title) for t in teacher_vectors.list_texts([pairs])
    ]
    assert found == [
        ("query", "docs", "sort a list", ""),
        ("passage", "docs", "sorted()", "Sorting"),
        ("passage", "docs", "list.sort()", ""),
        ("query", "faq", "sort a list", ""),
        ("passage", "faq", "sorted()", ""),
        ("passage", "faq", "bird", ""),
        ("query", "faq", "bird", ""),
        ("passage", "faq", "a bird", ""),
        ("passage", "faq", "x", ""),
    ]


def test_a_batch_has_the_vector_of_each_of_its_texts(pairs, tmp_path):
    texts, unit = build(pairs, tmp_path / "teacher")
    of = {(t.side, t.task, t.text): unit[row] for row, t in enumerate(texts)}
    batches = open_batches(pairs, tmp_path, teacher=tmp_path / "teacher", teacher_dim=6)
    decode = batches.vocabulary.decode
    seen = 0
    for step in range(3):
        batch = batches.batch(step)

        def read(side, number, batch=batch):
            row, segment = batch[f"{side}_index"][number]
            kept = batch[f"{side}_segment_ids"][row] == segment + 1
            written = decode(batch[f"{side}_tokens"][row][kept].tolist())
            return written.rpartition("query: " if side == "query" else "text: ")[2]

        for row in range(4):
            task = batches.task_names[batch["task_index"][row]]
            expected = {
                "query_teacher": of["query", task, read("query", row)],
                "passage_teacher": of["passage", task, read("passage", row)],
            }
            for name, vector in expected.items():
                np.testing.assert_allclose(batch[name][row], vector, atol=1e-3)
            for column in range(2):
                got = batch["negative_teacher"][row, column]
                if batch["negative_mask"][row, column]:
                    seen += 1
                    negative = read("passage", 4 + 2 * row + column)
                    np.testing.assert_allclose(
                        got, of["passage", task, negative], atol=1e-3
                    )
                else:
                    assert not got.any()
    assert seen > 3
    assert batch["negative_teacher"].shape == (4, 2, 6)
    plain = open_batches(pairs, tmp_path)
    assert "query_teacher" not in plain.batch(0)
    assert plain.mixture_hash != batches.mixture_hash


def test_fewer_dims_keep_the_inner_products_best(pairs, tmp_path):
    _, unit = build(pairs, tmp_path / "teacher", dim=3)
    folder = teacher_vectors.Teacher(tmp_path / "teacher", 3)
    texts = list(teacher_vectors.list_texts([pairs]))
    keys = np.array([t.key for t in texts], np.uint64)
    found = folder.look_up(keys).astype(np.float64)
    _, _, directions = np.linalg.svd(unit, full_matrices=False)
    best = unit @ directions[:3].T
    best /= np.linalg.norm(best, axis=1, keepdims=True)
    np.testing.assert_allclose(found @ found.T, best @ best.T, atol=3e-3)
    assert not folder.look_up(keys ^ np.uint64(1)).any()


def test_vectors_come_from_npy_or_json_lines(pairs, tmp_path):
    texts = list(teacher_vectors.list_texts([pairs]))
    vectors = random(len(texts)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    lines = [
        json.dumps({"_id": t.id, "vector": v.tolist()})
        for t, v in zip(texts, vectors, strict=True)
    ]
    (tmp_path / "v.jsonl").write_text("\n".join(lines[::-1]))
    for name in ("v.npy", "v.jsonl"):
        read = np.concatenate(
            list(teacher_vectors.read_vectors(tmp_path / name, texts))
        )
        np.testing.assert_array_equal(read, vectors)
    np.save(tmp_path / "short.npy", vectors[1:])
    (tmp_path / "short.jsonl").write_text("\n".join(lines[1:]))
    (tmp_path / "other.jsonl").write_text(json.dumps({"_id": "aa", "vector": [1]}))
    (tmp_path / "words.jsonl").write_text(
        json.dumps({"_id": texts[0].id, "vector": "much"})
    )
    for name, message in (
        ("short.npy", r"holds float32 \(8, 6\), not .* \[9, any\]\); it needs a row"),
        ("short.jsonl", f"no vector for 1 of 9 texts, such as `_id` '{texts[0].id}'"),
        ("other.jsonl", "not an id of these"),
        ("words.jsonl", "list of numbers"),
        ("absent.npy", "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            list(teacher_vectors.read_vectors(tmp_path / name, texts))


def test_wrong_vectors_leave_nothing_behind(pairs, tmp_path):
    texts = list(teacher_vectors.list_texts([pairs]))
    keys = [t.key for t in texts]
    good = random(len(texts))
    bad = good.copy()
    bad[6] = 0.0
    for blocks, dim, message in (
        ([bad], 0, "vector 6 of the teacher is zero"),
        ([good[:-1]], 0, "8 vectors for 9 texts"),
        ([good, good], 0, "more vectors than the 9 texts"),
        ([good], 7, "dim=7: the teacher's vectors have 6"),
    ):
        with pytest.raises(ValueError, match=message):
            teacher_vectors.write(tmp_path / "t", keys, blocks, made_by="", dim=dim)
        assert not (tmp_path / "t").exists()


def test_a_folder_that_does_not_fit_is_refused(pairs, tmp_path):
    build(pairs, tmp_path / "teacher")
    for folder, dim, message in (
        ("nowhere", 6, "make them with `gecko data teach`"),
        ("teacher", 5, "its vectors have 6 dims, and data.teacher_dim=5"),
    ):
        with pytest.raises(ValueError, match=message):
            open_batches(pairs, tmp_path, teacher=tmp_path / folder, teacher_dim=dim)
    np.save(tmp_path / "teacher" / "rows.npy", np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"rows.npy: damaged .*make the folder again"):
        teacher_vectors.Teacher(tmp_path / "teacher", 6)


def test_vectors_of_other_texts_are_refused_and_of_some_are_told(
    pairs, tmp_path, caplog
):
    texts = list(teacher_vectors.list_texts([pairs]))
    for name, keys in (
        ("other", [t.key ^ 1 for t in texts]),
        ("some", [t.key if t.task == "docs" else t.key ^ 1 for t in texts]),
    ):
        vectors = random(len(texts))
        teacher_vectors.write(tmp_path / name, keys, [vectors], made_by="")
    with pytest.raises(ValueError, match="no vector for any text of docs, faq"):
        open_batches(pairs, tmp_path, teacher=tmp_path / "other", teacher_dim=6)
    open_batches(pairs, tmp_path, teacher=tmp_path / "some", teacher_dim=6)
    assert "vectors for 0% of the texts of task faq" in caplog.text
    assert "task docs" not in caplog.text


def test_vectors_of_another_kind_are_named(tmp_path):
    np.savez(tmp_path / "v.npz", a=np.eye(2))
    with pytest.raises(ValueError, match=r"v.npz: a zip archive \(.npz"):
        list(teacher_vectors.read_vectors(tmp_path / "v.npz", []))
    np.save(tmp_path / "v.npy", np.eye(2))
    (tmp_path / "v.npy").rename(tmp_path / "v")
    with pytest.raises(ValueError, match=r"v: a NumPy array \(.npy\), not UTF-8 text"):
        list(teacher_vectors.read_vectors(tmp_path / "v", []))
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(ValueError, match=r"pipe.npy: a pipe, not a file"):
        list(teacher_vectors.read_vectors(tmp_path / "pipe.npy", []))
