"""Settings of a run: the keys of `configs/fret.py`, checked and grouped for the stages.

`check` reports all faults at once, before anything is read or sent.
"""

from typing import Any

import ml_collections

from gecko_jax import config as config_rules
from gecko_jax.fret import answers, fusion, passages, prompts
from gecko_jax.llm import protocol, server, wire
from gecko_jax.text import text_formats

_SHARE = config_rules.Rule(float, "must be in [0, 1]", lambda v: 0 <= v <= 1)

SCHEMA: dict[str, config_rules.Rule] = {
    "seed": config_rules.COUNT,
    "passages.files": config_rules.Rule(tuple, "must name a file or more", bool),
    "passages.decontaminate": config_rules.Rule(tuple),
    "passages.min_words": config_rules.POSITIVE,
    "passages.max_characters": config_rules.between(1, text_formats.MAX_CHARACTERS),
    "passages.near_duplicate": _SHARE,
    "passages.limit": config_rules.COUNT,
    "passages.shard_rows": config_rules.POSITIVE,
    "llm.recording": config_rules.TEXT,
    "llm.weights": config_rules.TEXT,
    "llm.dtype": config_rules.one_of("float32", "bfloat16"),
    "llm.tensor": config_rules.POSITIVE,
    "llm.compilation_cache": config_rules.TEXT,
    "llm.url": config_rules.Rule(
        str,
        "must begin with http:// or https:// and have no /v1",
        lambda v: (
            v.startswith(("http://", "https://")) and not v.rstrip("/").endswith("/v1")
        ),
    ),
    "llm.model": config_rules.TEXT,
    "llm.revision": config_rules.TEXT,
    "llm.licence": config_rules.TEXT,
    "llm.api_key_env": config_rules.TEXT,
    "llm.chat": config_rules.SWITCH,
    "llm.scoring": config_rules.one_of(*wire.SCORING),
    "llm.top_log_probs": config_rules.POSITIVE,
    "llm.concurrency": config_rules.POSITIVE,
    "llm.retries": config_rules.COUNT,
    "llm.retry_seconds": config_rules.NOT_NEGATIVE,
    "llm.timeout_seconds": config_rules.ABOVE_ZERO,
    "llm.requests_per_minute": config_rules.COUNT,
    "llm.tokens_per_minute": config_rules.COUNT,
    "llm.price_input": config_rules.NOT_NEGATIVE,
    "llm.price_output": config_rules.NOT_NEGATIVE,
    "generate.prompt": config_rules.NAME,
    "generate.shots": config_rules.COUNT,
    "generate.temperature": config_rules.NOT_NEGATIVE,
    "generate.top_p": _SHARE,
    "generate.max_tokens": config_rules.POSITIVE,
    "generate.min_words": config_rules.POSITIVE,
    "generate.max_words": config_rules.POSITIVE,
    "generate.max_copied_words": config_rules.COUNT,
    "retrieve.model": config_rules.TEXT,
    "retrieve.dim": config_rules.COUNT,
    "retrieve.num_candidates": config_rules.Rule(
        int, "must be at least 2", lambda v: v >= 2
    ),
    "likelihood.prompt": config_rules.NAME,
    "likelihood.generic_passage": config_rules.TEXT,
    "relevance.prompt": config_rules.NAME,
    "fuse.k": config_rules.NOT_NEGATIVE,
    "fuse.likelihood_weight": config_rules.NOT_NEGATIVE,
    "fuse.relevance_weight": config_rules.NOT_NEGATIVE,
    "fuse.relevance": config_rules.one_of("log_prob", "log_odds"),
    "fuse.positive": config_rules.one_of("relabelled", "seed"),
    "fuse.negative": config_rules.one_of("lowest", "sampled", "none"),
    "fuse.min_information": config_rules.Rule(float),
    "export.max_tasks": config_rules.POSITIVE,
    "calibrate.num_seeds": config_rules.COUNT,
    "run.max_error_rate": _SHARE,
}


def check(config: ml_collections.ConfigDict) -> None:
    """Checks every key.

    Raises:
        ValueError: Lists every fault: the key, its value, the rule, the remedy.
    """
    flat = config_rules.flatten(config)
    config_rules.refuse(
        config_rules.find_faults(flat, SCHEMA) or _faults_between_keys(flat)
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
