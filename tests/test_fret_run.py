"""A run ends with the same bytes however it is interrupted, and asks nothing twice."""

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
import pytest

from gecko_jax import config as config_lib
from gecko_jax import flags
from gecko_jax.data import jsonl
from gecko_jax.fret import bootstrap, export, measure, pipeline, records, report
from gecko_jax.fret import requests as requests_lib
from gecko_jax.fret import run as run_lib

ROOT = pathlib.Path(__file__).parents[1]
WORDS = (
    *("gecko", "insect", "wall", "night", "house", "warm", "toes", "hairs", "climb"),
    *("glass", "bridge", "river", "stone", "train", "station", "coast", "honey"),
    *("acid", "water", "bacteria", "ancient", "tomb", "council", "vote", "spring"),
    *("printer", "paper", "light", "cover", "green", "potato", "vinegar", "mustard"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus, and the workdir of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("made")
    rng = random.Random(0)
    with (folder / "corpus.jsonl").open("w") as lines:
        for number in range(17):
            words = " ".join(rng.sample(WORDS, 12))
            record = {"_id": f"d{number}", "text": f"Passage {number} about {words}."}
            lines.write(json.dumps(record | {"licence": "CC0-1.0"}) + "\n")
    with fake_llm.FakeServer() as fake:
        run_lib.run(load(folder / "corpus.jsonl", fake.url), folder / "fresh")
        assert not repeated(fake)
    return folder


@pytest.fixture
def corpus(made, tmp_path):
    return pathlib.Path(shutil.copy(made / "corpus.jsonl", tmp_path))


@pytest.fixture
def fresh(made, tmp_path):
    """A copy of that run, and the bytes of its files."""
    return contents(shutil.copytree(made / "fresh", tmp_path / "fresh"))


def load(corpus, url="http://127.0.0.1:9", *overrides):
    return flags.load(
        f"{ROOT / 'configs/fret.py'}",
        [
            f"--config.passages.files={corpus}",
            "--config.passages.shard_rows=4",
            "--config.passages.near_duplicate=0.0",
            f"--config.llm.url={url}",
            "--config.llm.model=fake",
            "--config.llm.concurrency=3",
            "--config.llm.retries=4",
            "--config.llm.retry_seconds=0.01",
            "--config.generate.shots=2",
            "--config.retrieve.num_candidates=3",
            "--config.calibrate.num_seeds=2",
            *(f"--config.{override}" for override in overrides),
        ],
    )


def contents(workdir):
    """Every file that a run is judged by, with its bytes."""
    return {
        path.relative_to(workdir).as_posix(): path.read_bytes()
        for path in sorted(workdir.rglob("*"))
        if path.is_file()
        and not {requests_lib.FOLDER, records.LOCKS} & set(path.parts)
        and path.name != "config.json"
        and path.suffix != ".tmp"  # of a process that was killed
    }


def repeated(fake):
    """Requests answered more than once, those of the canary left out."""
    return set(fake.repeated) - fake_llm.canary_keys(fake)


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
    assert "CC0-1.0 15" in fresh["export/README.md"].decode()
    rows = [
        json.loads(line) for line in fresh["generate/shard-00000.jsonl"].splitlines()
    ]
    assert {"shots", "seed", "raw", "prompt", "task", "query"} <= rows[0].keys()
    # The held-out seeds stay out.
    seeds = {t["seed"] for t in triples}
    assert seeds == set(range(17)) - set(run_lib.held_out(load(corpus), 17))


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
        config = load(corpus, fake.url, "llm.retries=12")
        run_lib.run(config, tmp_path / "run")
        assert not repeated(fake)
    assert contents(tmp_path / "run") == fresh


class Killed(BaseException):
    """The end of the process, as a test can watch it."""


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_write_the_rerun_is_the_same(
    corpus, tmp_path, fresh, seed, monkeypatch
):
    rng = random.Random(seed)
    rename, put = pathlib.Path.replace, requests_lib.RequestLog.put
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
    monkeypatch.setattr(requests_lib.RequestLog, "put", killing_put)
    kills = 0
    with fake_llm.FakeServer() as fake:
        for _ in range(200):
            countdown[0] = rng.randint(1, 60)
            try:
                run_lib.run(load(corpus, fake.url), tmp_path / "run")
                break
            except Killed:
                kills += 1
        assert kills > 2
        assert not repeated(fake)
    assert contents(tmp_path / "run") == fresh


SCRIPT = """
import pathlib, sys
sys.path[:0] = [{tests!r}]
import test_fret_run
from gecko_jax.fret import run
run.run(test_fret_run.load({corpus!r}, {url!r}), pathlib.Path({workdir!r}))
"""


def start(corpus, url, workdir):
    script = SCRIPT.format(
        tests=str(ROOT / "tests"), corpus=str(corpus), url=url, workdir=str(workdir)
    )
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
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
        times = [fake.answered[key] - 1 for key in repeated(fake)]
        assert sum(times) <= 3 * kills
    assert contents(tmp_path / "run") == fresh


def test_two_workers_share_a_folder(corpus, tmp_path, fresh):
    def dawdle(path, body, number):
        time.sleep(0.01)

    faults = []
    with fake_llm.FakeServer(faults=[dawdle]) as fake:

        def work():
            try:
                run_lib.run(load(corpus, fake.url), tmp_path / "run")
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not repeated(fake)
    assert not faults
    assert contents(tmp_path / "run") == fresh


def test_workers_with_parts_of_their_own_need_no_locks(
    corpus, tmp_path, fresh, monkeypatch
):
    with fake_llm.FakeServer() as fake:
        config = load(corpus, fake.url)
        for worker in ((1, 2), (0, 2)):
            run_lib.run(config, tmp_path / "run", worker=worker)
        made = sorted(p.name for p in (tmp_path / "run/fuse").glob("shard-*"))
        assert len(made) == 5
        run_lib.run(config, tmp_path / "run")
        assert not repeated(fake)
    assert contents(tmp_path / "run") == fresh


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("llm.model=other", "model.model: was 'fake', is 'other'"),
        ("llm.revision=abc", "model.revision: was '', is 'abc'"),
        ("generate.temperature=0.9", "sampling.temperature: was 0.7, is 0.9"),
        ("generate.prompt=generate_for_task", "prompt.name: was 'generate', is"),
        ("seed=1", "seed: was 0, is 1"),
        ("passages.min_words=2", "rules.min_words: was 10, is 2"),
        ("fuse.k=60", "settings.k: was 0.0, is 60"),
    ],
)
def test_a_changed_setting_is_refused_by_name(
    corpus, tmp_path, fresh, override, difference
):
    with pytest.raises(ValueError, match=re.escape(difference)) as error:
        run_lib.run(load(corpus, "http://127.0.0.1:9", override), tmp_path / "fresh")
    assert "begun with other settings" in str(error.value)
    assert contents(tmp_path / "fresh") == fresh


def test_a_changed_file_is_refused(corpus, tmp_path, fresh):
    corpus.write_text(corpus.read_text() + '{"text": "another passage"}\n')
    with pytest.raises(ValueError, match=r"files\.corpus\.jsonl: was"):
        run_lib.run(load(corpus), tmp_path / "fresh")


def test_a_changed_prompt_file_is_refused(corpus, tmp_path):
    mine = tmp_path / "mine.toml"
    text = (ROOT / "gecko_jax/fret/prompt_files/likelihood.toml").read_text()
    mine.write_text(text)
    with fake_llm.FakeServer() as fake:
        config = load(corpus, fake.url, f"likelihood.prompt={mine}")
        run_lib.run(config, tmp_path / "run", until="likelihood")
        mine.write_text(text.replace("night train", "day train"))
        with pytest.raises(ValueError, match=r"prompt\.sha256: was"):
            run_lib.run(config, tmp_path / "run")


def test_the_budget_stops_and_the_rerun_goes_on(corpus, tmp_path, fresh):
    with fake_llm.FakeServer() as fake:
        config = load(corpus, fake.url)
        calls = 0
        while True:
            budget = run_lib.open_budget(config, max_requests=40)
            summary = run_lib.run(config, tmp_path / "run", budget=budget)
            calls += 1
            if not summary.stopped:
                break
            assert "max_requests=40" in summary.stopped
            assert budget.requests == 40
            assert summary.output is None
        assert calls > 2
        assert not repeated(fake)
    assert contents(tmp_path / "run") == fresh


def test_a_recording_stands_for_the_server(corpus, tmp_path, fresh):
    config = load(corpus, "http://127.0.0.1:9", f"llm.recording={tmp_path / 'fresh'}")
    summary = run_lib.run(config, tmp_path / "again")
    assert summary.budget.requests == 0
    assert contents(tmp_path / "again") == fresh


def test_a_run_leaves_no_connection_open(corpus, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fake_llm.FakeServer() as fake:
            run_lib.run(load(corpus, fake.url), tmp_path / "run", until="generate")
            config = load(corpus, fake.url, "llm.model=other")
            with pytest.raises(ValueError, match="does not serve it"):
                run_lib.run(config, tmp_path / "other", until="generate")
        gc.collect()
    assert not [w for w in caught if issubclass(w.category, ResourceWarning)]


def _break(share, reply):
    def fault(path, body, number):
        return reply if number % 10 < share and "echo" in body else None

    return fault


def test_rows_without_an_answer_are_error_rows(corpus, tmp_path):
    fault = _break(1, (400, {}, "too long"))
    with fake_llm.FakeServer(faults=[fault]) as fake:
        config = load(corpus, fake.url, "run.max_error_rate=1.0")
        summary = run_lib.run(config, tmp_path / "run")
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


def test_too_many_errors_stop_the_run(corpus, tmp_path, fresh):
    fault = _break(10, (500, {}, "out of memory"))
    with fake_llm.FakeServer() as fake:
        config = load(corpus, fake.url, "llm.retries=0")
        run_lib.run(config, tmp_path / "run", until="retrieve")
        fake.faults = [lambda p, b, n: fault(p, b, n) if "Passage" in str(b) else None]
        with pytest.raises(ValueError, match=r"3 of 3 rows.*status_500.*out of memory"):
            run_lib.run(config, tmp_path / "run")
        fake.faults = ()
        run_lib.run(config, tmp_path / "run")
        assert not repeated(fake)
    assert contents(tmp_path / "run") == fresh


def test_a_judge_without_weight_is_not_asked(corpus, tmp_path):
    with fake_llm.FakeServer() as fake:
        config = load(corpus, fake.url, "fuse.likelihood_weight=0", "llm.scoring=none")
        summary = run_lib.run(config, tmp_path / "run")
        assert not any('"echo"' in key for key in fake.answered)
    assert "likelihood" not in summary.stages
    assert summary.stages["fuse"]["kept"] == 15


def test_a_gecko_retrieves(corpus, tmp_path, tiny_gecko, monkeypatch):
    monkeypatch.setattr(
        pipeline.Source, "gecko", property(lambda self: tiny_gecko), raising=True
    )
    with fake_llm.FakeServer() as fake:
        config = load(corpus, fake.url, "retrieve.model=tiny", "retrieve.dim=8")
        summary = run_lib.run(config, tmp_path / "run", until="retrieve")
        run_lib.run(config, tmp_path / "run", until="retrieve")
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
        config = load(corpus, fake.url, "retrieve.model=tiny")

        def work(worker):
            try:
                run_lib.run(config, tmp_path / "run", worker=worker, until="retrieve")
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


def test_calibration_measures_the_seed_among_the_candidates(corpus, tmp_path):
    with fake_llm.FakeServer() as fake:
        config = load(corpus, fake.url, "calibrate.num_seeds=3")
        found = measure.calibrate(config, tmp_path / "run")
        run_lib.run(config, tmp_path / "run")
        assert not repeated(fake)
        sent = fake.received
        again = measure.calibrate(config, tmp_path / "run")
        assert (again, fake.received) == (found, sent)
    assert found.seeds == 3
    assert {"retrieval", "QL", "RC", "fusion", "chance"} == found.mrr.keys()
    assert found.mrr["chance"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert found.mrr["QL"] > found.mrr["chance"]


def test_calibration_warns_when_fusing_hurts():
    from gecko_jax.fret import settings

    weights = settings.fusion_settings(load("x"))
    mrr = {"QL": 0.8, "RC": 0.3, "fusion": 0.6}
    (hurts, blind) = measure._warnings(mrr, 0.29, weights)
    assert "fusing hurts: 0.600 against 0.800 of QL" in hurts
    assert "fuse.relevance_weight=0" in hurts
    assert "RC does not judge" in blind
    assert not measure._warnings(mrr | {"RC": 0.7, "fusion": 0.9}, 0.29, weights)


def test_the_plan_counts_what_the_run_sends(corpus, tmp_path):
    with fake_llm.FakeServer() as fake:
        config = load(corpus, fake.url, "llm.price_input=1.0", "llm.price_output=2.0")
        plan = measure.plan(config, tmp_path / "run", 2)
        assert plan.sample == 6
        summary = run_lib.run(config, tmp_path / "run")
    planned = {kind.name: kind.requests for kind in plan.kinds}
    sent = {
        name: done["usage"].get("requests") for name, done in summary.stages.items()
    }
    assert planned == {name: sent[name] for name in planned}
    assert plan.cost == pytest.approx(summary.budget.cost, rel=0.2)


def test_bootstrap_trains_on_the_queries_and_their_seeds(corpus, tmp_path):
    with fake_llm.FakeServer() as fake:
        config = load(corpus, fake.url)
        with pytest.raises(ValueError, match="--until=generate"):
            bootstrap.write_pairs(config, tmp_path / "run")
        run_lib.run(config, tmp_path / "run", until="generate")
        path, count = bootstrap.write_pairs(config, tmp_path / "run")
    pairs = list(jsonl.read_pairs(path))
    assert len(pairs) == count == 15
    assert all(not pair.negatives for pair in pairs)
    training = flags.load(
        f"{ROOT / 'configs/prefinetune.py'}:local", ["--config.data.batch_size=8"]
    )
    assert bootstrap.training_config(training, path, count).data.files == (str(path),)
    with pytest.raises(ValueError, match="more than the 3 pairs there"):
        bootstrap.training_config(training, path, 3)
    small = bootstrap.training_config(training, path, 3, batch_size=2, num_steps=20)
    config_lib.check(small)
    assert (small.data.batch_size, small.train.num_steps) == (2, 20)
    finetune = flags.load(f"{ROOT / 'configs/finetune.py'}:local")
    with pytest.raises(ValueError, match="in-batch negatives only"):
        bootstrap.training_config(finetune, path, count)


def test_the_report_escapes_all_that_was_written(corpus, tmp_path):
    attack = '<script>alert("x")</script> gecko insect wall night house & warm <b>toes'
    with corpus.open("a") as lines:
        lines.write(json.dumps({"text": attack, "title": "<img src=x>"}) + "\n")
    with fake_llm.FakeServer() as fake:
        config = load(corpus, fake.url, "passages.min_words=5")
        with pytest.raises(ValueError, match="no run here"):
            report.write(config, tmp_path / "run", 3)
        run_lib.run(config, tmp_path / "run", until="generate")
        with pytest.raises(ValueError, match="no shard is fused yet"):
            report.write(config, tmp_path / "run", 3)
        run_lib.run(config, tmp_path / "run")
        page = report.write(config, tmp_path / "run", 30).read_text()
    assert "&lt;script&gt;alert(&quot;x&quot;)" in page
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("<article>") == 16
    assert "default-src 'none'" in page
    for shown in ("of positives are not the seed", "rank of the seed, by QL", "tokens"):
        assert shown in page


def test_kendall_counts_the_pairs():
    assert report.kendall([1, 2, 3], [1, 2, 3]) == 1.0
    assert report.kendall([1, 2, 3], [3, 2, 1]) == -1.0
    assert report.kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)


def test_rare_tasks_are_search_results(corpus, tmp_path):
    with fake_llm.FakeServer() as fake:
        config = load(corpus, fake.url, "export.max_tasks=1")
        summary = run_lib.run(config, tmp_path / "run")
    triples = [json.loads(line) for line in summary.output.open()]
    described = {t["task_description"] for t in triples}
    assert len(described) == 3
    assert len({t["task"] for t in triples} - {export.OTHER_TASK}) <= 1


def test_every_fault_of_the_config_is_told(tmp_path):
    config = load(
        "x", "localhost:8000", "llm.scoring=guess", "retrieve.num_candidates=1"
    )
    with pytest.raises(ValueError, match="the config has faults") as error:
        run_lib.run(config, tmp_path / "run")
    for key in ("llm.url", "llm.scoring", "retrieve.num_candidates"):
        assert f"{key}=" in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("llm.model=", "name the model"),
        ("llm.chat=True", "no query is scored"),
        ("llm.scoring=none", "no query is scored"),
        ("generate.max_words=1", "must not be below"),
    ],
)
def test_keys_must_fit_each_other(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_lib.run(load("x", "http://a", override), tmp_path / "run")


@pytest.mark.parametrize(
    "argument",
    ["", ":local", ":local,recorded", ":local,llama_cpp", ":llama_cpp", ":hosted"],
)
def test_every_config_is_whole(argument):
    from gecko_jax.fret import settings

    path = f"{ROOT / 'configs/fret.py'}{argument}"
    overrides = ["--config.llm.model=m", "--config.passages.files=a.jsonl"]
    settings.check(flags.load(path, overrides))
