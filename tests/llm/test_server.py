"""The client of a server returns right numbers or an error, never an invented one."""

import contextlib
import dataclasses
import json
import math
import threading
import time

import fake_llm
import pytest

from gecko_jax.llm import canary, protocol, request_log, server, wire

SAMPLING = protocol.Sampling(0.0, 1.0, 16, ("\n\n",))
PROMPT = "Passage: geckos eat insects\nQuery:"
OPEN = contextlib.ExitStack()


@pytest.fixture(autouse=True)
def _close():
    yield
    OPEN.close()


def connect(fake, budget=None, **changes):
    values = {
        "url": fake.url,
        "model": "fake",
        "revision": "r1",
        "api_key_env": "",
        "chat": False,
        "scoring": "echo",
        "top_log_probs": 20,
        "concurrency": 4,
        "retries": 3,
        "retry_seconds": 0.01,
        "timeout_seconds": 5.0,
        "requests_per_minute": 0,
        "tokens_per_minute": 0,
    }
    settings = server.ServerSettings(**(values | changes))
    model = server.connect(settings, budget or request_log.Budget())
    OPEN.callback(model.close)
    return model


def expected(prompt, continuation):
    total, before = 0.0, fake_llm.split(prompt)[-1]
    for token in fake_llm.split(continuation):
        total += fake_llm.log_prob(prompt, before, token)
        before = token
    return total


# --- Right answers ------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("scoring", ["echo", "echo_tokens", "forced"])
def test_scores_sum_the_continuation_alone(scoring, bos):
    with fake_llm.FakeServer(bos=bos) as fake:
        model = connect(fake, scoring=scoring)
        found = model.score([PROMPT, PROMPT], [" geckos eat", " planes land"])
    for score, text in zip(found, (" geckos eat", " planes land"), strict=True):
        assert score.num_tokens == 2
        assert score.log_prob == pytest.approx(expected(PROMPT, text), abs=1e-5)


@pytest.mark.parametrize("chat", [False, True])
def test_generation_and_labels(chat):
    with fake_llm.FakeServer() as fake:
        model = connect(fake, chat=chat)
        prompts = [f"Passage: passage {n} tells of geckos\nQuery:" for n in range(9)]
        texts = model.generate(prompts, range(9), SAMPLING)
        (labels,) = model.label_log_probs(
            [f"{PROMPT} geckos eat\nRelevance:"], ["Perfect", "Irrelevant"]
        )
    assert [t.text for t in texts] == [
        fake_llm.generate(p, n).partition("\n\n")[0] for n, p in enumerate(prompts)
    ]
    truth = fake_llm.labels(f"{PROMPT} geckos eat\nRelevance:")
    assert labels.log_probs == pytest.approx((truth[" Per"], truth[" Ir"]))


def test_requests_are_on_their_way_together():
    barrier = threading.Barrier(4)

    def meet(path, body, number):
        barrier.wait(5.0)

    with fake_llm.FakeServer(faults=[meet]) as fake:
        found = connect(fake).score([PROMPT] * 8, [f" a {n}" for n in range(8)])
    assert all(isinstance(score, protocol.Score) for score in found)


def test_equal_requests_are_sent_once_and_remembered(tmp_path):
    with fake_llm.FakeServer() as fake:
        model = connect(fake)
        with request_log.RequestLog(tmp_path / "log.jsonl") as model.log:
            model.score([PROMPT] * 3, [" a b"] * 3)
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write('{"key": "torn')
        with request_log.RequestLog(tmp_path / "log.jsonl") as model.log:
            (again,) = model.score([PROMPT], [" a b"])
            model.score([PROMPT], [" c d"])
        assert fake.received == 2
    assert again.log_prob == pytest.approx(expected(PROMPT, " a b"), abs=1e-5)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 2


class FullDisk:
    """A file on a disk with room for a few bytes."""

    def __init__(self, file):
        self.file = file

    def write(self, line):
        return self.file.write(line[:5])

    def __getattr__(self, name):
        return getattr(self.file, name)


def _text_answer(text):
    return dataclasses.asdict(protocol.Generation(text, False, protocol.Usage(3, 2)))


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    with request_log.RequestLog(path) as log:
        log.put("a", _text_answer("\ud800"))
        whole, log._file = log._file, FullDisk(log._file)
        with pytest.raises(OSError, match=r"No space left.*every answer before"):
            log.put("b", _text_answer("b"))
        assert log.get("b") is None
        log._file = whole
        log.put("c", _text_answer("c"))
    with request_log.RequestLog(path) as again:
        assert again.get("a") == _text_answer("\ud800")
        assert (again.get("b"), again.get("c")) == (None, _text_answer("c"))


def test_the_key_holds_whatever_changes_an_answer():
    facts, body = {"model": "m"}, {"prompt": "p", "seed": 1, "temperature": 0.7}
    key = protocol.request_key("generate", facts, body)
    assert key == protocol.request_key("generate", facts, dict(reversed(body.items())))
    others = [
        protocol.request_key("score", facts, body),
        protocol.request_key("generate", {"model": "n"}, body),
        protocol.request_key("generate", facts, body | {"seed": 2}),
        protocol.request_key("generate", facts, body | {"prompt": "q"}),
        protocol.request_key("generate", facts, body | {"temperature": 0.8}),
    ]
    assert len({key, *others}) == 6


def test_half_a_surrogate_pair_has_a_key_of_its_own():
    prompts = ["a", "a\ud800", "a\udc00"]
    keys = {
        protocol.request_key("generate", {}, {"prompt": prompt}) for prompt in prompts
    }
    assert len(keys) == 3


# --- Faults that pass ---------------------------------------------------------------


def fail_once(*answer):
    seen = set()

    def fault(path, body, number):
        key = json.dumps(body, sort_keys=True)
        if key in seen:
            return None
        seen.add(key)
        return answer[0] if answer == ("drop",) else answer

    return fault


@pytest.mark.parametrize(
    "fault",
    [
        (429, {"Retry-After": "0.02"}, {"error": "slow down"}),
        (500, {}, "internal error"),
        (503, {}, ""),
        (200, {}, '{"choices": [{"text": "cut o'),
        (200, {}, "[]"),
        ("drop",),
    ],
    ids=["429", "500", "503", "truncated", "list", "drop"],
)
def test_what_passes_is_tried_again(fault):
    with fake_llm.FakeServer(faults=[fail_once(*fault)]) as fake:
        found = connect(fake).score([PROMPT] * 2, [" a b", " c d"])
        assert fake.received == 4
        assert not fake.repeated
    assert all(isinstance(score, protocol.Score) for score in found)


def test_a_timeout_is_tried_again():
    wait = threading.Event()

    def hang(path, body, number):
        if number == 1:
            wait.wait(2.0)
            return (500, {}, "")
        return None

    with fake_llm.FakeServer(faults=[hang]) as fake:
        (found,) = connect(fake, timeout_seconds=0.2).score([PROMPT], [" a b"])
        wait.set()
    assert isinstance(found, protocol.Score)


def test_what_does_not_pass_is_a_failure_and_never_kept():
    with fake_llm.FakeServer(faults=[lambda *unused: (500, {}, "broken")]) as fake:
        model = connect(fake, retries=2)
        (found,) = model.score([PROMPT], [" a b"])
        assert fake.received == 3
        assert found == protocol.Failure("status_500", "broken")
        fake.faults = ()
        (found,) = model.score([PROMPT], [" a b"])
    assert isinstance(found, protocol.Score)


def test_a_prompt_that_is_refused_is_not_sent_again():
    refuse = (400, {}, {"error": "prompt is too long"})
    with fake_llm.FakeServer(faults=[lambda *unused: refuse]) as fake:
        (found,) = connect(fake).score([PROMPT], [" a b"])
        assert fake.received == 1
    assert found.reason == "rejected"
    assert "too long" in found.detail


# --- Replies that mislead -----------------------------------------------------------


def _change(change):
    def twist(path, reply):
        change(reply["choices"][0], reply)
        return reply

    return twist


def _no_echo(choice, reply):
    choice["logprobs"] = {"tokens": ["."], "token_logprobs": [0.0]}


def _cut_list(choice, reply):
    choice["logprobs"]["token_logprobs"].pop()


def _null_inside(choice, reply):
    choice["logprobs"]["token_logprobs"][-2] = None


def _not_finite(choice, reply):
    choice["logprobs"]["token_logprobs"][-2] = math.nan


def _above_zero(choice, reply):
    choice["logprobs"]["token_logprobs"][-2] = 3.0


def _merged_border(choice, reply):
    chosen = choice["logprobs"]
    place = chosen["tokens"].index(" a")
    chosen["tokens"][place - 1 : place + 1] = [": a"]
    del chosen["token_logprobs"][place]
    reply["usage"]["prompt_tokens"] -= 1


def _other_text(choice, reply):
    tokens = choice["logprobs"]["tokens"]
    tokens[:] = ["?" for _ in tokens]


MISLEADING = {
    "no_log_probs": lambda choice, reply: choice.pop("logprobs"),
    "echo_ignored": _no_echo,
    "cut": _cut_list,
    "null": _null_inside,
    "nan": _not_finite,
    "positive": _above_zero,
    "border": _merged_border,
    "other": _other_text,
    "no_choice": lambda choice, reply: reply.pop("choices"),
}
REASONS = {
    "cut": "no_log_probs",
    "null": "no_log_probs",
    "nan": "no_log_probs",
    "positive": "no_log_probs",
    "other": "border",
}


@pytest.mark.parametrize("case", MISLEADING)
def test_a_reply_without_the_number_is_a_failure(case):
    with fake_llm.FakeServer(twist=_change(MISLEADING[case])) as fake:
        (found,) = connect(fake).score([PROMPT], [" a b"])
    assert isinstance(found, protocol.Failure)
    assert found.reason == REASONS.get(case, case)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c, r: c["logprobs"].update(top_logprobs=[{" Per": -1.0}]), "label_m"),
        (
            lambda c, r: c["logprobs"].update(top_logprobs=[{"x": -1, "": -9}]),
            "label_m",
        ),
        (lambda c, r: c["logprobs"].update(top_logprobs=[]), "no_log_probs"),
        (lambda c, r: c.pop("logprobs"), "no_log_probs"),
        (lambda c, r: c["logprobs"].update(top_logprobs=[{" Per": "x"}]), "no_log"),
    ],
)
def test_labels_that_are_not_there_are_a_failure(change, reason):
    with fake_llm.FakeServer(twist=_change(change)) as fake:
        (found,) = connect(fake).label_log_probs(["a"], ["Perfect", "Irrelevant"])
    assert isinstance(found, protocol.Failure)
    assert found.reason.startswith(reason)


def test_a_character_cut_in_two_is_marked():
    reply = {"choices": [{"text": "a \ud83e\udd8e \ud83e", "finish_reason": "length"}]}
    found = wire.read_generation(reply, False, "a")
    assert found == ("a \U0001f98e \ufffd", True)


def test_beginnings_of_a_label_are_added_up():
    pairs = [(" Per", math.log(0.2)), ("Perfect", math.log(0.1)), ("\u2581I", -1.0)]
    found = wire.match_labels(pairs, ["Perfect", "Irrelevant"])
    assert found == pytest.approx([math.log(0.3), -1.0])


@pytest.mark.parametrize(
    ("tokens", "border"),
    [
        (["ab", " c", " d"], 1),
        (["<s>", "ab", " c", " d"], 2),  # a special token before
        (["ab", " c", " d", " and"], 1),  # the token that the server wrote
        ([" ab", " c", " d"], 1),  # SentencePiece's space
    ],
)
def test_the_border_is_where_the_texts_meet(tokens, border):
    assert wire.align(tokens, "ab", " c d") == (border, border + 2)


LIZARD = "\N{LIZARD}"
BYTES = [f"bytes:\\x{byte:02x}" for byte in LIZARD.encode()]


@pytest.mark.parametrize(
    ("tokens", "prompt", "continuation", "found"),
    [
        (["a ", "\ufffd", "\ufffd", " c", "."], f"a {LIZARD}", " c", (3, 4)),
        (["a", " c ", "\ufffd", "\ufffd", "."], "a", f" c {LIZARD}", (1, 4)),
        (["a ", *BYTES, " c", "."], f"a {LIZARD}", " c", (5, 6)),
        (["a ", "", f"{LIZARD}", " c", "."], f"a {LIZARD}", " c", (3, 4)),
    ],
)
def test_split_characters_are_aligned(tokens, prompt, continuation, found):
    assert wire.align(tokens, prompt, continuation) == found


@pytest.mark.parametrize(
    "tokens",
    [
        ["b", " c", " d"],  # another prompt
        ["ab", " c", " e"],  # another continuation
        ["ab", " c"],  # cut off at the end
        ["b", " c", " d", "."],  # and at the beginning
        ["<s>", "<s>", "ab", " c", " d"],
        ["ab", " c", " d", ".", "."],  # more than we asked for
        ["ab c", " d"],  # the border within a token
        ["a", "b", "", " c", " d"],  # an empty token at the border: whose is it?
    ],
)
def test_tokens_that_do_not_spell_the_texts_are_refused(tokens):
    with pytest.raises(wire.NoAnswer):
        wire.align(tokens, "ab", " c d")


def test_alignment_takes_no_time_that_a_server_chooses():
    text = LIZARD * 2_000
    begin = time.monotonic()
    for tokens in (["\ufffd"] * 8_000, ["\ufffd\ufffd"] * 4_000, [""] * 5_000):
        with pytest.raises(wire.NoAnswer):
            wire.align(tokens, text, text[:50])
    assert time.monotonic() - begin < 5.0


# --- What stops a run ---------------------------------------------------------------


def test_a_missing_model_is_named():
    with (
        fake_llm.FakeServer(model="other") as fake,
        pytest.raises(ValueError, match="does not serve it; it has other"),
    ):
        connect(fake)


def test_a_missing_server_is_named():
    with fake_llm.FakeServer() as fake:
        url = fake.url
    with pytest.raises(OSError, match="no server answers"):
        connect(fake, url=url)


@pytest.mark.parametrize(
    ("status", "message"), [(401, "key is refused"), (404, "no such endpoint")]
)
def test_what_no_retry_mends_stops_at_once(status, message):
    with fake_llm.FakeServer(faults=[lambda *unused: (status, {}, "no")]) as fake:
        model = connect(fake, concurrency=1)
        with pytest.raises(ValueError, match=message):
            model.score([PROMPT] * 30, [f" a {n}" for n in range(30)])
        assert fake.received == 1


def test_a_server_that_goes_away_stops_the_run():
    with fake_llm.FakeServer() as fake:
        model = connect(fake)
    with pytest.raises(OSError, match="no server answers"):
        model.score([PROMPT], [" a b"])


def test_the_key_comes_from_the_environment(monkeypatch):
    with fake_llm.FakeServer() as fake:
        monkeypatch.delenv("FAKE_KEY", raising=False)
        with pytest.raises(ValueError, match="variable is not set"):
            connect(fake, api_key_env="FAKE_KEY")
        monkeypatch.setenv("FAKE_KEY", "s3cret")
        model = connect(fake, api_key_env="FAKE_KEY")
        model.score([PROMPT], [" a b"])
        assert fake.headers[0]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in json.dumps(model.facts)


def test_no_more_is_sent_than_the_budget_allows():
    texts = [f" a {n}" for n in range(30)]
    with fake_llm.FakeServer() as fake:
        budget = request_log.Budget(max_requests=7)
        model = connect(fake, budget)
        with pytest.raises(request_log.BudgetError, match="max_requests=7"):
            model.score([PROMPT] * 30, texts)
        assert fake.received == budget.requests == 7
        # What was answered is kept.
        assert sum(model.log.get(k) is not None for k in _keys(model, texts)) == 7


def _keys(model, texts):
    return [
        protocol.request_key(
            "score", model.facts, {"prompt": PROMPT, "continuation": text}
        )
        for text in texts
    ]


def test_no_more_is_spent_than_the_budget_allows():
    with fake_llm.FakeServer() as fake:
        budget = request_log.Budget(max_cost=2e-4, price_input=1.0, price_output=1.0)
        model = connect(fake, budget)
        with pytest.raises(request_log.BudgetError, match=r"max_cost=0\.0002"):
            model.score([PROMPT] * 60, [f" a {n}" for n in range(60)])
        assert 1e-4 < budget.cost <= 2e-4
    with pytest.raises(ValueError, match=r"set llm\.price_input"):
        request_log.Budget(max_cost=1.0)


def test_the_rate_is_kept(monkeypatch):
    slept = []
    with fake_llm.FakeServer() as fake:
        model = connect(fake, concurrency=1, requests_per_minute=60)
        stop = model._ask.__self__._stop
        monkeypatch.setattr(stop, "wait", lambda s: slept.append(s) or False)
        model.score([PROMPT] * 4, [f" a {n}" for n in range(4)])
    # The clock hardly moves when nobody sleeps: turns lie a second apart.
    assert sum(slept) > 4.0


# --- The canary ---------------------------------------------------------------------


def _shuffled(choice, reply):
    values = choice.get("logprobs", {}).get("token_logprobs")
    if values:
        values[1:] = [-6.0 - value for value in values[1:]]


@pytest.mark.parametrize("scoring", ["echo", "echo_tokens", "forced"])
def test_the_canary_passes_a_right_server(scoring):
    with fake_llm.FakeServer() as fake:
        canary.check(connect(fake, scoring=scoring), scores=True, labels=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_echo, "echo_ignored"),
        (lambda c, r: c.pop("logprobs", 0), "no_log_probs"),
        (_shuffled, "its words shuffled"),
        (
            lambda c, r: (
                c.get("logprobs", {}).update(
                    token_logprobs=[-1.0] * len(c["logprobs"].get("tokens", ""))
                )
                if "logprobs" in c
                else None
            ),
            "constant",
        ),
        (lambda c, r: c.pop("text"), "no_text"),
    ],
)
def test_the_canary_stops_a_misleading_server(change, message):
    with fake_llm.FakeServer(twist=_change(change)) as fake:
        model = connect(fake)
        with pytest.raises(ValueError, match=rf"(?s)cannot be trusted.*({message})"):
            canary.check(model, scores=True, labels=False)


def test_recorded_answers_stand_for_the_model(tmp_path):
    with fake_llm.FakeServer() as fake:
        model = connect(fake)
        request_log.write_model(tmp_path, model.name, model.facts)
        path = tmp_path / "requests" / "generate" / "shard-00000.jsonl"
        with request_log.RequestLog(path) as model.log:
            first = model.generate([PROMPT], [3], SAMPLING)
            model.score([PROMPT], [" a b"])
            model.label_log_probs(["a"], ["Perfect", "Good"])
    recorded = protocol.recorded(tmp_path)
    assert recorded.name == "fake@r1"
    assert recorded.generate([PROMPT], [3], SAMPLING) == first
    assert isinstance(recorded.score([PROMPT], [" a b"])[0], protocol.Score)
    (other,) = recorded.generate([PROMPT], [4], SAMPLING)
    assert other.reason == "not_recorded"
    with pytest.raises(ValueError, match="no recorded answers"):
        protocol.recorded(tmp_path / "requests" / "generate")
