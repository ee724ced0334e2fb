r"""FRet: training data from a language model, passages to triples (section 3.2).

    gecko fret plan --config=configs/fret.py:local --workdir=runs/fret
    gecko fret run --config=configs/fret.py:local --workdir=runs/fret
    gecko fret run --config=configs/fret.py --workdir=/mnt/bucket/fret \
        --config.passages.files=corpus.jsonl.gz --config.llm.url=http://tpu-host:8000 \
        --config.llm.model=google/gemma-3-27b-it --max-cost=200

Arguments: `local` uses 60 passages of the bundled corpus and SmolLM2-135M-Instruct,
which runs in this process and takes less than half an hour on a laptop. `local,qwen`
and `local,qwen_small` use Qwen2.5-Coder-1.5B and 0.5B-Instruct instead, which judge far
better (`gecko fret fetch-model qwen2.5-coder-1.5b`). `local,recorded` replays the
recorded responses of the 1.5B in seconds and needs no installation. `relabel` is for
`gecko fret relabel`; `local,relabel` takes 100 pairs of the bundled corpus. `llama_cpp`
and `hosted` select the settings of those servers (`local,llama_cpp`: the small model on
a server at port 8080); the default is vLLM or SGLang. docs/fret.md explains how to
start each server. The paper gives neither prompts, model, N nor filters: numbers
without a source are ours.
"""

import ml_collections

import gecko_jax.config
from gecko_jax.fret import settings


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; see the file's docstring for `arg`."""
    arg = gecko_jax.config.parse_arg(
        arg,
        local=False,
        recorded=False,
        relabel=False,
        qwen=False,
        qwen_small=False,
        llama_cpp=False,
        hosted=False,
    )
    if arg.recorded and arg.relabel:
        raise ValueError(
            "recorded,relabel: the bundled recording has no answers for `gecko fret "
            "relabel`; leave out recorded, or set llm.recording to a workdir that has"
        )
    # Every key with its default, unit and source: gecko_jax/fret/settings.py.
    config = gecko_jax.config.defaults(settings.KEYS)
    if arg.llama_cpp:
        config.llm.url = "http://localhost:8080"
        config.llm.scoring = "forced"
        config.llm.concurrency = 4  # slots of the server
        config.llm.top_log_probs = 100
    if arg.hosted:
        config.llm.api_key_env = "OPENAI_API_KEY"
        config.llm.chat = True
        config.llm.scoring = "none"
        config.fuse.likelihood_weight = 0.0
        config.fuse.relevance = "log_odds"
    if arg.local:
        config.passages.files = ("quickstart",)
        config.passages.decontaminate = ("quickstart",)
        config.passages.limit = 60
        config.passages.shard_rows = 30
        config.passages.max_characters = 800
        config.llm.licence = "Apache-2.0"
        if arg.recorded:
            config.llm.recording = "quickstart"
        elif arg.llama_cpp:
            config.llm.model = "SmolLM2-135M-Instruct"
            config.llm.concurrency = 1
        else:
            config.llm.weights = "smollm2"
        # Measured abilities of a model of this size: docs/fret.md.
        config.generate.prompt = "generate_short"
        config.generate.shots = 0  # all five, so their prefix is computed once
        config.generate.max_tokens = 32
        config.retrieve.num_candidates = 10
        config.likelihood.generic_passage = "This is a short text."
        config.fuse.relevance = "log_odds"
        config.fuse.relevance_weight = 0.0
        config.calibrate.num_seeds = 10
        config.run.max_error_rate = 0.2
        if arg.qwen or arg.qwen_small:
            size = "0.5b" if arg.qwen_small else "1.5b"
            config.llm.weights = f"qwen2.5-coder-{size}"
            config.llm.dtype = "bfloat16"
        if arg.qwen or arg.qwen_small or arg.recorded:
            config.likelihood.prompt = "relevance"  # QL and RC share a reading
            config.fuse.relevance_weight = 1.0
    if arg.relabel:
        config.passages.files = ()
        config.relabel.files = ("quickstart",)
        config.relabel.limit = 100 if arg.local else 0
        config.likelihood.generic_passage = ""  # People have written the queries.
    return config
