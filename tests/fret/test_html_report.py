"""The page that shows a run."""

import json

import fake_llm
import fret_runs
import pytest

from gecko_jax.fret import html_report, report_facts, runs


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
    assert page.count("<article>") == 16
    assert "default-src 'none'" in page
    for shown in ("of positives are not the seed", "rank of the seed, by QL", "tokens"):
        assert shown in page


def test_kendall_counts_the_pairs():
    assert report_facts.kendall([1, 2, 3], [1, 2, 3]) == 1.0
    assert report_facts.kendall([1, 2, 3], [3, 2, 1]) == -1.0
    assert report_facts.kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
