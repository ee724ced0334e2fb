"""The page that shows a run."""

import json
import re

import fake_llm
import fret_runs
import pytest

from gecko_jax.fret import html_report, measure, report_facts, runs


@pytest.fixture
def corpus(tmp_path):
    return fret_runs.write_corpus(tmp_path)


def test_the_report_escapes_all_that_was_written(corpus, tmp_path):
    attack = '<script>alert("x")</script> gecko insect wall night house & warm <b>toes'
    with corpus.open("a") as lines:
        lines.write(json.dumps({"text": attack, "title": "<img src=x>"}) + "\n")
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(corpus, fake.url, "passages.min_words=5")
        with pytest.raises(ValueError, match="no run here"):
            html_report.write(config, tmp_path / "run", 3)
        runs.run(config, tmp_path / "run", until="generate")
        with pytest.raises(ValueError, match="no shard is fused yet"):
            html_report.write(config, tmp_path / "run", 3)
        runs.run(config, tmp_path / "run")
        page = html_report.write(config, tmp_path / "run", 30).read_text()
    assert "&lt;script&gt;alert(&quot;x&quot;)" in page
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("<article>") == 16 + page.count("<div class=sides>")
    assert "default-src 'none'" in page
    for shown in ("of positives are not the seed", "rank of the seed, by QL", "tokens"):
        assert shown in page


def test_the_report_shows_what_moved_and_whether_the_judges_judge(tmp_path):
    pairs = fret_runs.write_pairs(tmp_path)
    with pairs.open("a") as lines:
        lines.write(pairs.read_text().splitlines()[0] + "\n")
    workdir = tmp_path / "run"
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(pairs, fake.url, "llm.price_input=1.0")
        summary = runs.run(config, workdir)
        page = html_report.write(config, workdir, 30).read_text()
        assert "gecko fret calibrate" in page
        found = measure.calibrate(config, workdir)
        page = html_report.write(config, workdir, 30).read_text()
    assert "gecko fret calibrate" not in page
    cells = re.findall(r"<td class=n>([0-9.]+) ± [0-9.]+", page)
    assert f"{found.mrr['QL']:.3f}" in cells
    reciprocal = []
    for shard in range(5):
        fused, found = (
            [json.loads(line) for line in (workdir / name).open()]
            for name in (f"{s}/shard-0000{shard}.jsonl" for s in ("fuse", "retrieve"))
        )
        for one, row in zip(fused, found, strict=True):
            seed = row["candidates"].index(row["seed"])
            reciprocal.append(1 / one["ranks"]["relevance"][seed])
    assert len(reciprocal) == 17
    assert f"{sum(reciprocal) / 17:.3f}" in cells
    moved = summary.stages["export"]["moved"]
    assert f"What moved: {moved} random examples" in page
    assert page.count("<div class=sides>") == moved == 3
    assert page.count("false negative?") >= 3
    assert "duplicate<td >was there before" in page
    done = summary.stages["likelihood"]["usage"]["prompt_tokens"]
    assert f"{done / 1e6:,.4f}" in page


def test_kendall_counts_the_pairs():
    assert report_facts.kendall([1, 2, 3], [1, 2, 3]) == 1.0
    assert report_facts.kendall([1, 2, 3], [3, 2, 1]) == -1.0
    assert report_facts.kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
