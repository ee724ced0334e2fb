"""The pipeline: what a step holds is a pure function of (mixture, seed, step)."""

import collections
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import samples

from gecko_jax.cli import flags
from gecko_jax.data import (
    cache,
    classification,
    formatting,
    mixtures,
    pipeline,
    summary,
    task_table,
)
from gecko_jax.text import text_formats, vocabularies
from gecko_jax.training import workdirs

SIZES = {"docs": 24, "code": 12, "term": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def pairs(folder):
    """Three tasks; example n of a task says so, and has n % 4 negatives."""
    path = folder / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for task, size in SIZES.items():
            for n in range(size):
                record = {
                    "task": task,
                    "query": f"{task} question {n}",
                    "positive": f"{task} answer {n} " + "and so on " * n,
                    "negatives": [f"{task} wrong {n} {m}" for m in range(n % 4)],
                    "title": "" if n % 2 else f"Title {n}",
                }
                lines.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="module")
def open_batches(folder, pairs):
    def build(**changes):
        arguments = {
            "mixture": "",
            "files": (str(pairs),),
            "vocabulary": vocabularies.load(task_table.QUICKSTART_VOCABULARY),
            "vocabulary_path": task_table.QUICKSTART_VOCABULARY,
            "text_format": text_formats.TextFormat(
                task_descriptions={"docs": "search result"}
            ),
            "batch_size": 7,
            "query_length": 16,
            "passage_length": 32,
            "num_negatives": 2,
            "packing": False,
            "one_task_per_batch": False,
            "seed": 3,
            "cache_dir": folder / "cache",
        }
        return pipeline.Batches(**{**arguments, **changes})

    return build


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def query_texts(batches, batch):
    return [batches.vocabulary.decode(row.tolist()) for row in batch["query_tokens"]]


def test_step_is_a_pure_function(open_batches):
    first, second = open_batches(), open_batches()
    forwards = [first.batch(step) for step in range(6)]
    backwards = [second.batch(step) for step in reversed(range(6))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert_same(one, other)
    ahead = list(second.iterate(2, 5))
    assert len(ahead) == 3
    for one, other in zip(forwards[2:5], ahead, strict=True):
        assert_same(one, other)


def test_seed_changes_the_order_and_not_the_hash(open_batches):
    first, second = open_batches(seed=3), open_batches(seed=4)
    assert query_texts(first, first.batch(0)) != query_texts(second, second.batch(0))
    assert first.mixture_hash == second.mixture_hash
    for changes in ({"batch_size": 8}, {"one_task_per_batch": True}):
        assert open_batches(**changes).mixture_hash != first.mixture_hash
    assert open_batches(packing=True, query_length=9).mixture_hash == first.mixture_hash


def test_texts_are_formatted_tokenized_and_identified(open_batches, pairs):
    batches = open_batches(batch_size=42)
    batch = batches.batch(0)
    records = [json.loads(line) for line in pairs.read_text().splitlines()]
    by_query = {record["query"]: record for record in records}
    encode = batches.vocabulary.encode
    seen = set()
    for row in range(42):
        written = batches.vocabulary.decode(batch["query_tokens"][row].tolist())
        record = by_query[written.split("query: ")[1]]
        seen.add(record["query"])
        task = record["task"]
        assert batches.task_names[batch["task_index"][row]] == task
        query = batches.text_format.format_query(record["query"], task)
        positive = batches.text_format.format_passage(
            record["positive"], record["title"]
        )
        for side, content, length in (
            ("query", query, 16),
            ("passage", positive, 32),
        ):
            (wanted,) = encode([content], max_length=length)
            got = batch[f"{side}_tokens"][row]
            assert got[got != 0].tolist() == wanted
        assert tuple(batch["query_id"][row]) == text_formats.content_id(record["query"])
        assert tuple(batch["passage_id"][row]) == text_formats.content_id(
            record["positive"], record["title"]
        )
        wrong = {text_formats.content_id(negative) for negative in record["negatives"]}
        chosen = batch["negative_id"][row][batch["negative_mask"][row]]
        assert len(chosen) == min(2, len(wrong)) == len({*map(tuple, chosen)})
        assert {*map(tuple, chosen.tolist())} <= wrong
    # Grain interleaves by proportions rounded to a hundredth of the smallest.
    assert len(seen) >= 40


def test_every_epoch_covers_all_in_a_new_order(open_batches):
    batches = open_batches(batch_size=6, one_task_per_batch=True)
    orders = collections.defaultdict(list)
    for step in range(21):  # Three epochs of 42 examples.
        batch = batches.batch(step)
        (task,) = {*batch["task_index"].tolist()}
        orders[task] += query_texts(batches, batch)
    for task, size in enumerate(SIZES.values()):
        epochs = [orders[task][n : n + size] for n in range(0, 3 * size, size)]
        assert len(epochs[0]) == size
        for epoch in epochs:
            assert len({*epoch}) == len(epoch)
        assert {*epochs[0]} == {*epochs[1]}
        assert epochs[0] != epochs[1]


def test_negatives_are_sampled_anew(open_batches):
    batches = open_batches(batch_size=42, num_negatives=1, one_task_per_batch=False)
    chosen = collections.defaultdict(set)
    for step in range(12):
        batch = batches.batch(step)
        for row in np.flatnonzero(batch["negative_mask"][:, 0]):
            chosen[tuple(batch["query_id"][row])].add(
                tuple(batch["negative_id"][row, 0])
            )
    assert max(map(len, chosen.values())) == 3


@pytest.mark.parametrize("one_task", [False, True])
def test_rates_are_honoured(open_batches, monkeypatch, pairs, one_task):
    rows = task_table.from_files([pairs], [SIZES], text_formats.TextFormat())
    monkeypatch.setattr(task_table, "TASKS", rows)
    shares = {"docs": 1.0, "code": 2.0, "term": 5.0}
    monkeypatch.setattr(
        mixtures, "MIXTURES", {"mixed": mixtures.Mixture(tuple(shares), shares)}
    )
    batches = open_batches(mixture="mixed", files=(), one_task_per_batch=one_task)
    assert batches.rates == (1 / 8, 2 / 8, 5 / 8)
    drawn = np.concatenate([batches.batch(step)["task_index"] for step in range(40)])
    np.testing.assert_allclose(
        np.bincount(drawn) / len(drawn), batches.rates, atol=0.02
    )
    single = open_batches(mixture="code", files=())
    assert single.task_names == ("code",)
    assert single.rates == (1.0,)


def test_packed_and_plain_batches_hold_the_same_texts(open_batches):
    plain, packed = open_batches().batch(5), open_batches(packing=True).batch(5)
    moved = {
        f"{side}_{part}"
        for side in ("query", "passage")
        for part in ("tokens", "segment_ids", "index")
    }
    for name in plain.keys() - moved:
        np.testing.assert_array_equal(plain[name], packed[name])
    present = {
        "query": np.ones(7, bool),
        "passage": np.r_[np.ones(7, bool), plain["negative_mask"].ravel()],
    }
    for side, real in present.items():
        for number in np.flatnonzero(real):
            texts = []
            for batch in (plain, packed):
                row, segment = batch[f"{side}_index"][number]
                inside = batch[f"{side}_segment_ids"][row] == segment + 1
                texts.append(batch[f"{side}_tokens"][row][inside].tolist())
            assert texts[0] == texts[1]


def test_cache_is_built_once_and_read_without_tensorflow(open_batches, folder, pairs):
    open_batches()
    before = {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*")}
    open_batches(batch_size=3)
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*")}
    program = f"""
import sys
from gecko_jax.data import pipeline, task_table
from gecko_jax.text import text_formats, vocabularies

path = task_table.QUICKSTART_VOCABULARY
pipeline.Batches(
    mixture="", files=({str(pairs)!r},), vocabulary=vocabularies.load(path),
    vocabulary_path=path, query_length=16, passage_length=32, num_negatives=2,
    text_format=text_formats.TextFormat(task_descriptions={{"docs": "search result"}}),
    batch_size=7, packing=False, one_task_per_batch=False, seed=3,
    cache_dir={str(folder / "cache")!r},
).batch(0)
assert "tensorflow" not in sys.modules and "seqio" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_any_number_of_processes_draws_the_same_batches(open_batches, pairs, tmp_path):
    """Processes that start at once, caches unbuilt, agree with each other and here."""
    program = f"""
import hashlib
from gecko_jax.data import pipeline, task_table
from gecko_jax.text import text_formats, vocabularies

path = task_table.QUICKSTART_VOCABULARY
batches = pipeline.Batches(
    mixture="", files=({str(pairs)!r},), vocabulary=vocabularies.load(path),
    vocabulary_path=path, query_length=16, passage_length=32, num_negatives=2,
    text_format=text_formats.TextFormat(task_descriptions={{"docs": "search result"}}),
    batch_size=7, packing=False, one_task_per_batch=False, seed=3,
    cache_dir={str(tmp_path)!r},
)
digest = hashlib.sha256()
for batch in batches.iterate(5, 9):
    for name in sorted(batch):
        digest.update(batch[name].tobytes())
print(digest.hexdigest())
"""
    command = [sys.executable, "-c", program]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    digest = hashlib.sha256()
    for batch in open_batches().iterate(5, 9):
        for name in sorted(batch):
            digest.update(batch[name].tobytes())
    for process in running:
        answer, _ = process.communicate()
        assert process.returncode == 0
        assert answer.strip() == digest.hexdigest()


def test_a_changed_mixture_is_named(open_batches, pairs, tmp_path):
    before = open_batches(cache_dir=tmp_path)
    position = {"mixture_hash": before.mixture_hash, "mixture": before.facts}
    position = json.loads(json.dumps(position))
    config = flags.load("configs/finetune.py:local")
    workdirs.check_position(position, before, config, None)
    changed = tmp_path / "changed.jsonl"
    lines = [line for line in pairs.read_text().splitlines() if "term" not in line]
    changed.write_text("\n".join(lines[:-1]))
    after = open_batches(
        files=(changed,),
        cache_dir=tmp_path,
        text_format=text_formats.TextFormat(task_descriptions={"docs": "finding"}),
    )
    with pytest.raises(ValueError, match="the data has changed") as caught:
        workdirs.check_position(position, after, config, None)
    message = str(caught.value)
    for fact in (
        "task term.examples: was 6, is None",
        "task code.examples: was 12, is 11",
        "task code.rate: was 12",
        "task code.sources: was",
        "task docs.format.task_description: was 'search result'",
    ):
        assert fact in message


def test_changed_sources_and_formats_make_other_caches(open_batches, pairs, tmp_path):
    def keys(path, text_format):
        summary = cache.summarize_source(str(path), tmp_path)
        rows = task_table.from_files([path], [summary.examples], text_format)
        text_format = task_table.complete_text_format(text_format, rows)
        pieces = vocabularies.load(task_table.QUICKSTART_VOCABULARY)
        return [cache.key(row, [summary], text_format, pieces) for row in rows]

    plain = keys(pairs, text_formats.TextFormat())
    assert plain == keys(pairs, text_formats.TextFormat())
    described = keys(
        pairs, text_formats.TextFormat(task_descriptions={"code": "code search"})
    )
    assert [a == b for a, b in zip(plain, described, strict=True)] == [
        True,
        False,
        True,
    ]
    assert keys(pairs, text_formats.TextFormat(no_title="-"))[0] != plain[0]
    changed = tmp_path / "changed.jsonl"
    changed.write_text(pairs.read_text().replace("question 3", "question three"))
    assert not {*keys(changed, text_formats.TextFormat())} & {*plain}


def test_cut_off_cache_is_never_taken_for_whole(
    open_batches, pairs, tmp_path, monkeypatch
):
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(pairs.read_text().splitlines()[: SIZES["docs"]]))
    encode, written = cache.encode, []

    def fail(example):
        written.append(1)
        if len(written) > 5:
            raise KeyboardInterrupt
        return encode(example)

    monkeypatch.setattr(cache, "encode", fail)
    with pytest.raises(KeyboardInterrupt):
        open_batches(files=(path,), cache_dir=tmp_path)
    assert not list(tmp_path.glob("tasks/*"))
    monkeypatch.undo()
    whole = open_batches(files=(path,), cache_dir=tmp_path)
    assert whole.task_sizes == (SIZES["docs"],)
    (info,) = tmp_path.glob("tasks/*/info.json")
    info.write_text(json.dumps({"num_examples": 99}))
    with pytest.raises(ValueError, match="of 99 examples; delete the folder"):
        open_batches(files=(path,), cache_dir=tmp_path)
    info.write_text("{}")
    with pytest.raises(ValueError, match=r"no num_examples.*delete the folder"):
        open_batches(files=(path,), cache_dir=tmp_path)
    (note,) = tmp_path.glob("sources/*.json")
    summary = note.read_text()
    note.write_text("3")
    with pytest.raises(ValueError, match="a number, not an object; delete it"):
        open_batches(files=(path,), cache_dir=tmp_path)
    note.write_text(summary)
    shutil.rmtree(info.parent)
    rebuilt = open_batches(files=(path,), cache_dir=tmp_path)
    assert_same(whole.batch(1), rebuilt.batch(1))


def test_long_texts_are_capped_with_eos(open_batches, tmp_path):
    path = tmp_path / "long.jsonl"
    record = {"task": "t", "query": "q", "positive": "word " * 30_000}
    path.write_text(json.dumps(record))
    batches = open_batches(files=(path,), batch_size=1, cache_dir=tmp_path)
    (example,) = batches.examples(0, 5)
    assert len(example.positive) == cache.MAX_TOKENS
    assert example.positive[-1] == 1
    row = batches.batch(0)["passage_tokens"][0]
    assert row[-1] == 1
    assert (row[:-1] > 1).all()


def test_record_round_trip(open_batches):
    batches = open_batches()
    for example in batches.examples(0, 8):
        again = cache.decode(cache.encode(example))
        for one, other in zip(
            vars(example).values(), vars(again).values(), strict=True
        ):
            if isinstance(one, tuple):
                for a, b in zip(one, other, strict=True):
                    np.testing.assert_array_equal(a, b)
            else:
                np.testing.assert_array_equal(one, other)


def test_error_in_the_background_reaches_the_caller(open_batches, monkeypatch):
    batches = open_batches()
    batch = batches.batch

    def fail(step):
        if step == 2:
            raise OSError("the disk went away")
        return batch(step)

    monkeypatch.setattr(batches, "batch", fail)
    steps = batches.iterate(0, 9)
    next(steps), next(steps)
    with pytest.raises(OSError, match="the disk went away"):
        next(steps)


def test_closing_the_iterator_ends_its_thread(open_batches):
    import threading

    steps = open_batches().iterate(0)
    next(steps)
    steps.close()
    time.sleep(0.05)
    assert "batches" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"files": (), "mixture": "quikstart"},
            "'quikstart' is unknown: choose one of",
        ),
        ({"files": ("/nowhere.jsonl",)}, r"/nowhere\.jsonl: no such file"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"query_length": 1}, "query_length=1: must be at least 2"),
        ({"passage_length": 4096}, "passage_length=4096: .* at most 2048"),
        ({"num_negatives": -1}, "num_negatives=-1: must be at least 0"),
    ],
)
def test_bad_arguments_are_named(open_batches, changes, message):
    with pytest.raises(ValueError, match=message):
        open_batches(**changes)


def test_vocabulary_must_be_that_of_its_path(open_batches):
    other = vocabularies.load(task_table.QUICKSTART_VOCABULARY, extra_ids=2)
    pieces = vocabularies.Vocabulary(other.full_proto)
    with pytest.raises(ValueError, match="is not the vocabulary given beside it"):
        open_batches(vocabulary=pieces)


def test_a_line_may_have_a_task_description_of_its_own(open_batches, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        {
            "task": "fret",
            "query": "q one",
            "positive": "p",
            "task_description": "facts",
        },
        {"task": "fret", "query": "q two", "positive": "p"},
        {"task": "fret", "query": "q three", "positive": "p", "task_description": None},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    text_format = text_formats.TextFormat(task_descriptions={"fret": "search result"})
    batches = open_batches(
        files=(path,), text_format=text_format, batch_size=3, query_length=64
    )
    assert set(query_texts(batches, batches.batch(0))) == {
        "task: facts | query: q one",
        "task: search result | query: q two",
        "task: search result | query: q three",
    }
    examples = summary.summarize(batches)["tasks"][0]["examples"]
    assert examples[0]["query"] == "task: facts | query: q one"


def test_summary_shows_a_mixture(open_batches):
    shown = summary.summarize(open_batches(), examples=2)
    assert shown["num_examples"] == 42
    first = shown["tasks"][0]
    assert first["task_description"] == "search result"
    assert first["num_examples"] == 24
    assert (
        first["examples"][0]["query"] == "task: search result | query: docs question 0"
    )
    assert len(first["examples"]) == 2


def test_unique_ids_end_the_texts_of_classification_triples(open_batches, tmp_path):
    """With `data.unique_ids` the texts are those the paper makes (section 3.3)."""
    paths, opened = {}, {}
    for kind in classification.UNIQUE_IDS:
        paths[kind] = tmp_path / f"{kind}.jsonl"
        triples, _ = samples.split(
            classification.triples(samples.LABELLED, unique_ids=kind)
        )
        if kind == "mask":  # Groups count from 1, the numbers of the paper's from 0.
            triples = [t | {"negative_group": t["negative_group"] - 1} for t in triples]
            triples[0] |= {"negative_group": 9}
        else:
            for name in ("query", "positive"):
                triples[0][name] = triples[0][name].removesuffix(" 0") + " 9"
            triples[0]["negatives"] = [
                content.removesuffix(" 0") + " 9" for content in triples[0]["negatives"]
            ]
        lines = [json.dumps({"task": "labels", **triple}) for triple in triples]
        paths[kind].write_text("\n".join(lines))
        opened[kind] = open_batches(
            files=(str(paths[kind]),), batch_size=4, unique_ids=kind == "mask"
        )
    for step in range(3):
        assert_same(opened["mask"].batch(step), opened["text"].batch(step))
    batch = opened["mask"].batch(0)
    assert not batch["negative_group"].any()
    masked = open_batches(files=(str(paths["mask"]),), batch_size=4)
    assert set(masked.batch(0)["negative_group"]) == {9, 1, 2, 3}
    assert masked.mixture_hash != opened["mask"].mixture_hash
    # Without ids the facts say nothing of them: caches and runs from before go on.
    assert "unique_ids" not in masked.facts
    assert opened["mask"].facts["unique_ids"] is True


def test_without_unique_ids_caches_keep_their_keys(pairs, folder):
    pieces = vocabularies.load(task_table.QUICKSTART_VOCABULARY)
    source = cache.summarize_source(str(pairs), folder)
    task = task_table.Task("docs", (str(pairs),), "docs", "search result")
    facts = {
        "version": 1,
        "max_tokens": cache.MAX_TOKENS,
        "source_task": "docs",
        "sources": [source.sha256],
        "templates": dataclasses.asdict(
            formatting.templates(text_formats.TextFormat(), "docs")
        ),
        "vocabulary": pieces.fingerprint,
    }
    expected = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    assert cache.key(task, [source], text_formats.TextFormat(), pieces) == expected
    with_ids = dataclasses.replace(task, unique_ids=True)
    assert cache.key(with_ids, [source], text_formats.TextFormat(), pieces) != expected
