"""Faulty servers lead to an error row or to the right number, without delay.

Each fault is applied in every request mode. `fake_llm` answers correctly; a fault
changes its reply, or a server of a few raw bytes replaces it.
"""

import contextlib
import copy
import datetime
import email.utils
import gzip
import http.server
import json
import math
import os
import signal
import socket
import threading
import time

import fake_llm
import fret_runs
import pytest

from gecko_jax.fret import runs
from gecko_jax.llm import connections, protocol, request_log, server, wire

PROMPT = "Passage: geckos eat insects on warm walls\nQuery:"
TEXTS = (" geckos eat", " planes land soon")
LABELS = ("Perfect", "Good", "Slight", "Irrelevant")
SAMPLING = protocol.Sampling(0.0, 1.0, 16, ("\n\n",))

# Request mode -> settings of the client.
MODES = {
    "echo": {},
    "echo_tokens": {"scoring": "echo_tokens"},
    "forced": {"scoring": "forced"},
    "labels": {},
    "chat_labels": {"chat": True, "scoring": "none"},
    "generate": {},
    "chat_generate": {"chat": True, "scoring": "none"},
}


@contextlib.contextmanager
def connected(url, budget=None, **changes):
    values = {
        "url": url,
        "model": "fake",
        "revision": "",
        "api_key_env": "",
        "chat": False,
        "scoring": "echo",
        "top_log_probs": 20,
        "concurrency": 4,
        "retries": 1,
        "retry_seconds": 0.01,
        "timeout_seconds": 2.0,
        "requests_per_minute": 0,
        "tokens_per_minute": 0,
    }
    settings = server.ServerSettings(**(values | changes))
    model = server.connect(settings, budget or request_log.Budget())
    try:
        yield model
    finally:
        model.close()


def ask(model, mode):
    """Returns two answers as plain values."""
    if mode.endswith("generate"):
        found = model.generate([PROMPT, f"{PROMPT} a"], [0, 1], SAMPLING)
        return [getattr(answer, "text", None) for answer in found]
    if mode.endswith("labels"):
        found = model.label_log_probs([PROMPT, f"{PROMPT} a"], LABELS)
        return [getattr(answer, "log_probs", None) for answer in found]
    found = model.score([PROMPT] * 2, TEXTS)
    return [getattr(answer, "log_prob", None) for answer in found]


# --- Wrong answers ------------------------------------------------------------------


def _echo(change):
    """Returns a fault of the echoed tokens and their numbers."""

    def fault(reply):
        chosen = reply.get("choices", [{}])[0].get("logprobs") or {}
        if "tokens" in chosen:
            change(chosen, reply)
        return reply

    return fault


def _cut(size):
    def change(chosen, reply):
        for name in ("tokens", "token_logprobs"):
            chosen[name] = chosen[name][-size:]
        reply["usage"]["prompt_tokens"] = size - 1

    return change


def _cut_end(chosen, reply):
    for name in ("tokens", "token_logprobs"):
        chosen[name] = [*chosen[name][:-3], chosen[name][-1]]
    reply["usage"]["prompt_tokens"] -= 2


def _shift(chosen, reply):
    chosen["token_logprobs"] = [None, *chosen["token_logprobs"][:-1]]


def _merge(chosen, reply):
    tokens, values = chosen["tokens"], chosen["token_logprobs"]
    chosen["tokens"] = ["".join(tokens[n : n + 2]) for n in range(0, len(tokens), 2)]
    chosen["token_logprobs"] = [
        sum(filter(None, values[n : n + 2])) for n in range(0, len(values), 2)
    ]


def _other_tail(chosen, reply):
    chosen["tokens"][-3:-1] = [" qq", " rr"]


def _number(value, everywhere=False):
    """Returns a fault that replaces the log-probabilities, in every form of a reply."""

    def fault(reply):
        for entry in reply.get("completion_probabilities", ()):
            entry["logprob"] = value
        for choice in reply.get("choices", ()):
            chosen = choice.get("logprobs") or {}
            if "token_logprobs" in chosen:
                count = len(chosen["token_logprobs"]) if everywhere else 2
                chosen["token_logprobs"][-count:] = [value] * count
            for top in chosen.get("top_logprobs", ()):
                top.update(dict.fromkeys(top, value))
            for entry in chosen.get("content", ()):
                for listed in entry["top_logprobs"]:
                    listed["logprob"] = value
        return reply

    return fault


def _usage(**changes):
    def fault(reply):
        if "usage" in reply:
            reply["usage"].update(changes)
        if "tokens_evaluated" in reply:
            reply["tokens_evaluated"] = changes.get("prompt_tokens", 9)
        return reply

    return fault


def _add_to_usage(number):
    def fault(reply):
        if "usage" in reply:
            reply["usage"]["prompt_tokens"] += number
        return reply

    return fault


def _another_choice_first(reply):
    if "choices" in reply:
        reply["choices"][0]["index"] = 0
        other = copy.deepcopy(_number(-3.25)(copy.deepcopy(reply))["choices"][0])
        other.update(index=1, text=" other words", message={"content": " other words"})
        reply["choices"].insert(0, other)
    return reply


def _label_twice(reply):
    chosen = reply.get("choices", [{}])[0].get("logprobs") or {}
    for top in chosen.get("top_logprobs", ()):
        listed = [{"token": token, "logprob": v} for token, v in top.items()]
        reply["choices"][0]["logprobs"] = {"content": [{"top_logprobs": listed * 2}]}
    for entry in chosen.get("content", ()):
        entry["top_logprobs"] *= 2
    return reply


def _truncated(reply):
    return _number(-2.5)(reply) | {"truncated": True}


def _deep(reply):
    return '{"a":' * 100_000 + "1" + "}" * 100_000


FAULTS = {
    "usage one too high": _add_to_usage(1),
    "usage one too low": _add_to_usage(-1),
    "no usage": lambda reply: {k: v for k, v in reply.items() if k != "usage"},
    "negative usage": _usage(prompt_tokens=-1_000_000),
    "huge usage": _usage(prompt_tokens=10**400, completion_tokens=None),
    "usage as text": _usage(prompt_tokens="12"),
    "cut to the last 12": _echo(_cut(12)),
    "cut to the last 3": _echo(_cut(3)),
    "no end": _echo(_cut_end),
    "numbers one to the right": _echo(_shift),
    "tokens merged": _echo(_merge),
    "another continuation": _echo(_other_tail),
    "another text": _echo(lambda c, r: c.update(tokens=["x"] * len(c["tokens"]))),
    "a list too short": _echo(lambda c, r: c["token_logprobs"].pop()),
    "all the same": _echo(
        lambda c, r: c.update(token_logprobs=[-1.0] * len(c["tokens"]))
    ),
    "NaN": _number(math.nan),
    "infinity": _number(math.inf),
    "minus infinity": _number(-math.inf),
    "null": _number(None),
    "text": _number("-1.5"),
    "true": _number(True),
    "above 0": _number(1.5),
    "little above 0": _number(0.0005),
    "a sentinel": _number(-9999.0),
    "all zero": _number(0.0, everywhere=True),
    "more than a float": _number(-(10**400)),
    "another choice first": _another_choice_first,
    "a label twice": _label_twice,
    "truncated": _truncated,
    "an error beside": lambda reply: reply | {"error": {"message": "partial"}},
    "choices that are none": lambda reply: {"choices": [1], "usage": 5},
    "fields of other types": lambda reply: {
        "choices": [{"text": 5, "message": {"content": []}, "logprobs": 7}]
    },
    "an empty object": lambda reply: {},
    "a list": lambda reply: "[1, 2]",
    "half of it": lambda reply: json.dumps(reply)[: len(json.dumps(reply)) // 2],
    "deep": _deep,
    "a number of 6,000 digits": lambda reply: '{"a": ' + "9" * 6_000 + "}",
    "HTML": lambda reply: "<html>502</html>",
}


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_answer_is_never_a_number(mode):
    with fake_llm.FakeServer() as fake, connected(fake.url, **MODES[mode]) as model:
        right = ask(model, mode)
    assert None not in right
    for name, fault in FAULTS.items():
        # The texts of a reply are not compared with anything where text is asked for.
        with (
            fake_llm.FakeServer(twist=lambda _, reply, f=fault: f(reply)) as fake,
            connected(fake.url, **MODES[mode]) as model,
        ):
            begin = time.monotonic()
            found = ask(model, mode)
            assert time.monotonic() - begin < 5.0, name
        for value, truth in zip(found, right, strict=True):
            assert value is None or value == pytest.approx(truth), (name, found, right)


def test_faults_that_texts_settle_cost_no_answer():
    for name in ("usage one too high", "usage one too low", "no usage"):
        twist = FAULTS[name]
        with (
            fake_llm.FakeServer(twist=lambda _, reply, f=twist: f(reply)) as fake,
            connected(fake.url) as model,
        ):
            assert None not in ask(model, "echo")


@pytest.mark.parametrize(
    ("scoring", "faults"),
    [
        ("echo", ("usage one too high", "cut to the last 12", "another choice first")),
        ("forced", ("a label twice", "truncated", "a sentinel")),
    ],
)
def test_a_run_takes_no_wrong_number(tmp_path, scoring, faults):
    corpus = fret_runs.write_corpus(tmp_path)

    def numbers(workdir, twist):
        with fake_llm.FakeServer(twist=twist) as fake:
            config = fret_runs.load(
                corpus, fake.url, f"llm.scoring={scoring}", "run.max_error_rate=1.0"
            )
            with contextlib.suppress(ValueError):
                runs.run(config, workdir)
        rows = {}
        for stage in ("likelihood", "relevance"):
            for path in (workdir / stage).glob("shard-*.jsonl"):
                for record in map(json.loads, path.open()):
                    if "dropped" not in record:
                        values = record.get("log_probs", record.get("label_log_probs"))
                        rows[stage, record["id"]] = values
        return rows

    right = numbers(tmp_path / "right", None)
    assert right
    for name in faults:
        seen = []

        def twist(_, reply, fault=FAULTS[name], seen=seen):
            seen.append(reply)
            # The canary has its answers, and every eleventh reply after it is wrong.
            wrong = len(seen) > 20 and len(seen) % 11 == 0
            return fault(reply) if wrong else reply

        found = numbers(tmp_path / name, twist)
        assert found, name
        for key, values in found.items():
            assert values == right.get(key, values), (name, key)
        assert set(found) <= set(right), name


# --- What is charged ----------------------------------------------------------------


@pytest.mark.parametrize("fault", ["no usage", "negative usage", "usage as text"])
@pytest.mark.parametrize("mode", ["echo", "labels", "generate"])
def test_a_limit_holds_whatever_the_server_counts(fault, mode):
    budget = request_log.Budget(max_cost=1e-3, price_input=1.0, price_output=1.0)
    twist = FAULTS[fault]
    prompts = [f"{PROMPT} number {n}" for n in range(300)]
    ask_for = {
        "echo": lambda model: model.score(prompts, [" a b"] * len(prompts)),
        "labels": lambda model: model.label_log_probs(prompts, LABELS),
        "generate": lambda model: model.generate(
            prompts, range(len(prompts)), SAMPLING
        ),
    }[mode]
    with (
        fake_llm.FakeServer(twist=lambda _, reply: twist(reply)) as fake,
        connected(fake.url, budget) as model,
        pytest.raises(request_log.BudgetError, match="max_cost"),
    ):
        ask_for(model)
    least = min(len(fake_llm.split(prompt)) for prompt in prompts)
    assert fake.received * least * 1e-6 <= 1e-3
    assert 0.5e-3 < budget.cost <= 1e-3


def test_a_request_whose_reply_is_lost_is_charged():
    budget = request_log.Budget(price_input=1.0)
    with (
        fake_llm.FakeServer(faults=[lambda *unused: "drop"]) as fake,
        connected(fake.url, budget, retries=0) as model,
    ):
        assert ask(model, "echo") == [None, None]
    assert budget.prompt_tokens >= 2 * len(PROMPT)


# --- Time and memory ----------------------------------------------------------------


@contextlib.contextmanager
def raw_server(*parts, pause=0.0, endless=False):
    """Answers every request with these parts, and repeats the last if endless."""
    ended = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *unused):
            pass

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            with contextlib.suppress(OSError):
                for part in parts:
                    self.wfile.write(part)
                    self.wfile.flush()
                    ended.wait(pause)
                while endless and not ended.is_set():
                    self.wfile.write(parts[-1])
                    ended.wait(pause)

        def do_GET(self):
            content = b'{"data": [{"id": "fake"}]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *unused):
            pass

    running = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        ended.set()
        running.shutdown()
        running.server_close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("parts", "pause"),
    [
        ((HEAD + b"Content-Length: 99999\r\n\r\n", b" "), 0.1),  # a dripped body
        ((b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"), 0.1),  # dripped headers
        ((CHUNKS, b"1\r\n \r\n"), 0.1),  # chunks without end
        ((b"HTTP/1.1 100 Continue\r\n\r\n",), 0.1),
        ((b"",), 0.1),  # nothing at all
    ],
)
def test_a_request_has_one_deadline(parts, pause):
    with raw_server(*parts, pause=pause, endless=True) as url:
        opened = connections.Connections(url, {})
        begin = time.monotonic()
        with pytest.raises(wire.NoAnswer) as failed:
            opened.request("POST", "/x", b"{}", 0.7, 1 << 20)
        assert 0.5 < time.monotonic() - begin < 3.0
        opened.close()
    assert failed.value.reason == "timeout"


def _bomb():
    packed = gzip.compress(bytes(1 << 26))
    fields = b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    return HEAD + fields + packed


@pytest.mark.parametrize(
    "parts",
    [(_bomb(),), (CHUNKS, b"100000\r\n" + b" " * (1 << 20) + b"\r\n")],
    ids=["compressed", "endless"],
)
def test_a_reply_has_a_size(parts):
    with raw_server(*parts, endless=len(parts) > 1) as url:
        opened = connections.Connections(url, {})
        with pytest.raises(wire.NoAnswer, match="more than 1,048,576") as failed:
            opened.request("POST", "/x", b"{}", 10.0, 1 << 20)
        opened.close()
    assert failed.value.reason == "too_large"


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_compressed_reply_is_read_whole_or_refused(keep):
    packed = gzip.compress(b'{"a": 1}')
    part = packed[: int(keep * len(packed))]
    fields = b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(part)
    with raw_server(HEAD + fields + part) as url:
        opened = connections.Connections(url, {})
        if keep == 1.0:
            assert opened.request("POST", "/", b"{}", 5.0, 99).body == b'{"a": 1}'
        else:
            with pytest.raises(wire.NoAnswer, match="has no end"):
                opened.request("POST", "/", b"{}", 5.0, 99)
        opened.close()


def test_an_interrupt_ends_requests_that_hang():
    with (
        raw_server(b"", pause=60.0) as url,
        connected(url, timeout_seconds=60.0, concurrency=8) as model,
    ):
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            model.score([PROMPT] * 40, [f" a {n}" for n in range(40)])
        assert time.monotonic() - begin < 5.0


def test_what_is_answered_within_a_moment_of_an_interrupt_is_kept():
    def slow(path, body, number):
        time.sleep(0.6)

    with (
        fake_llm.FakeServer(faults=[slow]) as fake,
        connected(fake.url, timeout_seconds=30.0) as model,
    ):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            model.score([PROMPT] * 40, [f" a {n}" for n in range(40)])
        assert fake.received == len(model.log._answers) == 4


# --- Tries --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 501, 507, 520, 529, 599])
def test_a_status_that_may_pass_is_tried_again(status):
    seen = []

    def fault(path, body, number):
        seen.append(number)
        return (status, {}, "busy") if len(seen) == 1 else None

    with (
        fake_llm.FakeServer(faults=[fault]) as fake,
        connected(fake.url, concurrency=1) as model,
    ):
        assert None not in ask(model, "echo")


def test_retry_after_is_seconds_or_a_date():
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=20)
    date = email.utils.format_datetime(soon, usegmt=True)
    assert 15 < server._seconds(date) <= 20
    assert server._seconds("3") == 3.0
    assert server._seconds("1e9") == 60.0
    odd = ("", "soon", "-5", "nan", "inf", "1e400", "Fri, 99 Nov 2026 25:00:00 GMT")
    assert [server._seconds(text) for text in odd] == [0.0] * len(odd)
    assert server._seconds("Fri, 27 Nov 1926 22:00:00 GMT") == 0.0


# --- Untrusted text -------------------------------------------------------------


def test_no_server_speaks_to_the_terminal():
    escape = "\x1b[31mred\x07"
    fake = fake_llm.FakeServer(model=escape)
    with (
        fake,
        pytest.raises(ValueError, match="does not serve it; it has") as missing,
        connected(fake.url),
    ):
        pass
    assert "\x1b" not in str(missing.value)
    assert "\x07" not in str(missing.value)
    for status in (400, 404, 500):
        with (
            fake_llm.FakeServer(faults=[lambda *_, s=status: (s, {}, escape)]) as fake,
            connected(fake.url, retries=0) as model,
        ):
            try:
                told = model.score([PROMPT], [" a b"])[0].detail
            except ValueError as error:
                told = str(error)
        assert "red" in told
        assert "\x1b" not in told
    with (
        fake_llm.FakeServer(
            twist=lambda _, reply: reply | {"error": {"message": escape}}
        ) as fake,
        connected(fake.url) as model,
    ):
        assert "\x1b" not in model.score([PROMPT], [" a b"])[0].detail


def test_ids_that_are_no_text_are_shown(monkeypatch):
    fake = fake_llm.FakeServer(model=5)
    with (
        fake,
        pytest.raises(ValueError, match="does not serve it; it has 5"),
        connected(fake.url),
    ):
        pass


def test_a_host_that_is_not_there_is_named():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
    with pytest.raises(OSError, match="no server answers"), connected(url):
        pass
