"""Caches of seqio's Beam job: written, read back by training and by seqio itself."""

import hashlib
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest

from gecko_jax.cli import entry
from gecko_jax.data import (
    features,
    load_seqio,
    pipeline,
    registration,
    selection,
    seqio_cache,
    task_table,
)
from gecko_jax.text import text_formats, vocabularies

# Two files of two tasks, and what the job made of them: in each of two output files
# the examples are in another order than in the sources.
STORED = pathlib.Path(__file__).parents[1] / "testdata" / "seqio_cache"
FILES = tuple(str(STORED / f"pairs-{part}.jsonl") for part in "ab")
PIECES = vocabularies.load(task_table.QUICKSTART_VOCABULARY)


def select(folder, files=FILES, **options):
    return selection.select(
        mixture="",
        files=files,
        vocabulary=PIECES,
        text_format=text_formats.TextFormat(),
        cache_dir=folder,
        **options,
    )


def open_batches(folder, chosen=None, **shape):
    return pipeline.Batches(
        chosen or select(folder),
        features.Shape(16, 32, num_negatives=2, packing=True, **shape),
        batch_size=10,
        one_task_per_batch=False,
        seed=1,
    )


def assert_same_batches(first, second):
    assert first.mixture_hash == second.mixture_hash
    for step in (0, 1, 7):
        one, other = first.batch(step), second.batch(step)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture
def stored(tmp_path):
    """The stored cache, under the keys that this version of the code gives."""
    chosen = select(tmp_path)
    for task, key in zip(chosen.tasks, chosen.keys, strict=True):
        (source,) = (STORED / "seqio" / task.name).iterdir()
        shutil.copytree(source, seqio_cache.folder(task, key, tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return open_batches(tmp_path_factory.mktemp("plain"))


def test_the_data_order_and_every_key_are_those_of_earlier_versions(plain):
    """Existing caches and workdirs stay valid, and step n keeps its examples."""
    assert plain.mixture_hash == "e541a03225e5e382"
    assert {name: task["cache"] for name, task in plain.facts["tasks"].items()} == {
        "docs": "8ba09d466d7877d2",
        "term": "b3b1c36bf8955172",
    }
    digest = hashlib.sha256()
    for step in (0, 1, 7):
        for _, array in sorted(plain.batch(step).items()):
            digest.update(array.tobytes())
    assert digest.hexdigest()[:16] == "3a6770e7e782f3f2"


def test_stored_cache_gives_the_batches_of_no_cache(stored, plain, monkeypatch):
    monkeypatch.setattr(registration, "register_task", None)  # Nothing is tokenized.
    cached = open_batches(stored)
    assert len(list(stored.glob("tasks/*/order.npy"))) == 2
    assert_same_batches(cached, plain)
    for task in range(2):
        examples = [batches.examples(task, 99) for batches in (cached, plain)]
        assert len(examples[0]) == 23
        for one, other in zip(*examples, strict=True):
            np.testing.assert_array_equal(one.query, other.query)
            assert one.negative_group == other.negative_group
    # Once taken over, the stored files are not needed.
    shutil.rmtree(stored / "seqio")
    assert_same_batches(open_batches(stored), plain)


def test_seqio_reads_the_stored_cache_as_what_it_tokenizes(stored):
    seqio = load_seqio()
    chosen = select(stored)
    task, key = chosen.tasks[0], chosen.keys[0]
    registered = registration.register_task(
        task,
        chosen.text_format,
        PIECES,
        name=seqio_cache.task_name(task, key),
    )
    before = seqio.utils.get_global_cache_dirs()
    seqio.set_global_cache_dirs([str(stored / "seqio")])
    try:
        rows = [
            sorted(
                (record["place"].tolist(), record["query"].tolist(), record)
                for record in registered.get_dataset(
                    sequence_length=None,
                    split="train",
                    use_cached=use_cached,
                    shuffle=False,
                ).as_numpy_iterator()
            )
            for use_cached in (False, True)
        ]
    finally:
        seqio.set_global_cache_dirs(before)
    assert len(rows[0]) == len(rows[1]) == 23
    for (place, query, one), (cached_place, cached_query, other) in zip(
        *rows, strict=True
    ):
        assert (place, query) == (cached_place, cached_query)
        for name in ("positive", "query_id", "negative_ids", "negative_group"):
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
            assert one[name].dtype == other[name].dtype
    assert registered.get_cached_stats("train")["examples"] == 23


def test_a_stored_cache_keeps_the_scores(tmp_path, monkeypatch):
    """The files are written as Beam's workers write them, without Beam."""
    import tensorflow as tf

    seqio = load_seqio()
    source = tmp_path / "scored.jsonl"
    lines = [
        {"task": "docs", "query": f"q {n}", "positive": "p", "negatives": ["x"] * n}
        | ({"scores": [n + 0.1, *[-n] * n]} if n else {})
        for n in range(4)
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    chosen = select(tmp_path / "cache", (str(source),), scores=True)
    (task,), (key,) = chosen.tasks, chosen.keys
    registered = registration.register_task(task, chosen.text_format, PIECES)
    folder = seqio_cache.folder(task, key, chosen.cache_dir)
    folder.mkdir(parents=True)
    path = str(folder / "train.tfrecord-00000-of-00001")
    with tf.io.TFRecordWriter(path) as writer:
        examples = registered.preprocess_precache(registered.source.get_dataset())
        for example in examples.as_numpy_iterator():
            writer.write(seqio.dict_to_tfexample(example).SerializeToString())
    for name, content in (
        *(("COMPLETED", ""), ("info.train.json", '{"num_shards": 1}')),
        ("stats.train.json", "{}"),
    ):
        (folder / name).write_text(content)
    plain = open_batches(
        tmp_path, select(tmp_path / "other", (str(source),), scores=True), scores=True
    )
    monkeypatch.setattr(registration, "register_task", None)  # Nothing is tokenized.
    cached = open_batches(tmp_path, chosen, scores=True)
    assert_same_batches(cached, plain)
    assert [e.scores.tolist() for e in cached.examples(0, 9)] == [
        np.float32(line.get("scores", [])).tolist() for line in lines
    ]


def shards(folder):
    return sorted(folder.glob("seqio/docs/*/train.tfrecord-*"))


def lose(name):
    def fault(folder):
        next(folder.glob(f"seqio/docs/*/{name}")).unlink()

    return fault


def cut(folder):
    path = shards(folder)[0]
    path.write_bytes(path.read_bytes()[:-10])


def alter(folder):
    path = shards(folder)[0]
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(bytes(data))


def repeat(folder):
    first, second = shards(folder)
    shutil.copy(first, second)


def write(content):
    def fault(folder):
        next(folder.glob("seqio/docs/*/info.train.json")).write_text(content)

    return fault


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (write('{"num_sha'), "not JSON .*delete it"),
        (write("{}"), "no num_shards.*delete it"),
        (lose("COMPLETED"), r"half-written, it has no COMPLETED; delete it"),
        (lose("stats.train.json"), r"it has no stats\.train\.json"),
        (lose("train.tfrecord-00001-of-00002"), "has 1 of its 2 files"),
        (cut, "damaged"),
        (alter, "damaged"),
        (repeat, r"holds \d+ of the 23 examples of docs; delete it"),
    ],
)
def test_half_written_or_damaged_cache_is_refused(stored, fault, message):
    fault(stored)
    with pytest.raises(ValueError, match=rf"seqio/docs/\w+\S*: .*{message}"):
        open_batches(stored)
    assert not list(stored.glob("tasks/*"))


def test_changed_source_leaves_the_cache_aside(stored):
    changed = stored / "pairs-a.jsonl"
    changed.write_text(pathlib.Path(FILES[0]).read_text().replace("answer", "reply"))
    chosen = select(stored, (str(changed), FILES[1]))
    for task, key in zip(chosen.tasks, chosen.keys, strict=True):
        assert seqio_cache.find(task, key, stored) is None


def test_files_are_the_shards_of_a_task(tmp_path):
    seqio = load_seqio()
    (task, _) = select(tmp_path).tasks
    source = registration.register_task(task, text_formats.TextFormat(), PIECES).source
    assert source.list_shards("train") == FILES
    counts = []
    for index in range(2):
        part = source.get_dataset("train", shard_info=seqio.ShardInfo(index, 2))
        places = [place.tolist() for place in (r["place"].numpy() for r in part)]
        assert places == [[index, n] for n in range(len(places))]
        counts.append(len(places))
    assert counts == [14, 9]


def test_missing_beam_is_told_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    status = entry.main(
        [
            "data",
            "cache",
            "--config=configs/finetune.py:local",
            f"--output={tmp_path / 'out'}",
        ]
    )
    assert status == 1
    assert 'pip install "gecko-jax[beam]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.beam
def test_beam_fills_a_cache_that_training_reads(tmp_path, plain, capsys):
    arguments = [
        "data",
        "cache",
        "--config=configs/finetune.py:local",
        f"--output={tmp_path}",
        "--pipeline-options=--runner=DirectRunner",
        f"--config.data.files={FILES}",
    ]
    assert entry.main(arguments) == 0
    told = capsys.readouterr().out
    assert told.count(": 23 examples, ") == 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert entry.main(arguments) == 0  # What is there is not made again.
    assert capsys.readouterr().out == told
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    stats = json.loads(next(tmp_path.glob("seqio/docs/*/stats.train.json")).read_text())
    assert stats["examples"] == 23
    assert_same_batches(open_batches(tmp_path), plain)


@pytest.mark.beam
def test_interrupted_job_leaves_nothing(tmp_path, monkeypatch):
    def fail(record):
        raise OSError("no space left")

    monkeypatch.setattr(load_seqio(), "dict_to_tfexample", fail)
    chosen = select(tmp_path)
    with pytest.raises(Exception, match="no space left"):
        seqio_cache.write(
            chosen.tasks[0], chosen.keys[0], chosen.text_format, PIECES, tmp_path
        )
    assert not list(tmp_path.glob("seqio/*/*"))
