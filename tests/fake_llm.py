"""A rule-based language model behind a real HTTP server with the real wire format.

It generates the first words of the passage as a query. The likelihood of a query grows
with the number of its words in the passage, and a passage with most of the words is
rated perfect. Tests choose the responses: those of vLLM, of llama.cpp, or faulty ones.
The server counts its requests.
"""

import collections
import contextlib
import http.server
import itertools
import json
import math
import re
import threading
import zlib

from gecko_jax.llm import canary

_TOKEN = re.compile(r"\s*\w+|\s*[^\w\s]|\s+")
_FLUENT = canary._FLUENT.split()


def split(text):
    return _TOKEN.findall(text)


def _noise(*parts):
    return zlib.crc32("|".join(parts).encode()) / 2**32


def _fields(prompt):
    """Returns the last passage and query of a prompt."""
    open_part = prompt.rpartition("Passage:")[2]
    passage = open_part.partition("\n")[0]
    query = re.findall(r"Query:(.*)", open_part)
    return passage.strip(), query[-1].strip() if query else ""


def log_prob(prompt, before, token):
    """Returns the log-probability of a token after a prompt and a previous token."""
    if prompt.startswith("The following sentences"):
        pairs = itertools.pairwise(_FLUENT)
        known = {(a.strip(".").lower(), b.strip(".").lower()) for a, b in pairs}
        pair = (before.strip().lower(), token.strip().lower())
        return -0.5 if pair in known else -3.0 - _noise(before, token)
    words = set(_fields(prompt)[0].lower().split())
    known = token.strip().lower() in words
    return (-1.0 if known else -4.0) - 0.5 * _noise(prompt[-200:], token)


def generate(prompt, seed):
    passage, _ = _fields(prompt)
    words = [w for w in re.findall(r"[a-z]{4,}", passage.lower())][:12]
    start = int(_noise(prompt[-300:], str(seed)) * max(len(words) - 4, 1))
    query = " ".join(["about", *words[start : start + 4]])
    if prompt.endswith("Task:"):
        task = ("question answering", "search result", "fact checking")[seed % 3]
        return f" {task}\nQuery: {query}\n\nPassage: another"
    return f" {query}\n\nPassage: another"


def labels(prompt):
    """Returns log-probabilities of the first tokens after `Relevance:`."""
    if "capital of France" in prompt:
        return {" Paris": -0.1, " London": -2.5}
    passage, query = _fields(prompt)
    words = query.lower().split()
    held = sum(word in passage.lower() for word in words) / max(len(words), 1)
    weights = {" Per": 4 * held, " Good": 2.0, " Slight": 1.0, " Ir": 3 * (1 - held)}
    total = math.log(sum(math.exp(w) for w in weights.values()))
    jitter = 0.01 * _noise(prompt[-300:])
    return {token: w - total - jitter for token, w in weights.items()}


class FakeServer:
    """Counts and answers requests until it is closed.

    `faults` are functions of (path, body, request number). They return None, a (status,
    headers, text) to send instead of the response, or "drop" to close the connection.
    `twist(path, reply)` may change a correct response.
    """

    def __init__(self, model="fake", faults=(), twist=None, bos=False):
        self.model, self.faults, self.twist, self.bos = model, faults, twist, bos
        self.answered = collections.Counter()
        self.received = 0
        self.closed = False
        self.headers = []
        self.lock = threading.Lock()

    @property
    def repeated(self):
        """Returns the requests that got more than one correct response."""
        return {k: n for k, n in self.answered.items() if n > 1}

    def reply(self, path, body):
        if path == "/tokenize":
            text = body.get("prompt", body.get("content"))
            tokens = [zlib.crc32(t.encode()) % 2**30 for t in split(text)]
            with self.lock:
                self.names = getattr(self, "names", {}) | dict(
                    zip(tokens, split(text), strict=True)
                )
            head = [1] if body.get("add_special") and self.bos else []
            return {"tokens": head + tokens, "count": len(head + tokens)}
        if path == "/completion":
            prompt = "".join(self.names.get(i, "") for i in body["prompt"])
            ids = [int(i) for i in re.findall(r"<\[(\d+)\]>", body["grammar"])]
            before, listed = "", []
            for i in ids:
                value = log_prob(prompt, before, self.names[i])
                listed.append({"id": i, "token": self.names[i], "logprob": value})
                before = self.names[i]
            return {
                "completion_probabilities": listed,
                "tokens_evaluated": len(body["prompt"]),
                "tokens_predicted": len(ids),
            }
        chat = path == "/v1/chat/completions"
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        if isinstance(prompt, list):
            prompt = "".join(self.names.get(i, "") for i in prompt)
        tokens = (["<s>"] if self.bos else []) + split(prompt)
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 1}
        if body.get("echo"):
            values, before = [None], tokens[0]
            for position, token in enumerate(tokens[1:], start=1):
                context = "".join(tokens[self.bos : position])
                cut = context.rfind("Query:")
                context = context[: cut + 6] if cut > 0 else context
                values.append(log_prob(context, before, token))
                before = token
            chosen = {"tokens": [*tokens, "."], "token_logprobs": [*values, -1.0]}
            choice = {"text": prompt + ".", "logprobs": chosen}
        elif body.get("logprobs"):
            top = labels(prompt)
            listed = [{"token": t, "logprob": v} for t, v in top.items()]
            best = max(top, key=lambda t: top[t])
            if chat:
                choice = {
                    "message": {"content": best},
                    "logprobs": {"content": [{"token": best, "top_logprobs": listed}]},
                }
            else:
                choice = {"text": best, "logprobs": {"top_logprobs": [top]}}
        else:
            text = generate(prompt, body["seed"])
            text = text.partition("\n\n")[0]
            usage["completion_tokens"] = len(split(text))
            choice = {"message": {"content": text}} if chat else {"text": text}
        choice["finish_reason"] = "stop"
        return {"choices": [choice], "usage": usage}

    def handler(self):
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # Headers and body in one packet: no delayed ACK.

            def log_message(self, *unused):
                pass

            def do_GET(self):
                self._send(200, {}, {"data": [{"id": server.model}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server.lock:
                    server.received += 1
                    number = server.received
                    server.headers.append(dict(self.headers))
                if server.closed:  # A keep-alive connection.
                    self.close_connection = True
                else:
                    self._answer(body, number)

            def _answer(self, body, number):
                for fault in server.faults:
                    found = fault(self.path, body, number)
                    if found == "drop":
                        self.close_connection = True
                        return
                    if found is not None:
                        self._send(*found)
                        return
                reply = server.reply(self.path, body)
                if server.twist:
                    reply = server.twist(self.path, reply)
                if self.path != "/tokenize":
                    key = json.dumps([self.path, body], sort_keys=True)
                    with server.lock:
                        server.answered[key] += 1
                self._send(200, {}, reply)

            def _send(self, status, headers, content):
                text = content if isinstance(content, str) else json.dumps(content)
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(text.encode())))
                    self.end_headers()
                    self.wfile.write(text.encode())

        return Handler

    def __enter__(self):
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *unused):
        self.closed = True
        self._http.shutdown()
        self._http.server_close()


def canary_keys(server):
    """Returns the requests of the canary, which each run sends again."""
    return {
        key
        for key in server.answered
        if "The following sentences" in key or "capital of France" in key
    }
