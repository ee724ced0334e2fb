"""Keys of `configs/evaluate.py`."""

import re

from gecko_jax.config import rules

Key, Rule = rules.Key, rules.Rule

# `evaluation.mteb_suites` knows their tasks.
SUITES = ("MTEB(eng, v1)", "MTEB(eng, v2)", "NanoBEIR", "MIRACL")

EVALUATION: dict[str, rules.Key] = {
    "suites": Key(
        (),
        rules.tuple_of(
            str, "must hold some of " + "; ".join(SUITES), lambda v: v in SUITES
        ),
        "Suites of mteb.",
    ),
    "tasks": Key((), Rule(tuple), "Single tasks of mteb."),
    "folders": Key((), Rule(tuple), "Local sets, as for `gecko evaluate`."),
    "dims": Key(
        (),
        rules.tuple_of(int, "must be integers above 0", lambda v: v > 0),
        "Trained dims to evaluate; empty for all.",
    ),
    "name": Key(
        "",
        Rule(
            str,
            "must be organization/model, or empty",
            lambda v: not v or re.fullmatch(r"[\w.-]+/[\w.-]+", v) is not None,
        ),
        "Model name in the results; empty for gecko-jax/FOLDER.",
    ),
    "query_length": Key(
        0, rules.COUNT, "Query length in tokens; 0 for that of training."
    ),
    "passage_length": Key(
        0, rules.COUNT, "Passage length in tokens; 0 for that of training."
    ),
    "cache.folder": Key("~/.cache/gecko_jax/vectors", rules.NAME, "Cache of vectors."),
    "cache.max_gib": Key(
        50.0,
        rules.NOT_NEGATIVE,
        "Size of the cache after a run, over all models, in GiB.",
    ),
    "mesh.data": Key(-1, rules.AXIS, "Devices along `data`."),
    "mesh.fsdp": Key(1, rules.AXIS, "Devices along `fsdp`."),
    "mesh.tensor": Key(1, rules.AXIS, "Devices along `tensor`."),
}
