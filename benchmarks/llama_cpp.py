"""llama.cpp's server on the loopback, asked for exact log-likelihoods.

The server gives no log-probs of a prompt. So the continuation is generated under a
grammar that allows nothing else, token by token; what is reported is the log-prob
before the grammar. Needs `pip install xllamacpp`.
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
            path: The file.
            threads: Of the matrix products.
            slots: Requests at a time.
            context: Tokens of a request.
        """
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context * slots
        params.n_parallel = slots
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        # Half precision would be the only difference that is left.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # Flash attention rounds to half precision, too.
        kinds = xllamacpp.llama_flash_attn_type
        params.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.swa_full = True  # Gemma 3 reads the whole prompt again without it.
        params.port = 0
        params.verbosity = 0
        params.warmup = True
        self._server = xllamacpp.Server(params)
        self._slots = slots

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of plain text."""
        asked = {"content": text, "add_special": False, "parse_special": False}
        return self._post("/tokenize", asked)["tokens"]

    def score(
        self, pairs: Sequence[tuple[list[int], list[int]]], *, cache_prompt: bool = True
    ) -> list[list[float]]:
        """Returns the log-probs of continuations' tokens after their prompts."""

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
        """Returns the likeliest tokens after a prompt."""
        asked = {"prompt": prompt, "n_predict": num_tokens, "temperature": 0}
        answer = self._post("/completion", asked | {"return_tokens": True})
        return answer["tokens"]

    def _post(self, path: str, asked: dict) -> dict:
        request = urllib.request.Request(
            self._server.listening_address + path,
            data=json.dumps(asked).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
