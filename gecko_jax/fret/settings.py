"""Settings of a run: the keys of `configs/fret.py`, checked and grouped for the stages.

`check` reports all faults at once, before anything is read or sent.
"""

from typing import Any

import ml_collections

import gecko_jax.config
from gecko_jax.fret import answers, fusion, passages, prompts
from gecko_jax.llm import protocol, server, wire
from gecko_jax.text import text_formats

_Rule = gecko_jax.config.Rule


def _one_of(*names: str) -> _Rule:
    return _Rule(str, "must be one of " + ", ".join(names), lambda v: v in names)


_TEXT, _SWITCH = _Rule(str), _Rule(bool)
_NAME = _Rule(str, "must not be empty", bool)
_POSITIVE = _Rule(int, "must be at least 1", lambda v: v >= 1)
_COUNT = _Rule(int, "must be 0 or more", lambda v: v >= 0)
_NOT_NEGATIVE = _Rule(float, "must be 0 or more", lambda v: v >= 0)
_SHARE = _Rule(float, "must be in [0, 1]", lambda v: 0 <= v <= 1)
_ABOVE_ZERO = _Rule(float, "must be above 0", lambda v: v > 0)

SCHEMA: dict[str, _Rule] = {
    "seed": _COUNT,
    "passages.files": _Rule(tuple, "must name a file or more", bool),
    "passages.decontaminate": _Rule(tuple),
    "passages.min_words": _POSITIVE,
    "passages.max_characters": _Rule(
        int,
        f"must be 1 to {text_formats.MAX_CHARACTERS}",
        lambda v: 1 <= v <= text_formats.MAX_CHARACTERS,
    ),
    "passages.near_duplicate": _SHARE,
    "passages.limit": _COUNT,
    "passages.shard_rows": _POSITIVE,
    "llm.recording": _TEXT,
    "llm.weights": _TEXT,
    "llm.dtype": _one_of("float32", "bfloat16"),
    "llm.tensor": _POSITIVE,
    "llm.compilation_cache": _TEXT,
    "llm.url": _Rule(
        str,
        "must begin with http:// or https:// and have no /v1",
        lambda v: (
            v.startswith(("http://", "https://")) and not v.rstrip("/").endswith("/v1")
        ),
    ),
    "llm.model": _TEXT,
    "llm.revision": _TEXT,
    "llm.licence": _TEXT,
    "llm.api_key_env": _TEXT,
    "llm.chat": _SWITCH,
    "llm.scoring": _one_of(*wire.SCORING),
    "llm.top_log_probs": _POSITIVE,
    "llm.concurrency": _POSITIVE,
    "llm.retries": _COUNT,
    "llm.retry_seconds": _NOT_NEGATIVE,
    "llm.timeout_seconds": _ABOVE_ZERO,
    "llm.requests_per_minute": _COUNT,
    "llm.tokens_per_minute": _COUNT,
    "llm.price_input": _NOT_NEGATIVE,
    "llm.price_output": _NOT_NEGATIVE,
    "generate.prompt": _NAME,
    "generate.shots": _COUNT,
    "generate.temperature": _NOT_NEGATIVE,
    "generate.top_p": _SHARE,
    "generate.max_tokens": _POSITIVE,
    "generate.min_words": _POSITIVE,
    "generate.max_words": _POSITIVE,
    "generate.max_copied_words": _COUNT,
    "retrieve.model": _TEXT,
    "retrieve.dim": _COUNT,
    "retrieve.num_candidates": _Rule(int, "must be at least 2", lambda v: v >= 2),
    "likelihood.prompt": _NAME,
    "likelihood.generic_passage": _TEXT,
    "relevance.prompt": _NAME,
    "fuse.k": _NOT_NEGATIVE,
    "fuse.likelihood_weight": _NOT_NEGATIVE,
    "fuse.relevance_weight": _NOT_NEGATIVE,
    "fuse.relevance": _one_of("log_prob", "log_odds"),
    "fuse.positive": _one_of("relabelled", "seed"),
    "fuse.negative": _one_of("lowest", "sampled", "none"),
    "fuse.min_information": _Rule(float),
    "export.max_tasks": _POSITIVE,
    "calibrate.num_seeds": _COUNT,
    "run.max_error_rate": _SHARE,
}


def check(config: ml_collections.ConfigDict) -> None:
    """Checks every key.

    Raises:
        ValueError: Lists every fault: the key, its value, the rule, the remedy.
    """
    flat = gecko_jax.config.flatten(config)
    gecko_jax.config.refuse(
        gecko_jax.config.find_faults(flat, SCHEMA) or _faults_between_keys(flat)
    )


def _faults_between_keys(flat: dict[str, Any]) -> list[str]:
    faults = []
    is_served = not flat["llm.recording"] and not flat["llm.weights"]
    if is_served and not flat["llm.model"]:
        faults.append(
            "llm.model='': name the model that llm.url serves, or set llm.weights to "
            "run one in this process"
        )
    if flat["llm.recording"] and flat["llm.weights"]:
        faults.append(
            f"llm.recording={flat['llm.recording']!r}, llm.weights="
            f"{flat['llm.weights']!r}: only one can answer; leave the other empty"
        )
    if not flat["fuse.likelihood_weight"] and not flat["fuse.relevance_weight"]:
        faults.append(
            "fuse.likelihood_weight=0, fuse.relevance_weight=0: one must be above 0"
        )
    cannot_score = flat["llm.chat"] or flat["llm.scoring"] == "none"
    if cannot_score and flat["fuse.likelihood_weight"] and is_served:
        faults.append(
            f"fuse.likelihood_weight={flat['fuse.likelihood_weight']}: with llm.chat="
            f"{flat['llm.chat']}, llm.scoring={flat['llm.scoring']!r} no query is "
            "scored; set it to 0, or use a server that can score"
        )
    if flat["generate.max_words"] < flat["generate.min_words"]:
        faults.append(
            f"generate.max_words={flat['generate.max_words']}: must not be below "
            f"generate.min_words={flat['generate.min_words']}"
        )
    return faults


class Prompts:
    """The prompts of a run."""

    def __init__(self, config: ml_collections.ConfigDict):
        """Reads and checks the files that the config names."""
        kinds = ("generate", "generate_for_task")
        self.generate = prompts.load(config.generate.prompt, kinds)
        self.likelihood = prompts.load(config.likelihood.prompt, ("likelihood",))
        self.relevance = prompts.load(config.relevance.prompt, ("relevance",))


def server_settings(config: ml_collections.ConfigDict) -> server.ServerSettings:
    """Returns the settings of the server."""
    names = server.ServerSettings.__dataclass_fields__
    return server.ServerSettings(**{name: config.llm[name] for name in names})


def passage_rules(config: ml_collections.ConfigDict) -> passages.Rules:
    """Returns the limits of a passage."""
    names = passages.Rules.__dataclass_fields__
    return passages.Rules(**{name: config.passages[name] for name in names})


def query_rules(config: ml_collections.ConfigDict) -> answers.Rules:
    """Returns the limits of a generated query."""
    names = answers.Rules.__dataclass_fields__
    return answers.Rules(**{name: config.generate[name] for name in names})


def sampling(
    config: ml_collections.ConfigDict, prompt: prompts.Prompt
) -> protocol.Sampling:
    """Returns the sampling settings of queries."""
    names = ("temperature", "top_p", "max_tokens")
    values = {name: config.generate[name] for name in names}
    return protocol.Sampling(**values, stop=prompt.stop)


def fusion_settings(config: ml_collections.ConfigDict) -> fusion.Settings:
    """Returns the settings of fusion and of the choice."""
    return fusion.Settings(**config.fuse.to_dict())
