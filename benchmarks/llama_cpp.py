"""Exact log-likelihoods from a local llama.cpp server.

The server does not return log-probs of a prompt. So it generates the continuation,
token by token, under a grammar that allows nothing else. The log-probs that it reports
are those before the grammar. Needs `pip install xllamacpp`.
"""

import concurrent.futures
import json
import urllib.request
from collections.abc import Sequence


class LlamaCpp:
    """A server in this process."""

    def __init__(self, path: str, *, threads: int, slots: int = 1, context: int = 2048):
        """Loads a GGUF file.

        Args:
            path: GGUF file.
            threads: Number of threads for matrix products.
            slots: Number of concurrent requests.
            context: Largest number of tokens per request.
        """
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context * slots
        params.n_parallel = slots
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        # A float16 cache would be the only remaining difference.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # Flash attention rounds to half precision, too.
        kinds = xllamacpp.llama_flash_attn_type
        params.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.swa_full = True  # Without it, Gemma 3 reads the whole prompt again.
        params.port = 0
        params.verbosity = 0
        params.warmup = True
        self._server = xllamacpp.Server(params)
        self._slots = slots

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of plain text."""
        body = {"content": text, "add_special": False, "parse_special": False}
        return self._post("/tokenize", body)["tokens"]

    def score(
        self, pairs: Sequence[tuple[list[int], list[int]]], *, cache_prompt: bool = True
    ) -> list[list[float]]:
        """Returns the log-probs of the tokens of each continuation after its prompt."""

        def ask(pair: tuple[list[int], list[int]]) -> list[float]:
            prompt, continuation = pair
            rule = " ".join(f"<[{token}]>" for token in continuation)
            answer = self._post(
                "/completion",
                {
                    "prompt": prompt,
                    "n_predict": len(continuation),
                    "grammar": f"root ::= {rule}",
                    "temperature": 0,
                    "n_probs": 1,
                    "cache_prompt": cache_prompt,
                    "return_tokens": True,
                },
            )
            probs = answer["completion_probabilities"]
            ids = [step["id"] for step in probs]
            assert ids == continuation, (ids, continuation)
            return [step["logprob"] for step in probs]

        with concurrent.futures.ThreadPoolExecutor(self._slots) as pool:
            return list(pool.map(ask, pairs))

    def complete(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Returns the most likely tokens after a prompt."""
        body = {"prompt": prompt, "n_predict": num_tokens, "temperature": 0}
        answer = self._post("/completion", body | {"return_tokens": True})
        return answer["tokens"]

    def _post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            self._server.listening_address + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
