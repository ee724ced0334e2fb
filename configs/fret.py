r"""FRet: training data from a language model, passages to triples (section 3.2).

    gecko fret plan --config=configs/fret.py:local --workdir=runs/fret
    gecko fret run --config=configs/fret.py:local --workdir=runs/fret
    gecko fret run --config=configs/fret.py --workdir=/mnt/bucket/fret \
        --config.passages.files=corpus.jsonl.gz --config.llm.url=http://tpu-host:8000 \
        --config.llm.model=google/gemma-3-27b-it --max-cost=200

Arguments: `local` takes 60 passages of the bundled corpus and SmolLM2-135M-Instruct,
which runs in this process, in well under half an hour on a laptop. `local,recorded`
replays what it answered, in seconds and with nothing to install. `llama_cpp` and
`hosted` set what those servers need (`local,llama_cpp`: the small model behind one on
port 8080); without an argument vLLM or SGLang is meant. docs/fret.md tells how to start
each. The paper gives neither prompts, model, N nor filters: numbers without a source
are ours.
"""

import ml_collections

from gecko_jax.config import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; see the file's docstring for `arg`."""
    arg = parse_arg(arg, local=False, recorded=False, llama_cpp=False, hosted=False)
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.passages = ml_collections.ConfigDict()
    config.passages.files = ()  # JSONL with `text` (maybe `title`, `_id`), or .txt
    config.passages.decontaminate = ()  # BEIR folders and STS files to keep clear of
    config.passages.min_words = 10
    config.passages.max_characters = 4_000
    config.passages.near_duplicate = 0.8  # resemblance; 0 keeps all that differ
    config.passages.limit = 0  # passages; 0 for all
    config.passages.shard_rows = 256  # passages of a shard, which is written whole

    config.llm = ml_collections.ConfigDict()
    config.llm.recording = ""  # workdir whose answers stand for the model
    config.llm.weights = ""  # .gguf, folder or "smollm2", run in this process
    config.llm.dtype = "float32"  # of that model; bfloat16 on an accelerator
    config.llm.tensor = 1  # devices that it is split over; rows go to the rest
    config.llm.compilation_cache = "~/.cache/gecko_jax/compiled"  # empty for none
    config.llm.url = "http://localhost:8000"  # of a server otherwise, without /v1
    config.llm.model = ""  # name under which it is served
    config.llm.revision = ""  # commit or checksum of the weights, for the record
    config.llm.licence = ""  # of the model's output, for the record
    config.llm.api_key_env = ""  # environment variable that holds the key
    config.llm.chat = False  # the chat API, which cannot score continuations
    config.llm.scoring = "echo"  # or echo_tokens, forced (llama.cpp), none
    config.llm.top_log_probs = 20  # first tokens listed when labels are scored
    config.llm.concurrency = 64  # requests on their way at once
    config.llm.retries = 6
    config.llm.retry_seconds = 1.0  # before the first retry; doubled each time
    config.llm.timeout_seconds = 300.0
    config.llm.requests_per_minute = 0  # 0 for no limit
    config.llm.tokens_per_minute = 0  # 0 for no limit
    config.llm.price_input = 0.0  # of a million tokens
    config.llm.price_output = 0.0  # of a million tokens

    config.generate = ml_collections.ConfigDict()
    config.generate.prompt = "generate"  # generate_for_task: the task is drawn
    config.generate.shots = 5  # few-shot examples of a row; 0 for all
    config.generate.temperature = 0.7
    config.generate.top_p = 1.0
    config.generate.max_tokens = 96
    config.generate.min_words = 3  # of a query
    config.generate.max_words = 40
    config.generate.max_copied_words = 8  # in a row from the passage; 0 for any

    config.retrieve = ml_collections.ConfigDict()
    config.retrieve.model = ""  # workdir or export of a gecko; empty for BM25
    config.retrieve.dim = 0  # 0 for the largest
    config.retrieve.num_candidates = 20  # tables 3 and 5 of the paper speak of p_20

    config.likelihood = ml_collections.ConfigDict()
    config.likelihood.prompt = "likelihood"
    config.likelihood.generic_passage = ""  # scored too, for fuse.min_information

    config.relevance = ml_collections.ConfigDict()
    config.relevance.prompt = "relevance"

    config.fuse = ml_collections.ConfigDict()
    config.fuse.k = 0.0  # added to ranks; the paper has none
    config.fuse.likelihood_weight = 1.0
    config.fuse.relevance_weight = 1.0
    config.fuse.relevance = "log_prob"  # of the best label (paper); or log_odds
    config.fuse.positive = "relabelled"  # or seed
    config.fuse.negative = "lowest"  # or sampled, none
    config.fuse.min_information = 0.0  # nats above the generic passage

    config.export = ml_collections.ConfigDict()
    config.export.max_tasks = 64  # tasks of their own; rarer ones are "search result"

    config.calibrate = ml_collections.ConfigDict()
    config.calibrate.num_seeds = 100  # held out of the run, at most a fifth

    config.run = ml_collections.ConfigDict()
    config.run.max_error_rate = 0.05  # of a shard's rows, from which the run stops

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
        # What a model of this size can do, measured: docs/fret.md.
        config.generate.prompt = "generate_short"
        config.generate.shots = 0  # all five, so that they are read once
        config.generate.max_tokens = 32
        config.retrieve.num_candidates = 10
        config.likelihood.generic_passage = "This is a short text."
        config.fuse.relevance = "log_odds"
        config.fuse.relevance_weight = 0.0
        config.calibrate.num_seeds = 10
        config.run.max_error_rate = 0.2
    return config
