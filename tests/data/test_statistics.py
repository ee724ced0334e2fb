"""What `gecko data show` counts of a mixture, by hand on a few lines and as a user."""

import json
import pathlib
import re

import numpy as np
import pytest

from gecko_jax.cli import entry
from gecko_jax.data import (
    decontamination,
    features,
    jsonl,
    mixtures,
    prepare,
    statistics,
    task_table,
)
from gecko_jax.plots import length_histograms
from gecko_jax.text import overlap, text_formats, vocabularies

CONFIG = f"{pathlib.Path(__file__).parents[2]}/configs/finetune.py:local"
PIECES = vocabularies.load(task_table.QUICKSTART_VOCABULARY)
LINES = [
    {"task": "a", "query": "one gecko", "positive": "A lizard."},
    {"task": "b", "query": "ONE gecko?", "positive": "Another " * 40},
    {"task": "a", "query": "One  gecko!", "positive": "a lizard", "title": "T"},
    {
        "task": "a",
        "query": "two",
        "positive": "A lizard.",
        "negatives": ["no", "n " * 9],
    },
    {"task": "a", "query": "two", "positive": "Others", "task_description": " facts "},
]


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return str(path)


def collect(tmp_path, records, **changes):
    path = write(tmp_path / "pairs.jsonl", records)
    rows = task_table.from_files(
        [path], [jsonl.summarize(path).examples], text_formats.TextFormat()
    )
    arguments = {
        "vocabulary": PIECES,
        "text_format": text_formats.TextFormat(),
        "shape": features.Shape(query_length=16, passage_length=32, num_negatives=1),
        "batch_size": 4,
        "one_task_per_batch": False,
    }
    drawn = mixtures.Mixture(tuple(row.name for row in rows))
    return statistics.collect(rows, drawn, **{**arguments, **changes})


def test_texts_are_counted_by_hand(tmp_path):
    found = collect(tmp_path, LINES)
    first, second = found.tasks
    assert (first.name, first.num_examples, first.num_sampled) == ("a", 4, 4)
    assert (first.rate, second.rate) == (0.8, 0.2)
    assert first.repeated == {"query": 2, "positive": 2, "pair": 1}
    assert second.repeated == {"query": 0, "positive": 0, "pair": 0}
    assert found.overlaps == {("a", "b"): {"query": 1, "positive": 0, "pair": 0}}
    assert first.descriptions == {"facts": 1}
    queries = [
        *(f"task: a | query: {q}" for q in ("one gecko", "One gecko!", "two")),
        "task: facts | query: two",
    ]
    passages = [
        "title: none | text: A lizard.",
        "title: T | text: a lizard",
        "title: none | text: A lizard.",
        "title: none | text: no",
        f"title: none | text: {' '.join('n' * 9)}",
        "title: none | text: Others",
    ]
    assert first.query_lengths.tolist() == [len(t) for t in PIECES.encode(queries)]
    assert first.passage_lengths.tolist() == [len(t) for t in PIECES.encode(passages)]


def test_a_large_task_is_sampled_evenly_and_alike(tmp_path):
    records = [
        {"task": "a", "query": "x " * (n + 1), "positive": f"p {n}"} for n in range(300)
    ]
    found = collect(tmp_path, records, sample=50)
    (task,) = found.tasks
    assert (task.num_examples, task.num_sampled) == (300, 50)
    again = collect(tmp_path, records, sample=50).tasks[0]
    np.testing.assert_array_equal(again.query_lengths, task.query_lengths)
    # The mean of 50 of the numbers 1 to 300 is within 4 standard errors of 150.
    longest = collect(tmp_path, records, sample=300).tasks[0].query_lengths
    assert abs(task.query_lengths.mean() - longest.mean()) < 4 * 87 / 50**0.5
    # Duplicates are counted over all lines.
    assert collect(tmp_path, records + records[:7], sample=5).tasks[0].repeated == {
        "query": 7,
        "positive": 7,
        "pair": 7,
    }


def test_padding_is_that_of_the_batches(tmp_path):
    record = {"task": "a", "query": "one gecko", "positive": "A lizard."}
    shape = features.Shape(query_length=64, passage_length=64, packing=True)
    found = collect(tmp_path, [record], shape=shape, batch_size=32)
    (query,), (passage,) = found.tasks[0].query_lengths, found.tasks[0].passage_lengths
    assert found.padding["query", False] == pytest.approx(1 - query / 64)
    assert found.padding["passage", False] == pytest.approx(1 - passage / 64)
    rows = shape.round_rows(-(-32 // min(64 // int(query), shape.num_segments)))
    assert found.padding["query", True] == pytest.approx(1 - 32 * query / (64 * rows))
    assert found.padding["both", True] < found.padding["both", False]


@pytest.mark.parametrize("one_task", [False, True])
def test_batches_are_drawn_by_rate(tmp_path, monkeypatch, one_task):
    lines = [{"task": "b", "query": f"b {n}", "positive": "p " * 90} for n in range(9)]
    batches = []
    convert = features.convert
    monkeypatch.setattr(
        features,
        "convert",
        lambda examples, shape: batches.append(examples) or convert(examples, shape),
    )
    collect(tmp_path, [*LINES[:1], *lines], batch_size=50, one_task_per_batch=one_task)
    is_long = [[len(e.positive) > 40 for e in batch] for batch in batches]
    if one_task:
        assert all(len(set(batch)) == 1 for batch in is_long)
    else:
        assert 0.8 < np.mean(is_long) < 0.97


def test_lines_with_texts_of_evaluation_sets_are_reported(tmp_path):
    known = overlap.Contamination()
    run = " ".join(f"w{n}" for n in range(20))
    known.add("geckos", "query", [("q1", "one gecko"), ("q2", run)])
    known.add("geckos", "passage", [("p1", "A lizard.")])
    known.add("other", "sentence", [("1", "of nothing")])
    long = {"task": "b", "query": f"so {run}", "positive": "x", "negative": "a LIZARD"}
    path = write(tmp_path / "pairs.jsonl", [*LINES, long])
    rows = task_table.from_files(
        [path], [jsonl.summarize(path).examples], text_formats.TextFormat()
    )
    first, second = decontamination.find(rows, known, 3)
    assert (first.task, first.num_lines, list(first.shared)) == ("a", 4, ["geckos"])
    shared = first.shared["geckos"]
    assert (shared.lines, shared.same) == (3, 3)
    assert shared.sides == {"query": 2, "passage": 3}
    assert [(hit.place, hit.part) for hit in first.examples] == [
        (f"{path}:1", "query"),
        (f"{path}:3", "query"),
        (f"{path}:1", "positive"),
    ]
    assert second.shared["geckos"].sides == {"query": 2, "passage": 1}
    assert len(decontamination.find(rows, known, 1)[0].examples) == 1
    assert (second.shared["geckos"].lines, second.shared["geckos"].same) == (2, 2)
    (match,) = known.find(long["query"])
    assert not match.is_same
    assert match.shared == " ".join(f"w{n}" for n in range(13))


def test_lengths_are_drawn(tmp_path):
    one = length_histograms.plot_lengths(
        [("a", [3, 9, 70], [5])], 64, 512, tmp_path / "1.png"
    )
    many = [("a name that is too long to be shown", [3], [])] * 4
    four = length_histograms.plot_lengths(many, 64, 512, tmp_path / "4.png")
    assert one.read_bytes()[:4] == four.read_bytes()[:4] == b"\x89PNG"


def gecko(capsys, *arguments):
    status = entry.main(["data", "show", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.fixture
def options(tmp_path):
    path = write(tmp_path / "pairs.jsonl", LINES)
    changes = [f"files={path}", f"cache_dir={tmp_path}/cache"]
    return [f"--config={CONFIG}", *(f"--config.data.{key}" for key in changes)]


def test_stats_are_printed_and_drawn(tmp_path, capsys, options):
    picture = tmp_path / "new" / "lengths.png"
    status, out, _ = gecko(capsys, *options, "--stats", f"--output={picture}")
    assert status == 0
    assert "2 tasks, 5 lines; token counts are those of all lines" in out
    assert re.search(
        r"\n  a +4 of 4 +80\.0% +\d+ +\d+ +\d+ +\d+ +0\.0% +0\.0% +▃█", out
    )
    assert "cut at 32" in out
    assert "cut at 128" in out
    assert re.search(r"\n  a +2 \(50\.0%\) +2 \(50\.0%\) +1 \(25\.0%\)\n", out)
    assert re.search(r"\n  a, b +1 +0 +0\n", out)
    assert re.search(r"\n  packed +\d", out)
    assert "a: 1 line with a task description, 1 distinct: 'facts' 1" in out
    assert picture.exists()
    # Nothing is tokenized into the cache for a look.
    assert not (tmp_path / "cache" / "tasks").exists()


def test_contamination_is_printed(tmp_path, capsys, options):
    sts = tmp_path / "sts.tsv"
    sts.write_text("one gecko\tnothing\t3\nmore\tof it\t1\n")
    status, out, _ = gecko(capsys, *options, f"--decontaminate={sts},quickstart")
    assert status == 0
    assert re.search(r"\n  a +4 +sts +2 \(50\.00%\) +2 +2 sentence\n", out)
    assert f"\na, {tmp_path}/pairs.jsonl:1: the query contains\n" in out
    assert "  sentence 1 of sts, same text:\n    one gecko\n" in out
    clean = tmp_path / "clean.tsv"
    clean.write_text("nothing\tof\t3\nit\tat all\t1\n")
    _, out, _ = gecko(capsys, *options, f"--decontaminate={clean}")
    assert "a: no matches in 4 lines" in out


@pytest.fixture
def prepared(tmp_path):
    """One set of a mixture of four, with a task description on a line."""
    source = tmp_path / "qa.jsonl"
    write(source, [{"title": f"q {n}", "answer": f"a {n}"} for n in range(3)])
    task = next(t for t in task_table.TASKS if t.name == "stackexchange_qa")
    prepare.prepare(task, tmp_path / "prepared", source=str(source))
    return tmp_path / "prepared"


def test_mixture_is_printed_prepared_or_not(capsys, prepared):
    status, out, _ = gecko(capsys, "gecko_prefinetune", f"--prepared-dir={prepared}")
    assert status == 0
    assert out.startswith("gecko_prefinetune: 4 tasks, temperature 1, cap 2000000; ")
    # Among the tasks of known size; the cap of 2,000,000 holds for gooaq.
    assert (
        "\ngooaq: 3,112,679 examples, 100.0%; licence Apache-2.0; not prepared" in out
    )
    assert "\nstackexchange_qa: 3 examples, 0.0%; licence CC-BY-SA-4.0\n" in out
    assert "\nstackexchange_title_body: unknown size, -; licence" in out
    assert "  jsonl; t = 'question answering'\n" in out
    assert "  may contain texts of CQADupstack, " in out
    _, out, _ = gecko(capsys, "snli", f"--prepared-dir={prepared}")
    assert out.startswith("snli: 1 task, ")
    assert "t = 'semantic similarity', symmetric" in out
    _, out, _ = gecko(capsys, "imdb_sentiment", f"--prepared-dir={prepared}")
    assert "\n  restricted: IMDb's reviews come without a licence" in out
    _, out, _ = gecko(capsys, "quickstart")
    assert "\nquickstart_docs: 1,374 examples, 35.9%; licence PostgreSQL" in out


def test_reports_take_what_is_prepared(capsys, prepared):
    status, out, _ = gecko(
        capsys,
        "gecko_prefinetune",
        f"--prepared-dir={prepared}",
        "--decontaminate=quickstart",
        "--stats",
        f"--config={CONFIG}",
    )
    assert status == 0
    assert out.startswith(
        "Left out, because not prepared: gooaq, stackexchange_title_body"
    )
    assert "1 task, 3 lines" in out
    assert "stackexchange_qa: no matches in 3 lines" in out
    status, again, _ = gecko(
        capsys,
        "gecko_prefinetune",
        f"--config={CONFIG}",
        f"--config.data.prepared_dir={prepared}",
        "--stats",
    )
    assert status == 0
    assert again in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "mixture 'nothing' is unknown: choose one of quickstart"),
        (["quickstart", "--stats"], "--stats: needs lengths and a vocabulary; add"),
        (
            ["--decontaminate=quickstart"],
            "--decontaminate: needs data; give a MIXTURE or --config",
        ),
        (["quickstart", "--output=a.png"], "--output: is the plot of --stats"),
        (["quickstart", "--decontaminate=nowhere"], "nowhere: no such file or folder"),
        (
            ["gecko_academic", "--prepared-dir=nowhere", "--decontaminate=quickstart"],
            "not prepared in nowhere; run `gecko data prepare natural_questions`",
        ),
        (
            [f"--config={CONFIG}", "--config.data.files=none.jsonl", "--stats"],
            "none.jsonl: no such file",
        ),
    ],
)
def test_bad_command_lines_are_told(capsys, arguments, message):
    status, out, err = gecko(capsys, *arguments)
    assert status == 1
    assert message in err
    assert not out
