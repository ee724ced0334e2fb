"""Texts, tokens and teacher vectors for `distil.py`."""

from __future__ import annotations

import collections
import concurrent.futures
import gc
import json
import lzma
import os
import pathlib
import random
import re
import time
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np
from safetensors import numpy as safetensors

if typing.TYPE_CHECKING:
    from jaxtyping import Float, Int

# Longest text that the teacher and the student read, in tokens of each.
LENGTH = 256
EOS = 1
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]”’]*\s+(?=[\"'(“‘]?[A-Z0-9])")
_START = time.monotonic()


def say(*words: object) -> None:
    """Prints with the seconds since the start."""
    print(f"[{time.monotonic() - _START:6.1f}]", *words, flush=True)


def load_texts(
    path: pathlib.Path, most: int, spans: int, seed: int
) -> tuple[int, list[str], Int[np.ndarray, "P 2"]]:
    """Returns the number of rows, the distinct texts, and the pairs.

    Passages and queries come first, then sentences, then random spans of words.

    Args:
        path: Rows of `text.py`: a passage (`t`), often a query (`q`).
        most: Largest number of texts.
        spans: Largest number of spans.
        seed: Seed of the order of the sentences and of the spans.

    Returns:
        Pairs are indices into the texts: query, passage.
    """
    rng = random.Random(seed)
    with lzma.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    index: dict[str, int] = {}
    pairs = []
    for row in rows:
        passage = index.setdefault(row["t"], len(index))
        if query := row.get("q"):
            pairs.append((index.setdefault(query, len(index)), passage))
    sentences = [s for row in rows for s in _SENTENCE.split(row["t"]) if len(s) > 12]
    rng.shuffle(sentences)
    for sentence in sentences:
        if len(index) >= most:
            break
        index.setdefault(sentence, len(index))
    # Random spans of 1 to 12 words, as short as the queries of a search.
    for _ in range(min(spans, max(0, most - len(index)))):
        words = rng.choice(sentences).split()
        length = rng.randint(1, 12)
        place = rng.randint(0, max(0, len(words) - length))
        index.setdefault(" ".join(words[place : place + length]), len(index))
    return len(rows), list(index), np.array(pairs, np.int32).reshape(-1, 2)


def tokenize(vocabulary: Any, texts: Sequence[str]) -> list[Int[np.ndarray, " L"]]:
    """Returns the token ids of each text, cut to `LENGTH`, with EOS last."""
    rows = []
    for place in range(0, len(texts), 100_000):
        block = texts[place : place + 100_000]
        ids = vocabulary.EncodeAsIds(list(block), num_threads=os.cpu_count() or 1)
        rows += [np.array([*row[: LENGTH - 1], EOS], np.uint16) for row in ids]
    return rows


def teach(
    folder: pathlib.Path,
    texts: Sequence[str],
    order: Sequence[int],
    until: float,
    block: int = 16_384,
) -> Float[np.ndarray, "N T"]:
    """Returns the teacher's vector of each text, normalized, in float16.

    Args:
        folder: Folder of the teacher, a BERT encoder with mean pooling.
        texts: Texts to embed.
        order: Indices of the texts, the most important first.
        until: Time (`time.monotonic`) after which no batch starts. The vectors of the
            texts that are left are zeros.
        block: Number of texts that are sorted by length together.
    """
    import tokenizers
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    config = transformers.BertConfig.from_pretrained(folder)
    model = transformers.BertModel(config, add_pooling_layer=False)
    stored = safetensors.load_file(folder / "model.safetensors")
    weights = {
        name: torch.from_numpy(value.astype(np.float32))
        for name, value in stored.items()
        if not name.startswith("pooler") and not name.endswith("_ids")
    }
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert not [name for name in missing if not name.endswith("_ids")], missing
    torch.nn.Module.to(model, device, dtype)
    model.eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    blocks = [list(order[p : p + block]) for p in range(0, len(order), block)]

    def ids_of(indices: list[int]) -> list[list[int]]:
        encodings = tokenizer.encode_batch([texts[i] for i in indices])
        return [encoding.ids for encoding in encodings]

    vectors = np.zeros((len(texts), config.hidden_size), np.float16)
    begun = said = time.monotonic()
    done = 0
    with concurrent.futures.ThreadPoolExecutor(3) as pool, torch.inference_mode():
        waiting = collections.deque(pool.submit(ids_of, one) for one in blocks[:3])
        for number, indices in enumerate(blocks):
            if time.monotonic() > until:
                break
            ids = waiting.popleft().result()
            if number + 3 < len(blocks):
                waiting.append(pool.submit(ids_of, blocks[number + 3]))
            # A batch holds texts of about the same length, so that little is padding.
            by_length = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
            place = 0
            while place < len(by_length):
                longest = len(ids[by_length[place]])
                longest = min(-(-longest // 8) * 8, LENGTH)
                size = max(1, (262_144 if device == "cuda" else 8_192) // longest)
                part = by_length[place : place + size]
                place += size
                tokens = np.zeros((len(part), longest), np.int64)
                for row, i in enumerate(part):
                    tokens[row, : len(ids[i])] = ids[i]
                inputs = torch.from_numpy(tokens).to(device)
                mask = (inputs != 0).to(dtype)
                hidden = model(
                    inputs, attention_mask=mask.long()
                ).last_hidden_state.float()
                pooled = torch.einsum("rlm,rl->rm", hidden, mask.float())
                pooled = torch.nn.functional.normalize(pooled, dim=1)
                targets = [indices[i] for i in part]
                vectors[targets] = pooled.half().cpu().numpy()
            done += len(indices)
            if time.monotonic() - said > 5:
                said = time.monotonic()
                say(f"teacher {done:,} {done / (said - begun):,.0f} texts/s")
    say(f"teacher {done:,} {done / (time.monotonic() - begun):,.0f} texts/s")
    del model, weights
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return vectors
