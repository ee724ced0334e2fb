"""An interrupted run ends with the same bytes and repeats no request."""

import gc
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import fake_llm
import fret_runs
import pytest

from gecko_jax.data import jsonl
from gecko_jax.fret import runs
from gecko_jax.llm import request_log


@pytest.fixture(scope="module", params=["corpus", "pairs"])
def made(request, tmp_path_factory):
    """A corpus or pairs, and the workdir of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("made")
    write = {"corpus": fret_runs.write_corpus, "pairs": fret_runs.write_pairs}
    source = write[request.param](folder)
    with fake_llm.FakeServer() as fake:
        runs.run(fret_runs.load(source, fake.url), folder / "fresh")
        assert not fret_runs.repeated(fake)
    return source


of_a_corpus = pytest.mark.parametrize("made", ["corpus"], indirect=True)


@pytest.fixture
def corpus(made, tmp_path):
    return pathlib.Path(shutil.copy(made, tmp_path))


@pytest.fixture
def fresh(made, tmp_path):
    """A copy of that run, and the bytes of its files."""
    return fret_runs.contents(
        shutil.copytree(made.parent / "fresh", tmp_path / "fresh")
    )


@of_a_corpus
def test_golden_run(corpus, tmp_path, fresh):
    done = json.loads(fresh["fuse/.done.json"])
    assert (done["records"], done["kept"], done["shards"]) == (15, 15, 5)
    generated = json.loads(fresh["generate/.done.json"])
    assert generated["usage"]["requests"] == 15
    triples = [json.loads(line) for line in fresh["export/fret.jsonl"].splitlines()]
    first = triples[0]
    assert first["task"] in ("question answering", "search result", "fact checking")
    assert first["generator"] == "fake"
    assert (first["licence"], first["source"]) == ("CC0-1.0", "corpus.jsonl")
    pairs = list(jsonl.read_pairs(tmp_path / "fresh/export/fret.jsonl"))
    assert len(pairs) == 15
    assert all(len(pair.negatives) == 1 for pair in pairs)
    assert all(pair.positive != pair.negatives[0] for pair in pairs)
    assert "CC0-1.0 45" in fresh["export/README.md"].decode()
    # Each text has its own origin, not that of the seed.
    texts = {}
    for name, lines in fresh.items():
        if name.startswith("passages/shard-"):
            read = [json.loads(line) for line in lines.splitlines()]
            texts |= {passage["source_id"]: passage["text"] for passage in read}
    assert any(triple["source_id"] != triple["seed_source_id"] for triple in triples)
    for triple in triples:
        assert texts[triple["source_id"]] == triple["positive"]
        assert [texts[n] for n in triple["negative_source_ids"]] == triple["negatives"]
    rows = [
        json.loads(line) for line in fresh["generate/shard-00000.jsonl"].splitlines()
    ]
    assert {"shots", "seed", "raw", "prompt", "task", "query"} <= rows[0].keys()
    # The held-out seeds stay out.
    seeds = {t["seed"] for t in triples}
    assert seeds == set(range(17)) - set(runs.held_out(fret_runs.load(corpus), 17))


@pytest.mark.parametrize("name", ["retrieve/shard-00001", "passages/shard-00000"])
def test_a_shard_that_was_cut_later_is_refused(corpus, tmp_path, fresh, name):
    path = tmp_path / "fresh" / f"{name}.jsonl"
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], whole + b'{"a": 1}\n', None):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(ValueError, match=f"{name}.*had {len(whole):,} when"):
            runs.run(fret_runs.load(corpus), tmp_path / "fresh")
        path.write_bytes(whole)


def test_an_export_that_was_changed_is_refused_and_a_lost_one_made(
    corpus, tmp_path, fresh
):
    path = tmp_path / "fresh/export/fret.jsonl"
    path.write_text("edited")
    with pytest.raises(ValueError, match="not as this run wrote it"):
        runs.run(fret_runs.load(corpus), tmp_path / "fresh")
    path.unlink()
    runs.run(fret_runs.load(corpus), tmp_path / "fresh")
    assert path.read_bytes() == fresh["export/fret.jsonl"]


@of_a_corpus
def test_a_model_that_does_not_open_decides_nothing(corpus, tmp_path, monkeypatch):
    def refuse(config, budget):
        raise ValueError("no such model")

    monkeypatch.setattr(runs, "open_model", refuse)
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match="no such model"):
        runs.run(fret_runs.load(corpus), workdir)
    assert not (workdir / "generate").exists()
    assert not (workdir / "config.json").exists()


@of_a_corpus
def test_the_choice_follows_the_formula(fresh):
    likelihoods, relevances = (
        json.loads(fresh[f"{name}/shard-00001.jsonl"].splitlines()[0])
        for name in ("likelihood", "relevance")
    )
    fused = json.loads(fresh["fuse/shard-00001.jsonl"].splitlines()[0])
    found = json.loads(fresh["retrieve/shard-00001.jsonl"].splitlines()[0])
    perfect = [row[0] for row in relevances["label_log_probs"]]
    scores = []
    for place in range(3):
        rank = [
            1 + sum(other > values[place] for other in values)
            for values in (likelihoods["log_probs"], perfect)
        ]
        scores.append(1 / rank[0] + 1 / rank[1])
    assert fused["fused"] == pytest.approx(scores, abs=1e-6)
    best = max(range(3), key=lambda place: scores[place])
    worst = min(range(3), key=lambda place: (scores[place], -place))
    assert fused["positive"] == found["candidates"][best]
    assert fused["negative"] == found["candidates"][worst]
    assert fused["moved"] == (fused["positive"] != fused["id"])


@of_a_corpus
def test_faults_that_pass_change_nothing(corpus, tmp_path, fresh):
    rng, lock = random.Random(1), threading.Lock()

    def fault(path, body, number):
        with lock:
            draw = rng.random()
        if draw < 0.1:
            return (429, {"Retry-After": "0"}, "")
        if draw < 0.15:
            return (500, {}, "")
        if draw < 0.2:
            return (200, {}, '{"choices"')
        return "drop" if draw < 0.25 else None

    with fake_llm.FakeServer(faults=[fault]) as fake:
        config = fret_runs.load(corpus, fake.url, "llm.retries=12")
        runs.run(config, tmp_path / "run")
        assert not fret_runs.repeated(fake)
    assert fret_runs.contents(tmp_path / "run") == fresh


class Killed(BaseException):
    """The end of the process, as a test can watch it."""


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_write_the_rerun_is_the_same(
    corpus, tmp_path, fresh, seed, monkeypatch
):
    rng = random.Random(seed)
    rename, put = pathlib.Path.replace, request_log.RequestLog.put
    countdown = [0]

    def tick(when):
        countdown[0] -= 1
        if countdown[0] == 0:
            raise Killed(when)

    def killing_rename(self, target):
        tick("before a rename")
        result = rename(self, target)
        tick("after a rename")
        return result

    def killing_put(self, key, answer):
        put(self, key, answer)
        tick("after an answer")

    monkeypatch.setattr(pathlib.Path, "replace", killing_rename)
    monkeypatch.setattr(request_log.RequestLog, "put", killing_put)
    kills = 0
    with fake_llm.FakeServer() as fake:
        for _ in range(200):
            countdown[0] = rng.randint(1, 60)
            try:
                runs.run(fret_runs.load(corpus, fake.url), tmp_path / "run")
                break
            except Killed:
                kills += 1
        assert kills > 2
        assert not fret_runs.repeated(fake)
    assert fret_runs.contents(tmp_path / "run") == fresh


SCRIPT = """
import pathlib, sys
sys.path[:0] = [{tests!r}]
import fret_runs
from gecko_jax.fret import runs
runs.run(fret_runs.load({corpus!r}, {url!r}), pathlib.Path({workdir!r}))
"""


def start(corpus, url, workdir):
    script = SCRIPT.format(
        tests=str(fret_runs.ROOT / "tests"),
        corpus=str(corpus),
        url=url,
        workdir=str(workdir),
    )
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=fret_runs.ROOT,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(fret_runs.ROOT)},
    )


@pytest.mark.slow
def test_a_process_killed_at_20_moments_leaves_the_same_bytes(corpus, tmp_path, fresh):
    rng = random.Random(5)

    def dawdle(path, body, number):
        time.sleep(0.05)

    kills = 0
    with fake_llm.FakeServer(faults=[dawdle]) as fake:
        while kills < 20:
            process = start(corpus, fake.url, tmp_path / "run")
            received = fake.received
            for _ in range(2000):  # The start takes seconds; the run is what counts.
                if fake.received > received + 3 or process.poll() is not None:
                    break
                time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 0.15))
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        fake.faults = ()
        last = start(corpus, fake.url, tmp_path / "run")
        assert last.wait(120) == 0, last.stderr.read().decode()
        assert kills > 5
        # What was on its way when the process died is the only thing to ask again.
        times = [fake.answered[key] - 1 for key in fret_runs.repeated(fake)]
        assert sum(times) <= 3 * kills
    assert fret_runs.contents(tmp_path / "run") == fresh


def test_two_workers_share_a_folder(corpus, tmp_path, fresh):
    def dawdle(path, body, number):
        time.sleep(0.01)

    faults = []
    with fake_llm.FakeServer(faults=[dawdle]) as fake:

        def work():
            try:
                runs.run(fret_runs.load(corpus, fake.url), tmp_path / "run")
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not fret_runs.repeated(fake)
    assert not faults
    assert fret_runs.contents(tmp_path / "run") == fresh


def test_workers_with_parts_of_their_own_need_no_locks(
    corpus, tmp_path, fresh, monkeypatch
):
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(corpus, fake.url)
        for worker in ((1, 2), (0, 2)):
            runs.run(config, tmp_path / "run", worker=worker)
        assert len(list((tmp_path / "run/fuse").glob("shard-*"))) == 5
        runs.run(config, tmp_path / "run")
        assert not fret_runs.repeated(fake)
    assert fret_runs.contents(tmp_path / "run") == fresh


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("llm.model=other", "model.model: was 'fake', is 'other'"),
        ("llm.revision=abc", "model.revision: was '', is 'abc'"),
        ("seed=1", "seed: was 0, is 1"),
        ("passages.min_words=2", "rules.min_words: was 10, is 2"),
        ("retrieve.max_seed_rank=2", "max_seed_rank: was None, is 2"),
        ("fuse.k=60", "settings.k: was 0.0, is 60"),
        ("fuse.margin=0.1", "settings.margin: was None, is 0.1"),
    ],
)
def test_a_changed_setting_is_refused_by_name(
    corpus, tmp_path, fresh, override, difference
):
    _refuse(corpus, tmp_path, fresh, override, difference)


@of_a_corpus  # Pairs have their queries.
@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("generate.temperature=0.9", "sampling.temperature: was 0.7, is 0.9"),
        ("generate.prompt=generate_for_task", "prompt.name: was 'generate', is"),
    ],
)
def test_a_changed_prompt_is_refused_by_name(
    corpus, tmp_path, fresh, override, difference
):
    _refuse(corpus, tmp_path, fresh, override, difference)


def _refuse(corpus, tmp_path, fresh, override, difference):
    with pytest.raises(ValueError, match=re.escape(difference)) as error:
        runs.run(
            fret_runs.load(corpus, "http://127.0.0.1:9", override), tmp_path / "fresh"
        )
    assert "begun with other settings" in str(error.value)
    assert fret_runs.contents(tmp_path / "fresh") == fresh


def test_a_changed_file_is_refused(corpus, tmp_path, fresh):
    corpus.write_text(corpus.read_text() + corpus.read_text().splitlines()[0])
    is_corpus = corpus.name == "corpus.jsonl"
    message = r"files\.corpus\.jsonl: was" if is_corpus else r"pairs: was \[\['pairs\.j"
    with pytest.raises(ValueError, match=message):
        runs.run(fret_runs.load(corpus), tmp_path / "fresh")


@of_a_corpus
def test_a_changed_prompt_file_is_refused(corpus, tmp_path):
    mine = tmp_path / "mine.toml"
    text = (fret_runs.ROOT / "gecko_jax/fret/prompt_files/likelihood.toml").read_text()
    mine.write_text(text)
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(corpus, fake.url, f"likelihood.prompt={mine}")
        runs.run(config, tmp_path / "run", until="likelihood")
        mine.write_text(text.replace("night train", "day train"))
        with pytest.raises(ValueError, match=r"prompt\.sha256: was"):
            runs.run(config, tmp_path / "run")


def test_the_budget_stops_and_the_rerun_goes_on(corpus, tmp_path, fresh):
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(corpus, fake.url)
        calls = 0
        while True:
            budget = runs.open_budget(config, max_requests=40)
            summary = runs.run(config, tmp_path / "run", budget=budget)
            calls += 1
            if not summary.stopped:
                break
            assert "max_requests=40" in summary.stopped
            assert budget.requests == 40
            assert summary.output is None
        assert calls > 2
        assert not fret_runs.repeated(fake)
    assert fret_runs.contents(tmp_path / "run") == fresh


def test_a_recording_stands_for_the_server(corpus, tmp_path, fresh):
    config = fret_runs.load(
        corpus, "http://127.0.0.1:9", f"llm.recording={tmp_path / 'fresh'}"
    )
    summary = runs.run(config, tmp_path / "again")
    assert summary.budget.requests == 0
    assert fret_runs.contents(tmp_path / "again") == fresh


@of_a_corpus
def test_the_first_passages_are_seeds_and_all_are_candidates(corpus, tmp_path, fresh):
    no_server = ("http://127.0.0.1:9", f"llm.recording={tmp_path / 'fresh'}")
    config = fret_runs.load(corpus, *no_server, "generate.limit=6")
    summary = runs.run(config, tmp_path / "few")
    lines = summary.output.read_text().splitlines()
    all_lines = fresh["export/fret.jsonl"].decode().splitlines()
    assert lines == all_lines[:6]
    candidates = set()
    for name in fret_runs.contents(tmp_path / "few"):
        if name.startswith("retrieve/shard-"):
            rows = (tmp_path / "few" / name).read_text().splitlines()
            candidates |= {c for row in rows for c in json.loads(row)["candidates"]}
    assert max(candidates) > max(json.loads(line)["seed"] for line in lines)
    config.generate.limit = 7
    with pytest.raises(ValueError, match="limit: was 6, is 7"):
        runs.run(config, tmp_path / "few")
    config.relabel.files = (str(corpus),)
    with pytest.raises(ValueError, match=r"generate\.limit=7: no query is generated"):
        runs.run(config, tmp_path / "lines")


@of_a_corpus
def test_a_run_leaves_no_connection_open(corpus, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fake_llm.FakeServer() as fake:
            runs.run(
                fret_runs.load(corpus, fake.url), tmp_path / "run", until="generate"
            )
            config = fret_runs.load(corpus, fake.url, "llm.model=other")
            with pytest.raises(ValueError, match="does not serve it"):
                runs.run(config, tmp_path / "other", until="generate")
        gc.collect()
    assert not [w for w in caught if issubclass(w.category, ResourceWarning)]
