"""Settings of a run: the keys of `configs/fret.py`, checked and grouped for the stages.

`check` reports all errors at once, before anything is read or sent.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import ml_collections

import gecko_jax.config
from gecko_jax.config import rules
from gecko_jax.fret import fusion, prompts
from gecko_jax.llm import protocol, wire
from gecko_jax.text import text_formats

Key, Rule, between, one_of = rules.Key, rules.Rule, rules.between, rules.one_of
TEXT, NAME, SWITCH = rules.TEXT, rules.NAME, rules.SWITCH
POSITIVE, COUNT = rules.POSITIVE, rules.COUNT
ABOVE_ZERO, NOT_NEGATIVE = rules.ABOVE_ZERO, rules.NOT_NEGATIVE

_Settings = TypeVar("_Settings")
_SHARE = Rule(float, "must be in [0, 1]", lambda v: 0 <= v <= 1)
_FILES = Rule(tuple)

# Defaults without a source are ours: the paper gives neither prompts, model, N nor
# filters.
KEYS: dict[str, rules.Key] = {
    "seed": Key(0, COUNT),  # PRNG seed.
    # JSONL with `text` (optionally `title`, `_id`), or .txt files.
    "passages.files": Key((), _FILES),
    # BEIR folders and STS files whose texts are dropped.
    "passages.decontaminate": Key((), _FILES),
    "passages.min_words": Key(10, POSITIVE),  # Shortest passage, in words.
    # Longest passage, in characters.
    "passages.max_characters": Key(4000, between(1, text_formats.MAX_CHARACTERS)),
    # Least resemblance of near duplicates; 0 drops only equal texts.
    "passages.near_duplicate": Key(0.8, _SHARE),
    "passages.limit": Key(0, COUNT),  # Largest number of passages; 0 for all.
    # Passages per shard, which is written as a whole.
    "passages.shard_rows": Key(256, POSITIVE),
    # JSONL of pairs or triples for `gecko fret relabel`.
    "relabel.files": Key((), _FILES),
    "relabel.limit": Key(0, COUNT),  # Lines to relabel, drawn at random; 0 for all.
    "llm.recording": Key("", TEXT),  # Workdir whose recorded answers replace the model.
    # Model in this process: .gguf, folder or `smollm2`; empty for a server.
    "llm.weights": Key("", TEXT),
    # Dtype of the model in this process.
    "llm.dtype": Key("float32", one_of("float32", "bfloat16")),
    # Devices over which the model is split; the other axis splits the rows.
    "llm.tensor": Key(1, POSITIVE),
    # Folder of compiled functions; empty for none.
    "llm.compilation_cache": Key("~/.cache/gecko_jax/compiled", TEXT),
    # Address of the server, without /v1.
    "llm.url": Key(
        "http://localhost:8000",
        Rule(
            str,
            "must begin with http:// or https:// and have no /v1",
            lambda v: (
                v.startswith(("http://", "https://"))
                and not v.rstrip("/").endswith("/v1")
            ),
        ),
    ),
    "llm.model": Key("", TEXT),  # Name under which the server serves the model.
    "llm.revision": Key("", TEXT),  # Commit or checksum of the weights, for the record.
    "llm.licence": Key("", TEXT),  # Licence of the model's output, for the record.
    "llm.api_key_env": Key("", TEXT),  # Environment variable that holds the API key.
    # Uses the chat API, which cannot score continuations.
    "llm.chat": Key(False, SWITCH),
    # How the server scores: echo, echo_tokens, forced (llama.cpp) or none.
    "llm.scoring": Key("echo", one_of(*wire.SCORING)),
    # Number of first tokens listed when labels are scored.
    "llm.top_log_probs": Key(20, POSITIVE),
    "llm.concurrency": Key(64, POSITIVE),  # Requests in flight.
    "llm.retries": Key(6, COUNT),  # Retries of a failed request.
    # Seconds before the first retry; doubled each time.
    "llm.retry_seconds": Key(1.0, NOT_NEGATIVE),
    "llm.timeout_seconds": Key(300.0, ABOVE_ZERO),  # Deadline of a request, in seconds.
    "llm.requests_per_minute": Key(0, COUNT),  # Rate limit in requests; 0 for none.
    "llm.tokens_per_minute": Key(0, COUNT),  # Rate limit in tokens; 0 for none.
    "llm.price_input": Key(0.0, NOT_NEGATIVE),  # Price of a million prompt tokens.
    "llm.price_output": Key(0.0, NOT_NEGATIVE),  # Price of a million completion tokens.
    # Prompt; `generate_for_task` draws the task.
    "generate.prompt": Key("generate", NAME),
    # Seed passages, the first ones; 0 for all. The rest are candidates.
    "generate.limit": Key(0, COUNT),
    "generate.shots": Key(5, COUNT),  # Few-shot examples per row; 0 for all.
    "generate.temperature": Key(0.7, NOT_NEGATIVE),  # Sampling temperature.
    # Nucleus sampling: smallest probability mass to draw from.
    "generate.top_p": Key(1.0, _SHARE),
    "generate.max_tokens": Key(96, POSITIVE),  # Largest number of tokens to generate.
    "generate.min_words": Key(3, POSITIVE),  # Shortest query, in words.
    "generate.max_words": Key(40, POSITIVE),  # Longest query, in words.
    # Longest run of words copied from the passage; 0 for any.
    "generate.max_copied_words": Key(8, COUNT),
    "retrieve.model": Key("", TEXT),  # Workdir or export of a Gecko; empty for BM25.
    "retrieve.dim": Key(0, COUNT),  # Dims of its embeddings; 0 for all.
    # Candidates per query (tables 3 and 5 of the paper: p_20).
    "retrieve.num_candidates": Key(
        20, Rule(int, "must be at least 2", lambda v: v >= 2)
    ),
    # Drops queries that rank their seed lower (E5, arXiv 2212.03533: 2; Promptagator,
    # arXiv 2209.11755: 1); 0 for any.
    "retrieve.max_seed_rank": Key(0, COUNT),
    # Drops queries whose cosine with their seed is lower (Arctic-Embed, arXiv
    # 2405.05374); -1 for any. Needs `retrieve.model`.
    "retrieve.min_seed_cosine": Key(
        -1.0, Rule(float, "must be in [-1, 1]", lambda v: -1 <= v <= 1)
    ),
    # Prompt of query likelihood (QL); with that of RC, both share a reading.
    "likelihood.prompt": Key("likelihood", NAME),
    # Passage scored as well, for `fuse.min_information`.
    "likelihood.generic_passage": Key("", TEXT),
    # Prompt of relevance classification (RC).
    "relevance.prompt": Key("relevance", NAME),
    # Constant added to ranks (RRF); the paper has none.
    "fuse.k": Key(0.0, NOT_NEGATIVE),
    "fuse.likelihood_weight": Key(1.0, NOT_NEGATIVE),  # Weight of the QL ranking.
    "fuse.relevance_weight": Key(1.0, NOT_NEGATIVE),  # Weight of the RC ranking.
    # RC score: log-probability of the best label (paper), or log-odds.
    "fuse.relevance": Key("log_prob", one_of("log_prob", "log_odds")),
    # Positive: the best candidate (paper), or the seed passage.
    "fuse.positive": Key("relabelled", one_of("relabelled", "seed")),
    # Hard negative: the lowest candidate (paper), a sampled one, those of the line that
    # is relabelled, or none.
    "fuse.negative": Key("lowest", one_of("lowest", "sampled", "given", "none")),
    "fuse.num_negatives": Key(1, POSITIVE),  # Most hard negatives of a query.
    # A candidate whose R exceeds (1 - margin) times the positive's is no negative.
    "fuse.margin": Key(0.0, _SHARE),
    # What becomes of it: nothing, or a further positive (RLHN, arXiv 2505.16967).
    "fuse.near": Key("drop", one_of("drop", "positive")),
    # Limit of a negative's cosine, as a share of the positive's (NV-Retriever, arXiv
    # 2407.15831: 0.95); 0 for none. Needs `retrieve.model`.
    "fuse.max_negative_share": Key(0.0, _SHARE),
    # Least QL above that of the generic passage, in nats.
    "fuse.min_information": Key(0.0, Rule(float)),
    # Most tasks to keep; rarer ones become `search result`.
    "export.max_tasks": Key(64, POSITIVE),
    # Writes all candidates with their scores and ranks.
    "export.candidates": Key(False, SWITCH),
    # Scores of positive and negatives that are written, for `loss.kl_weight`.
    "export.scores": Key("", one_of("", "likelihood", "relevance", "fused")),
    # Seeds held out of the run, at most a fifth.
    "calibrate.num_seeds": Key(100, COUNT),
    # Share of failed rows in a shard that stops the run.
    "run.max_error_rate": Key(0.05, _SHARE),
}
_LATER = ("num_negatives", "margin", "near", "max_negative_share")
SCHEMA = {name: key.rule for name, key in KEYS.items()}


def check(config: ml_collections.ConfigDict) -> None:
    """Checks every key; raises a ValueError that lists every error, with its remedy."""
    flat = gecko_jax.config.flatten(config)
    rules.refuse(rules.find_errors(flat, SCHEMA) or _find_errors_between_keys(flat))


def _find_errors_between_keys(flat: dict[str, Any]) -> Iterator[str]:
    is_served = not flat["llm.recording"] and not flat["llm.weights"]
    if is_served and not flat["llm.model"]:
        yield (
            "llm.model='': name the model that llm.url serves, or set llm.weights to "
            "run one in this process"
        )
    if flat["llm.recording"] and flat["llm.weights"]:
        yield (
            f"llm.recording={flat['llm.recording']!r}, llm.weights="
            f"{flat['llm.weights']!r}: only one can answer; leave the other empty"
        )
    if not flat["fuse.likelihood_weight"] and not flat["fuse.relevance_weight"]:
        yield "fuse.likelihood_weight=0, fuse.relevance_weight=0: one must be above 0"
    cannot_score = flat["llm.chat"] or flat["llm.scoring"] == "none"
    if cannot_score and flat["fuse.likelihood_weight"] and is_served:
        yield (
            f"fuse.likelihood_weight={flat['fuse.likelihood_weight']}: with llm.chat="
            f"{flat['llm.chat']}, llm.scoring={flat['llm.scoring']!r} no query is "
            "scored; set it to 0, or use a server that can score"
        )
    if not flat["passages.files"] and not flat["relabel.files"]:
        yield "passages.files=(): must name a file or more"
    if flat["generate.limit"] and flat["relabel.files"]:
        yield (
            f"generate.limit={flat['generate.limit']}: no query is generated for lines "
            "that are relabelled; set relabel.limit, and this to 0"
        )
    for name in ("retrieve.min_seed_cosine", "fuse.max_negative_share"):
        off = KEYS[name].default
        if flat[name] != off and not flat["retrieve.model"]:
            yield (
                f"{name}={flat[name]}: BM25 has no cosines; set retrieve.model, or set "
                f"it to {off}"
            )
    if flat["fuse.negative"] == "given" and not flat["relabel.files"]:
        yield (
            "fuse.negative='given': only lines that are relabelled have negatives; set "
            "relabel.files, or choose another"
        )
    judge = flat["export.scores"]
    if judge in ("likelihood", "relevance") and not flat[f"fuse.{judge}_weight"]:
        yield f"export.scores={judge!r}: not scored; set fuse.{judge}_weight above 0"
    if flat["generate.max_words"] < flat["generate.min_words"]:
        yield (
            f"generate.max_words={flat['generate.max_words']}: must not be below "
            f"generate.min_words={flat['generate.min_words']}"
        )


class Prompts:
    """The prompts of a run."""

    def __init__(self, config: ml_collections.ConfigDict):
        kinds = ("generate", "generate_for_task")
        self.generate = prompts.load(config.generate.prompt, kinds)
        kinds = ("likelihood", "relevance")
        self.likelihood = prompts.load(config.likelihood.prompt, kinds)
        self.relevance = prompts.load(config.relevance.prompt, ("relevance",))
        if self.likelihood.kind == "relevance":
            self.likelihood = prompts.before_query(self.likelihood)


def fill(kind: type[_Settings], group: ml_collections.ConfigDict) -> _Settings:
    """Returns a dataclass whose fields are keys of a group of the config."""
    names = vars(kind)["__dataclass_fields__"]
    return kind(**{name: group[name] for name in names})


def sampling(
    config: ml_collections.ConfigDict, prompt: prompts.Prompt
) -> protocol.Sampling:
    """Returns the sampling settings of queries."""
    names = ("temperature", "top_p", "max_tokens")
    values = {name: config.generate[name] for name in names}
    return protocol.Sampling(**values, stop=prompt.stop)


def agreement(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the facts of the agreement filter; none where it is off."""
    facts = {n: config.retrieve[n] for n in ("max_seed_rank", "min_seed_cosine")}
    facts = {n: v for n, v in facts.items() if v != KEYS[f"retrieve.{n}"].default}
    return facts | ({"scores_all": True} if needs_cosines(config) else {})


def needs_cosines(config: ml_collections.ConfigDict) -> bool:
    """Whether candidates that retrieval did not find need a score, too."""
    return bool(config.fuse.max_negative_share) or config.retrieve.min_seed_cosine > -1


def fusion_facts(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the facts of fusion; later settings only where they are not off.

    Runs that were begun before there were these settings can then go on.
    """
    return {
        name: value
        for name, value in config.fuse.to_dict().items()
        if name not in _LATER or value != KEYS[f"fuse.{name}"].default
    }


def fusion_settings(config: ml_collections.ConfigDict) -> fusion.Settings:
    """Returns the settings of fusion and of the choice."""
    return fill(fusion.Settings, config.fuse)
