"""Keys of training and of evaluation, and the values that recipes share."""

import math
import re
from typing import Any

from gecko_jax.config import rules
from gecko_jax.models import families, layers
from gecko_jax.parallel import sharding

Key, Rule, between, one_of = rules.Key, rules.Rule, rules.between, rules.one_of
TEXT, NAME, SWITCH, SHARE = rules.TEXT, rules.NAME, rules.SWITCH, rules.SHARE
POSITIVE, COUNT, AXIS = rules.POSITIVE, rules.COUNT, rules.AXIS
ABOVE_ZERO, NOT_NEGATIVE = rules.ABOVE_ZERO, rules.NOT_NEGATIVE

# Bounds far beyond any model catch typing errors before anything is allocated.
_WIDTH = between(1, 2**20)
_LENGTH = between(8, 2**20)
_PATHS = rules.tuple_of(str, "must be paths", bool)
_ACTIVATIONS = Rule(
    tuple,
    "must hold one or two of " + ", ".join(layers.ACTIVATIONS),
    lambda v: (
        1 <= len(v) <= 2
        and all(isinstance(n, str) and n in layers.ACTIVATIONS for n in v)
    ),
)
_WINDOW = Rule(
    tuple,
    "must hold the distances to the left and right, 0 or more, or nothing",
    lambda v: (
        len(v) in (0, 2) and all(rules.is_kind(n, int) and 0 <= n < 2**31 for n in v)
    ),
)
_BUCKETS = Rule(
    int, "must be even and in [4, 65,536]", lambda v: 4 <= v <= 2**16 and v % 2 == 0
)
_MRL_DIMS = Rule(
    tuple,
    "must be increasing integers above 0",
    lambda v: (
        len(v) > 0
        and all(rules.is_kind(dim, int) and dim > 0 for dim in v)
        and list(v) == sorted(set(v))
    ),
)
_MRL_WEIGHTS = rules.tuple_of(
    float, "must be numbers of 0 or more", lambda v: 0 <= v < math.inf
)
_MESH_RULES = rules.tuple_of(
    (list, tuple),
    "must be pairs of a logical axis and a mesh axis, several, or None",
    lambda v: len(v) == 2 and isinstance(v[0], str),
)

# Comments have the meaning, unit and source. Defaults are those of fine-tuning; those
# without a source are ours.
TRAINING: dict[str, rules.Key] = {
    # PRNG seed.
    "seed": Key(0, Rule(int, "must be in [0, 2^63)", lambda v: 0 <= v < 2**63)),
    "data.mixture": Key("quickstart", NAME),  # Mixture to train on if `files` is empty.
    "data.files": Key((), _PATHS),  # JSONL files of pairs or triples.
    # Path of a SentencePiece model or a `tokenizer.json`, or of a folder with one; or
    # `quickstart`.
    "data.vocabulary": Key("quickstart", NAME),
    # Sentinel ids after the vocabulary's pieces (T5: 100).
    "data.extra_ids": Key(0, between(0, 100_000)),
    "data.query_length": Key(64, _LENGTH),  # Query length in tokens (GTR).
    "data.passage_length": Key(512, _LENGTH),  # Passage length in tokens (GTR).
    # `plain` drops task descriptions and titles.
    "data.text_format": Key("gecko", one_of("gecko", "plain")),
    # Examples per step, over all hosts (GTR).
    "data.batch_size": Key(2048, between(2, 2**24)),
    # Hard negatives per example (eq. 3: 1, eq. 2: 0).
    "data.num_negatives": Key(1, between(0, 10_000)),
    # Packs several texts into a row; embeddings do not change.
    "data.packing": Key(True, SWITCH),
    # Draws each batch from a single task (EmbeddingGemma).
    "data.one_task_per_batch": Key(False, SWITCH),
    # Appends a unique id to classification texts (section 3.3) instead of masking their
    # in-batch negatives.
    "data.unique_ids": Key(False, SWITCH),
    "data.cache_dir": Key("~/.cache/gecko_jax", NAME),  # Folder of tokenized examples.
    # Output folder of `gecko data prepare`.
    "data.prepared_dir": Key("~/.cache/gecko_jax/prepared", NAME),
    # Output of `gecko data teach`, for embedding matching; empty for none.
    "data.teacher": Key("", TEXT),
    "data.teacher_dim": Key(0, COUNT),  # Dims of the teacher's vectors; 0 without one.
    # Encoder family: T5, Gemma 3 (EmbeddingGemma, T5Gemma 2), EmbeddingGemma 2's text
    # part, or Qwen 3.
    "model.family": Key("t5", one_of("t5", *families.FAMILIES)),
    "model.vocab_size": Key(8_064, between(1, 2**24)),  # Rows of the embedding table.
    "model.model_dim": Key(256, _WIDTH),  # Encoder width.
    # Encoder layers; 0 for a bag of tokens.
    "model.num_layers": Key(2, between(0, 1_000)),
    "model.num_heads": Key(4, _WIDTH),  # Attention heads.
    "model.head_dim": Key(64, _WIDTH),  # Width of a head.
    "model.mlp_dim": Key(512, _WIDTH),  # Width of the MLP.
    # MLP branches; two are gated (T5 1.1).
    "model.mlp_activations": Key(("gelu", "linear"), _ACTIVATIONS),
    # Shares one relative-position bias among layers (T5; not umT5).
    "model.shared_relative_bias": Key(True, SWITCH),
    "model.relpos_num_buckets": Key(32, _BUCKETS),  # Relative-position buckets (T5).
    # Distance in tokens that fills the last bucket (T5).
    "model.relpos_max_distance": Key(128, between(1, 2**24)),
    "model.embedding_dim": Key(256, _WIDTH),  # Width of the embedding.
    # Projects the pooled hidden state to `embedding_dim`.
    "model.projection": Key(True, SWITCH),
    "model.dropout_rate": Key(0.1, SHARE),  # Dropout rate (T5).
    "model.dtype": Key("bfloat16", one_of(*families.DTYPES)),  # Activation dtype.
    # Scans over layers, which compiles faster; results do not change.
    "model.scan_layers": Key(True, SWITCH),
    # Recomputed in the backward pass: none, all but matrix products, or full.
    "model.remat": Key("dots", one_of(*families.REMAT_POLICIES)),
    # Added under the root when a trained model normalizes embeddings.
    "model.l2_epsilon": Key(1e-12, ABOVE_ZERO),
    # `cudnn` fuses attention on a GPU, without dropout.
    "model.attention": Key("xla", one_of(*families.ATTENTIONS)),
    # Scale of residual-branch initializers, relative to T5X's; a fresh encoder is then
    # close to a bag of tokens.
    "model.residual_init_scale": Key(0.1, ABOVE_ZERO),
    # Mean over the tokens of a text, or its last token (Qwen3-Embedding).
    "model.pooling": Key("mean", one_of(*families.POOLINGS)),
    # Key and value heads; 0 for as many as `num_heads`.
    "model.num_kv_heads": Key(0, COUNT),
    # The same of global layers, if it differs (EmbeddingGemma 2).
    "model.global_num_kv_heads": Key(0, COUNT),
    # Width of a head of global layers, if it differs (EmbeddingGemma 2).
    "model.global_head_dim": Key(0, COUNT),
    # Reach of local layers to the left and right, in tokens.
    "model.local_window": Key((), _WINDOW),
    # Period of the global layers (Gemma 3: 6).
    "model.global_every": Key(1, between(1, 1_000)),
    # Base of the rotary frequencies of global layers (Gemma 3).
    "model.rope_base": Key(1e6, ABOVE_ZERO),
    # Divisor of these frequencies (Gemma 3 of 4B and more: 8).
    "model.rope_factor": Key(1.0, ABOVE_ZERO),
    # Base of the rotary frequencies of local layers (Gemma 3).
    "model.local_rope_base": Key(1e4, ABOVE_ZERO),
    # Factor of the attention logits; 0 for head_dim ** -0.5.
    "model.query_scale": Key(0.0, NOT_NEGATIVE),
    "model.norm_epsilon": Key(1e-6, ABOVE_ZERO),  # Added to the mean square in norms.
    # Width of the per-layer embeddings (EmbeddingGemma 2).
    "model.per_layer_dim": Key(0, COUNT),
    # Workdir, model folder or checkpoint to start from; empty for none.
    "init.checkpoint": Key("", TEXT),
    # From scratch: `idf` makes rare tokens count more.
    "init.token_weights": Key("none", one_of("none", "idf")),
    # From scratch with `idf`: share of the token dims hidden from the projection.
    "init.token_weight_dims": Key(
        0.25, Rule(float, "must be in (0, 1)", lambda v: 0 < v < 1)
    ),
    # From scratch: batches to align the projection on; 0 for none.
    "init.align_steps": Key(0, COUNT),
    "loss.temperature": Key(0.01, ABOVE_ZERO),  # Divides the similarities (GTR).
    "loss.mrl_dims": Key((256,), _MRL_DIMS),  # Trained prefixes (section 3.1).
    # Weight of each prefix; the paper's are equal.
    "loss.mrl_weights": Key((1.0,), _MRL_WEIGHTS),
    # Same-tower negatives: other queries (eq. 3).
    "loss.same_tower": Key(True, SWITCH),
    # Same-tower negatives: other positives (SamToNe).
    "loss.same_tower_passages": Key(False, SWITCH),
    "loss.bidirectional": Key(False, SWITCH),  # Adds the passage-to-query loss (GTR).
    # Adds the hard negatives of the other examples (GTR).
    "loss.all_hard_negatives": Key(False, SWITCH),
    # Masks in-batch negatives equal to the query or the positive.
    "loss.mask_duplicates": Key(False, SWITCH),
    # Weight of hard negatives by cosine (EmbeddingGemma: 5).
    "loss.hardness": Key(0.0, NOT_NEGATIVE),
    # Weight of the spread-out regularizer (EmbeddingGemma).
    "loss.spread_weight": Key(0.0, NOT_NEGATIVE),
    # Weight of embedding matching (EmbeddingGemma).
    "loss.matching_weight": Key(0.0, NOT_NEGATIVE),
    # Weight of the KL divergence from the lines' `scores` (E5; FlagEmbedding: 1).
    "loss.kl_weight": Key(0.0, NOT_NEGATIVE),
    # Divides these scores before their softmax (FlagEmbedding).
    "loss.kl_temperature": Key(1.0, ABOVE_ZERO),
    # Optimizer (GTR).
    "optimizer.name": Key("adafactor", one_of("adafactor", "adamw")),
    "optimizer.learning_rate": Key(1e-3, ABOVE_ZERO),  # Peak learning rate (GTR).
    # Learning rate of token embeddings, relative to the others.
    "optimizer.token_rate": Key(1.0, ABOVE_ZERO),
    # Decay after the warm-up (GTR).
    "optimizer.schedule": Key(
        "linear", one_of("constant", "linear", "cosine", "rsqrt")
    ),
    "optimizer.warmup_steps": Key(200, COUNT),  # Steps of linear warm-up.
    "optimizer.weight_decay": Key(0.0, NOT_NEGATIVE),  # Weight decay of matrices.
    # Largest global gradient norm; 0 for no clipping.
    "optimizer.clip_norm": Key(1.0, NOT_NEGATIVE),
    "optimizer.beta1": Key(0.0, SHARE),  # First-moment decay (T5's Adafactor: 0).
    "optimizer.beta2": Key(0.999, SHARE),  # Second-moment decay of AdamW.
    "train.num_steps": Key(20_000, POSITIVE),  # Optimizer steps (GTR).
    # Rows of the longer side per microbatch, over all hosts; 0: no split.
    "train.microbatch_size": Key(0, COUNT),
    "train.log_every_steps": Key(100, POSITIVE),  # Steps between lines of metrics.
    # Non-finite steps in a row to skip before the run stops.
    "train.max_skipped_steps": Key(0, COUNT),
    # Folder of compiled steps; empty for none.
    "train.compilation_cache": Key("~/.cache/gecko_jax/compiled", TEXT),
    "mesh.data": Key(-1, AXIS),  # Devices per slice along `data`; -1: the rest.
    "mesh.fsdp": Key(1, AXIS),  # Devices of a slice along `fsdp`.
    "mesh.tensor": Key(1, AXIS),  # Devices of a slice along `tensor`.
    "mesh.dcn_data": Key(-1, AXIS),  # Slices along `data`.
    "mesh.dcn_fsdp": Key(1, AXIS),  # Slices along `fsdp`.
    # Mesh axis of each logical axis (t5x).
    "mesh.rules": Key(sharding.RULES, _MESH_RULES),
    "checkpoint.every_steps": Key(1_000, POSITIVE),  # Steps between checkpoints.
    # Minutes between checkpoints, in addition; 0 for steps only.
    "checkpoint.every_minutes": Key(30, COUNT),
    "checkpoint.keep": Key(3, POSITIVE),  # Newest checkpoints to keep.
    # Also keeps checkpoints at multiples of this step; 0 for none.
    "checkpoint.keep_every_steps": Key(5_000, COUNT),
    # Steps between evaluations; 0 for start and end only.
    "evaluation.every_steps": Key(1_000, COUNT),
    # Evaluation set in BEIR layout; empty for none.
    "evaluation.folder": Key("", TEXT),
    # Queries to evaluate, for speed; 0 for all.
    "evaluation.max_queries": Key(1_000, COUNT),
}

# `evaluation.mteb_suites` knows their tasks.
SUITES = ("MTEB(eng, v1)", "MTEB(eng, v2)", "NanoBEIR", "MIRACL")

# Keys of `configs/evaluate.py`.
EVALUATION: dict[str, rules.Key] = {
    # Suites of mteb.
    "suites": Key(
        (),
        rules.tuple_of(
            str, "must hold some of " + "; ".join(SUITES), lambda v: v in SUITES
        ),
    ),
    "tasks": Key((), Rule(tuple)),  # Single tasks of mteb.
    "folders": Key((), Rule(tuple)),  # Local sets, as for `gecko evaluate`.
    # Trained dims to evaluate; empty for all.
    "dims": Key((), rules.tuple_of(int, "must be integers above 0", lambda v: v > 0)),
    # Model name in the results; empty for gecko-jax/FOLDER.
    "name": Key(
        "",
        Rule(
            str,
            "must be organization/model, or empty",
            lambda v: not v or re.fullmatch(r"[\w.-]+/[\w.-]+", v) is not None,
        ),
    ),
    # Query length in tokens; 0 for that of training.
    "query_length": Key(0, COUNT),
    # Passage length in tokens; 0 for that of training.
    "passage_length": Key(0, COUNT),
    "cache.folder": Key("~/.cache/gecko_jax/vectors", NAME),  # Cache of vectors.
    # Size of the cache after a run, over all models, in GiB.
    "cache.max_gib": Key(50.0, NOT_NEGATIVE),
    "mesh.data": Key(-1, AXIS),  # Devices along `data`.
    "mesh.fsdp": Key(1, AXIS),  # Devices along `fsdp`.
    "mesh.tensor": Key(1, AXIS),  # Devices along `tensor`.
}

# Keys that older configs lack, with the value that reproduces those runs.
ADDED_KEYS: dict[str, Any] = {
    "data.unique_ids": False,
    "loss.kl_temperature": 1.0,
    "loss.kl_weight": 0.0,
    "init.token_weight_dims": 0.25,
    "model.attention": "xla",
    "model.residual_init_scale": 0.1,
    # T5 was the only family.
    "model.family": "t5",
    **{f"model.{name}": value for name, value in families.ROTARY_FIELDS.items()},
}

# Both stages of a run that starts from a released encoder other than T5.
RELEASED: dict[str, Any] = {
    "model.dropout_rate": 0.0,  # The released models are trained without.
    "model.remat": "full",
    "optimizer.name": "adamw",
    "optimizer.beta1": 0.9,
    "train.microbatch_size": 512,  # Results do not depend on it.
    "mesh.data": 1,
    "mesh.fsdp": -1,  # All chips.
}

# The `local` argument of both stages: `mini` on a laptop CPU.
LOCAL: dict[str, Any] = {
    "data.query_length": 32,
    "data.passage_length": 128,
    "data.batch_size": 64,
    "model.dropout_rate": 0.0,  # A few epochs: every dim is better without dropout.
    "model.dtype": "float32",
    "model.scan_layers": False,
    "model.remat": "none",
    "loss.temperature": 0.05,
    "loss.mask_duplicates": True,
    "optimizer.name": "adamw",
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.98,
    "train.log_every_steps": 10,
    "checkpoint.keep_every_steps": 0,
    "evaluation.folder": "quickstart",
    "evaluation.max_queries": 0,
}
