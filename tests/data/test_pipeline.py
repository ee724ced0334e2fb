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
    features,
    formatting,
    mixtures,
    pipeline,
    selection,
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
        selected = {
            "mixture": "",
            "files": (str(pairs),),
            "vocabulary": vocabularies.load(task_table.QUICKSTART_VOCABULARY),
            "text_format": text_formats.TextFormat(
                task_descriptions={"docs": "search result"}
            ),
            "cache_dir": folder / "cache",
            "unique_ids": False,
        }
        # Both groups have this key, as in `loop.build_batches`.
        scores = {"scores": changes.pop("scores", False)}
        shape = {
            "query_length": 16,
            "passage_length": 32,
            "num_negatives": 2,
            "packing": False,
        }
        drawn = {"batch_size": 7, "one_task_per_batch": False, "seed": 3}
        for name, value in changes.items():
            (group,) = [g for g in (selected, shape, drawn) if name in g]
            group[name] = value
        return pipeline.Batches(
            selection.select(**selected, **scores),
            features.Shape(**shape, **scores),
            **drawn,
        )

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
    mixed = mixtures.Mixture(("docs", "code", "term"), cap=18)
    monkeypatch.setattr(mixtures, "MIXTURES", {"mixed": mixed})
    batches = open_batches(mixture="mixed", files=(), one_task_per_batch=one_task)
    assert batches.rates == (18 / 36, 12 / 36, 6 / 36)
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


PROGRAM = """
import hashlib, sys
from gecko_jax.data import features, pipeline, selection, task_table
from gecko_jax.text import text_formats, vocabularies

batches = pipeline.Batches(
    selection.select(
        mixture="", files=({pairs!r},), cache_dir={cache!r},
        vocabulary=vocabularies.load(task_table.QUICKSTART_VOCABULARY),
        text_format=text_formats.TextFormat(
            task_descriptions={{"docs": "search result"}}
        ),
    ),
    features.Shape(16, 32, 2), batch_size=7, one_task_per_batch=False, seed=3,
)
digest = hashlib.sha256()
for batch in batches.iterate(5, 9):
    for name in sorted(batch):
        digest.update(batch[name].tobytes())
print(digest.hexdigest(), "tensorflow" in sys.modules or "seqio" in sys.modules)
"""


def digest_of(batches):
    digest = hashlib.sha256()
    for batch in batches.iterate(5, 9):
        for name in sorted(batch):
            digest.update(batch[name].tobytes())
    return digest.hexdigest()


def test_cache_is_built_once_and_read_without_tensorflow(open_batches, folder, pairs):
    cache_dir = folder / "cache"
    digest = digest_of(open_batches())
    before = {p: p.stat().st_mtime_ns for p in cache_dir.rglob("*")}
    open_batches(batch_size=3)
    program = PROGRAM.format(pairs=str(pairs), cache=str(cache_dir))
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output.split() == [digest, "False"]
    assert before == {p: p.stat().st_mtime_ns for p in cache_dir.rglob("*")}


@pytest.mark.slow
def test_processes_that_build_caches_at_once_agree(open_batches, pairs, tmp_path):
    program = PROGRAM.format(pairs=str(pairs), cache=str(tmp_path))
    command = [sys.executable, "-c", program]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    digest = digest_of(open_batches())
    for process in running:
        output, _ = process.communicate()
        assert process.returncode == 0
        assert output.split()[0] == digest


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
        "tasks.term.examples: was 6, is None",
        "tasks.code.examples: was 12, is 11",
        "tasks.code.rate: was 12",
        "tasks.code.sources: was",
        "tasks.docs.format.task_description: was 'search result'",
    ):
        assert fact in message


def test_changed_sources_and_formats_make_other_caches(open_batches, pairs, tmp_path):
    def keys(path, text_format):
        digest, counts = cache.summarize_source(str(path), tmp_path)
        rows = task_table.from_files([path], [counts], text_format)
        text_format = formatting.complete_text_format(text_format, rows)
        pieces = vocabularies.load(task_table.QUICKSTART_VOCABULARY)
        return [cache.key(row, [digest], text_format, pieces) for row in rows]

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
        ({"query_length": 1}, "query_length=1: must be at least 2"),
        ({"passage_length": 4096}, "passage_length=4096: .* at most 2048"),
    ],
)
def test_bad_arguments_are_named(open_batches, changes, message):
    with pytest.raises(ValueError, match=message):
        open_batches(**changes)


def test_a_vocabulary_without_a_file_is_refused(open_batches, tmp_path):
    other = vocabularies.load(task_table.QUICKSTART_VOCABULARY, extra_ids=2)
    unnamed = vocabularies.Vocabulary(other.full_proto)
    with pytest.raises(ValueError, match="the vocabulary is not from a file; write it"):
        open_batches(vocabulary=unnamed, cache_dir=tmp_path)


def test_a_vocabulary_file_that_changed_is_refused(open_batches, tmp_path):
    path = tmp_path / "a.model"
    path.write_bytes(task_table.QUICKSTART_VOCABULARY.read_bytes())
    vocabulary = vocabularies.load(path)
    other = vocabularies.load(task_table.QUICKSTART_VOCABULARY, extra_ids=2)
    path.write_bytes(other.full_proto)
    with pytest.raises(ValueError, match=r"a\.model: has changed since it was read"):
        open_batches(
            vocabulary=vocabulary,
            text_format=text_formats.TextFormat(no_title="new"),
            cache_dir=tmp_path,
        )


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
    first = batches.examples(0, 1)[0].query
    assert batches.vocabulary.decode(first.tolist()) == "task: facts | query: q one"


def test_unique_ids_end_the_texts_of_classification_triples(open_batches, tmp_path):
    """With `data.unique_ids` the texts are those the paper makes (section 3.3)."""
    triples, _ = samples.split(classification.triples(samples.LABELLED))
    with_ids = []
    for triple in triples:
        number = triple["negative_group"]
        with_ids.append(
            {
                "query": f"{triple['query']} {number}",
                "positive": f"{triple['positive']} {number}",
                "negatives": [f"{text} {number}" for text in triple["negatives"]],
            }
        )
    paths, opened = {}, {}
    for kind, lines in (("mask", triples), ("text", with_ids)):
        paths[kind] = tmp_path / f"{kind}.jsonl"
        content = [json.dumps({"task": "labels", **line}) for line in lines]
        paths[kind].write_text("\n".join(content))
        opened[kind] = open_batches(
            files=(str(paths[kind]),), batch_size=4, unique_ids=kind == "mask"
        )
    for step in range(3):
        assert_same(opened["mask"].batch(step), opened["text"].batch(step))
    batch = opened["mask"].batch(0)
    assert not batch["negative_group"].any()
    masked = open_batches(files=(str(paths["mask"]),), batch_size=4)
    assert set(masked.batch(0)["negative_group"]) == {1, 2, 3, 4}
    assert masked.mixture_hash != opened["mask"].mixture_hash
    # Without ids the facts say nothing of them: caches and runs from before go on.
    assert "unique_ids" not in masked.facts
    assert opened["mask"].facts["unique_ids"] is True


def test_without_unique_ids_caches_keep_their_keys(pairs, folder):
    pieces = vocabularies.load(task_table.QUICKSTART_VOCABULARY)
    digest, _ = cache.summarize_source(str(pairs), folder)
    task = task_table.Task("docs", "search result", (str(pairs),))
    facts = {
        "version": 1,
        "max_tokens": cache.MAX_TOKENS,
        "source_task": "docs",
        "sources": [digest],
        "templates": dataclasses.asdict(
            formatting.templates(text_formats.TextFormat(), "docs")
        ),
        "vocabulary": pieces.fingerprint,
    }
    expected = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    assert cache.key(task, [digest], text_formats.TextFormat(), pieces) == expected
    with_ids = dataclasses.replace(task, unique_ids=True)
    assert cache.key(with_ids, [digest], text_formats.TextFormat(), pieces) != expected


@pytest.fixture(scope="module")
def scored(folder):
    """Example n has n % 4 negatives; its positive scores n, its negative m n + m/8."""
    path = folder / "scored.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for n in range(20):
            negatives = range(1, n % 4 + 1)
            record = {
                "task": "docs" if n < 12 else "code",
                "query": f"question {n}",
                "positive": f"answer {n}",
                "negatives": [f"wrong {n} {m}" for m in negatives],
                "negative_ids": [1000 * n + m for m in negatives],
            }
            if n % 5:
                record["scores"] = [n, *(n + m / 8 for m in negatives)]
                if n % 5 == 2:
                    record["scores"][-1] = None
            lines.write(json.dumps(record) + "\n")
    return path


def test_scores_follow_their_candidates_into_the_batch(open_batches, scored, caplog):
    settings = {"files": (str(scored),), "batch_size": 8, "num_negatives": 2}
    plain = open_batches(**settings)
    batches = open_batches(**settings, scores=True)
    assert "9 of the 12 examples of task docs have scores" in caplog.text
    packed = open_batches(**settings, scores=True, packing=True)
    score_of = {}
    for record in map(json.loads, scored.read_text().splitlines()):
        scores = record.get("scores", [None] * 9)
        ids = [f"passage_id:{one}" for one in record["negative_ids"]]
        score_of |= {
            text_formats.hash_words(one): score
            for one, score in zip(ids, scores[1:], strict=False)
        }
        query = text_formats.content_id(record["query"])
        score_of[query] = scores[0]
    for step in range(5):
        batch = batches.batch(step)
        found = batch.pop("scores")
        # Without the weight, the batch is as before.
        assert_same(plain.batch(step), batch)
        np.testing.assert_array_equal(packed.batch(step)["scores"], found)
        assert found.shape == (8, 3)
        assert found.dtype == np.float32
        for row in range(8):
            expected = [score_of[tuple(batch["query_id"][row].tolist())]]
            for mask, one in zip(
                batch["negative_mask"][row], batch["negative_id"][row], strict=True
            ):
                expected.append(score_of[tuple(one.tolist())] if mask else None)
            expected = [-np.inf if score is None else score for score in expected]
            np.testing.assert_array_equal(found[row], expected)
    # A run without scores keeps its cache and its hash.
    assert plain.mixture_hash != batches.mixture_hash
    assert features.largest(8, batches.shape)["scores"] == ((8, 3), np.float32)


def test_data_without_scores_is_refused(open_batches):
    message = r"loss\.kl_weight: no line of docs, code, term has scores; add them"
    with pytest.raises(ValueError, match=message):
        open_batches(scores=True)


def test_several_positives_are_examples_that_the_loss_tells_apart(
    open_batches, tmp_path
):
    line = {"task": "docs", "query": "q", "positives": ["a", "b"], "negatives": ["c"]}
    other = {"task": "docs", "query": "r", "positive": "d", "negatives": ["c"]}
    path = tmp_path / "several.jsonl"
    path.write_text("\n".join(map(json.dumps, (line, other))))
    batches = open_batches(files=(str(path),), batch_size=3)
    assert batches.num_examples == 3
    batch = batches.batch(0)
    assert len(np.unique(batch["query_id"], axis=0)) == 2
    assert len(np.unique(batch["passage_id"], axis=0)) == 3
    assert batch["negative_mask"][:, 0].all()
