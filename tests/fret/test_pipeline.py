"""The stages of a run, and rows without an answer."""

import json
import threading
import time

import fake_llm
import fret_runs
import pytest

from gecko_jax.fret import pipeline, records, runs
from gecko_jax.io import progress


@pytest.fixture
def corpus(tmp_path):
    return fret_runs.write_corpus(tmp_path)


def _break(share, reply):
    def fault(path, body, number):
        return reply if number % 10 < share and "echo" in body else None

    return fault


def test_rows_without_an_answer_are_error_rows(corpus, tmp_path):
    fault = _break(1, (400, {}, "too long"))
    with fake_llm.FakeServer(faults=[fault]) as fake:
        config = fret_runs.load(corpus, fake.url, "run.max_error_rate=1.0")
        summary = runs.run(config, tmp_path / "run")
    likelihood = summary.stages["likelihood"]
    errors = likelihood["dropped"]["error_rejected"]
    assert 0 < errors < 15
    assert summary.stages["relevance"]["records"] == 15 - errors
    assert summary.stages["fuse"]["kept"] == 15 - errors
    path = tmp_path / "run/likelihood"
    rows = [json.loads(x) for p in path.glob("*.jsonl") for x in p.open()]
    failed = next(row for row in rows if records.DROPPED in row)
    assert None in failed["log_probs"]
    assert "too long" in failed["detail"]


def test_too_many_errors_stop_the_run(corpus, tmp_path):
    fault = _break(10, (500, {}, "out of memory"))
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(corpus, fake.url, "llm.retries=0")
        runs.run(config, tmp_path / "run", until="retrieve")
        fake.faults = [lambda p, b, n: fault(p, b, n) if "Passage" in str(b) else None]
        with pytest.raises(ValueError, match=r"3 of 3 rows.*status_500.*out of memory"):
            runs.run(config, tmp_path / "run")
        fake.faults = ()
        runs.run(config, tmp_path / "run")
        assert not fret_runs.repeated(fake)
        runs.run(config, tmp_path / "fresh")
    found = fret_runs.contents(tmp_path / "run")
    assert found == fret_runs.contents(tmp_path / "fresh")


def test_a_judge_without_weight_is_not_asked(corpus, tmp_path):
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(
            corpus, fake.url, "fuse.likelihood_weight=0", "llm.scoring=none"
        )
        summary = runs.run(config, tmp_path / "run")
        assert not any('"echo"' in key for key in fake.answered)
    assert "likelihood" not in summary.stages
    assert summary.stages["fuse"]["kept"] == 15


def test_a_gecko_retrieves(corpus, tmp_path, tiny_gecko, monkeypatch):
    monkeypatch.setattr(
        pipeline.Source, "gecko", property(lambda self: tiny_gecko), raising=True
    )
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(
            corpus, fake.url, "retrieve.model=tiny", "retrieve.dim=8"
        )
        summary = runs.run(config, tmp_path / "run", until="retrieve")
        runs.run(config, tmp_path / "run", until="retrieve")
    assert summary.stages["retrieve"]["kept"] == 15
    row = json.loads((tmp_path / "run/retrieve/shard-00002.jsonl").open().readline())
    assert row["id"] in row["candidates"]
    generated = (tmp_path / "run/generate/shard-00002.jsonl").open().readline()
    asked = json.loads(generated)
    passages = [
        json.loads(line)["text"]
        for path in sorted((tmp_path / "run/passages").glob("shard-*.jsonl"))
        for line in path.open()
    ]
    query = tiny_gecko.encode_queries([asked["query"]], asked["task"], dim=8)
    cosines = (query @ tiny_gecko.encode_passages(passages, dim=8).T)[0]
    best = cosines.argsort()[::-1][:3].tolist()
    assert row["candidates"][:2] == best[:2]


def test_workers_with_parts_wait_for_all_vectors(
    corpus, tmp_path, tiny_gecko, monkeypatch
):
    monkeypatch.setattr(pipeline.Source, "gecko", property(lambda self: tiny_gecko))
    faults = []
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(corpus, fake.url, "retrieve.model=tiny")

        def work(worker):
            try:
                runs.run(config, tmp_path / "run", worker=worker, until="retrieve")
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=work, args=[(i, 2)]) for i in range(2)]
        threads[0].start()
        time.sleep(1.0)  # It has made its vectors, and must wait for the others.
        threads[1].start()
        for thread in threads:
            thread.join()
    assert not faults
    assert len(list((tmp_path / "run/retrieve").glob("shard-*.jsonl"))) == 5


def test_stages_that_ask_the_model_show_finished_rows(corpus, tmp_path, monkeypatch):
    shown = {}

    class Bar(progress.Progress):
        def __init__(self, description, total=None, start=0):
            super().__init__(description, total, start, enabled=False)
            self._steps = shown.setdefault(description, [])
            self._steps.append((start, total))

        def update(self, step, text=""):
            self._steps.append((step, self._total))

    monkeypatch.setattr(progress, "Progress", Bar)
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(corpus, fake.url)
        runs.run(config, tmp_path / "run", until="likelihood")
        assert shown["retrieve"][-1] == (5, 5)  # Shards.
        for name in ("generate", "likelihood"):
            steps, totals = zip(*shown[name], strict=True)
            assert set(totals) == {15}
            assert list(steps) == sorted(steps)
            assert set(range(0, 16, 2)) <= set(steps)
        for name in (".done.json", "shard-00001.jsonl"):
            (tmp_path / "run/likelihood" / name).unlink()
        shown.clear()
        runs.run(config, tmp_path / "run", until="likelihood")
        assert shown["likelihood"][0] == (11, 15)
