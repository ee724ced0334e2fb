r"""Fine-tuning: triples, hard and same-tower negatives, MRL (section 3.3, eq. 3).

    gecko train --config=configs/finetune.py:local --workdir=runs/finetune \
        --config.init.checkpoint=runs/prefinetune --config.data.files=triples.jsonl
    gecko train --config=configs/finetune.py:base --workdir=/mnt/bucket/finetune \
        --config.init.checkpoint=/mnt/bucket/prefinetune \
        --config.data.files=triples.jsonl.gz \
        --config.data.vocabulary=t5.model --config.data.extra_ids=100

Arguments: a size (mini, small, base, large, xl, xxl); `local`, which trains `mini` on a
laptop CPU in two to three minutes; `local,taught`, the second stage of that recipe of
prefinetune.py (docs/recipes.md); `hardware=NAME`, one of those below, for `xl`; and
`fret`, for the triples that `gecko fret run` left in runs/fret (elsewhere:
--config.data.files). `gecko data prepare` mines hard negatives for pairs.

Three recipes name everything but the machine, for base, large and xl (docs/recipes.md):
`paper` (eq. 3 to the letter, GTR's numbers), `zero_shot` (the same on FRet alone) and
`modern` (what later models changed: EmbeddingGemma's losses, a teacher, 7 negatives).
`multilingual` makes each of them one for mT5. They start from runs/prefinetune.
The paper gives no hyperparameters: numbers without a source are ours.
"""

import ml_collections

from gecko_jax.config import parse_arg
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import sharding

# Batch, rows of a microbatch, and chips along fsdp, for `xl`. The compiler has proved
# v5e-16 and v5e-256 (docs/performance.md); the others are estimates, to be proved.
HARDWARE = {
    "v5e-8": (256, 8, 8),
    "v5e-16": (512, 32, 16),
    "v5e-256": (8_192, 512, 256),
    "v5p-128": (8_192, 512, 64),
    "h100": (512, 32, 1),
    "h200": (512, 64, 1),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; see the file's docstring for `arg`."""
    arg = parse_arg(
        arg,
        size="mini",
        local=False,
        taught=False,
        fret=False,
        hardware="",
        paper=False,
        zero_shot=False,
        modern=False,
        multilingual=False,
    )
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.mixture = "quickstart"  # used when there are no files
    config.data.files = ()  # JSONL of triples: task, query, positive, negatives
    config.data.vocabulary = "quickstart"  # or the path of a SentencePiece .model
    config.data.extra_ids = 0  # sentinels after its pieces; T5 has 100
    config.data.query_length = 64  # tokens (GTR)
    config.data.passage_length = 512  # tokens (GTR)
    config.data.text_format = "gecko"  # or "plain": texts without task and title
    config.data.batch_size = 2048  # examples, over all hosts (GTR)
    config.data.num_negatives = 1  # eq. 3
    config.data.packing = True  # several texts share a row; results do not change
    config.data.one_task_per_batch = False
    # Classification triples: one id ends all three texts (section 3.3), which makes
    # in-batch negatives trivial; False masks them instead (ours).
    config.data.unique_ids = False
    config.data.cache_dir = "~/.cache/gecko_jax"  # tokenized examples, by content
    config.data.prepared_dir = "~/.cache/gecko_jax/prepared"  # by `gecko data prepare`
    config.data.teacher = ""  # vectors of `gecko data teach`, for embedding matching
    config.data.teacher_dim = 0  # their dims

    config.model = ml_collections.ConfigDict(
        dual_encoder.config_to_dict(
            dual_encoder.EncoderConfig(**dual_encoder.PRESETS[arg.size])
        )
    )
    config.model.mlp_activations = ("gelu", "linear")
    config.model.dropout_rate = 0.1  # T5
    config.model.dtype = "bfloat16"
    config.model.scan_layers = True
    config.model.remat = "dots"
    config.model.attention = "xla"  # or "cudnn", on a GPU and without dropout

    config.init = ml_collections.ConfigDict()
    config.init.checkpoint = ""  # workdir or model folder; empty for scratch
    config.init.token_weights = "none"  # from scratch: "idf", rare tokens count more
    config.init.align_steps = 0  # from scratch: batches whose pairs order the dims

    config.loss = ml_collections.ConfigDict()
    config.loss.temperature = 0.01  # GTR
    width = config.model.embedding_dim
    config.loss.mrl_dims = tuple(sorted({256, width}))  # section 3.1
    config.loss.mrl_weights = (1.0,) * len(config.loss.mrl_dims)  # the plain sum
    config.loss.same_tower = True  # eq. 3
    config.loss.same_tower_passages = False
    config.loss.bidirectional = False
    config.loss.all_hard_negatives = False
    config.loss.mask_duplicates = False
    config.loss.hardness = 0.0  # of hard negatives; EmbeddingGemma has 5
    config.loss.spread_weight = 0.0  # of the spread-out regularizer
    config.loss.matching_weight = 0.0  # of embedding matching, to data.teacher

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adafactor"  # GTR
    config.optimizer.learning_rate = 1e-3  # GTR
    config.optimizer.token_rate = 1.0  # of token embeddings, times learning_rate
    config.optimizer.schedule = "linear"  # GTR
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.beta1 = 0.0  # T5's Adafactor has no momentum
    config.optimizer.beta2 = 0.999  # AdamW's alone

    config.train = ml_collections.ConfigDict()
    config.train.num_steps = 20_000  # GTR
    config.train.microbatch_size = 0  # of the longer rows, all hosts'; 0 for all
    config.train.log_every_steps = 100
    config.train.max_skipped_steps = 0  # not finite in a row; 0 stops at the first
    config.train.compilation_cache = "~/.cache/gecko_jax/compiled"  # empty for none

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # devices of a slice; -1 for those that are left
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    config.mesh.dcn_data = -1  # slices; -1 for those that are left
    config.mesh.dcn_fsdp = 1
    config.mesh.rules = sharding.RULES  # logical axis, mesh axis

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_steps = 1_000
    config.checkpoint.every_minutes = 30  # as well; 0 for none
    config.checkpoint.keep = 3  # newest
    config.checkpoint.keep_every_steps = 5_000  # these stay too; 0 for none

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.every_steps = 1_000  # 0 for the end alone
    config.evaluation.folder = ""  # BEIR layout; empty for no evaluation
    config.evaluation.max_queries = 1_000  # of them, for speed; 0 for all

    if arg.taught and not (arg.local and arg.size == "mini"):
        raise ValueError("taught: has a size of its own; name local with it, no other")
    recipes = [name for name in ("paper", "zero_shot", "modern") if arg[name]]
    if len(recipes) > 1 or (arg.multilingual and not recipes):
        raise ValueError(
            f"{', '.join(recipes) or 'multilingual'}: name one of paper, zero_shot, "
            "modern"
        )
    if recipes and arg.size not in ("base", "large", "xl"):
        raise ValueError(f"{recipes[0]}: name a size with it: base, large or xl")
    if recipes:
        config.init.checkpoint = "runs/prefinetune"
        config.data.mixture = "gecko_finetune"
        config.data.vocabulary = "t5.model"  # docs/recipes.md says where it comes from
        config.data.extra_ids = 100
        config.model.remat = "full"
        config.train.microbatch_size = 512  # rows; it decides memory alone
        config.mesh.data = 1
        config.mesh.fsdp = -1  # all chips
        config.checkpoint.keep = 5
    if arg.multilingual:
        config.data.mixture = "gecko_multilingual"
        config.data.vocabulary = "mt5.model"
        config.data.extra_ids = 0  # they are among its pieces
        config.model.vocab_size = 250_112  # mT5
    if arg.zero_shot:
        config.data.mixture = "gecko_fret"
    if arg.modern:
        config.data.num_negatives = 7  # Qwen3-Embedding and others have 1 to 7
        config.data.one_task_per_batch = True  # EmbeddingGemma
        config.data.teacher = "runs/teacher"  # of `gecko data teach`
        config.data.teacher_dim = width
        config.loss.mrl_dims = (128, 256, 512, 768)  # EmbeddingGemma
        config.loss.mrl_weights = (1.0,) * 4
        config.loss.same_tower = False  # EmbeddingGemma and Gemini Embedding
        config.loss.mask_duplicates = True  # EmbeddingGemma
        config.loss.hardness = 5.0  # EmbeddingGemma
        config.loss.spread_weight = 1.0  # of EmbeddingGemma's term; the weight is ours
        config.loss.matching_weight = 10.0  # likewise; 1 brought a bag little
        config.checkpoint.keep_every_steps = 2_000  # for `gecko average`

    if arg.fret:
        config.data.files = ("runs/fret/export/fret.jsonl",)
    if arg.hardware:
        if arg.hardware not in HARDWARE:
            raise ValueError(
                f"hardware={arg.hardware}: known are {', '.join(HARDWARE)}"
            )
        batch_size, microbatch_size, fsdp = HARDWARE[arg.hardware]
        config.data.batch_size = batch_size
        config.train.microbatch_size = microbatch_size
        config.mesh.data = 1
        config.mesh.fsdp = fsdp
        config.model.remat = "full"

    if arg.local:
        config.data.query_length = 32
        config.data.passage_length = 128
        config.data.batch_size = 64
        config.model.dropout_rate = 0.0  # a few epochs: every dim is better without
        config.model.dtype = "float32"
        config.model.scan_layers = False
        config.model.remat = "none"
        config.loss.temperature = 0.05
        config.loss.mrl_dims = (width // 4, width // 2, width)
        config.loss.mrl_weights = (1.0, 1.0, 1.0)
        config.loss.mask_duplicates = True
        config.optimizer.name = "adamw"
        config.optimizer.learning_rate = 1e-4
        config.optimizer.warmup_steps = 10
        config.optimizer.beta1 = 0.9
        config.optimizer.beta2 = 0.98
        config.train.num_steps = 60
        config.train.log_every_steps = 10
        config.train.compilation_cache = ""
        config.checkpoint.every_steps = 20
        config.checkpoint.keep_every_steps = 0
        config.evaluation.every_steps = 30
        config.evaluation.folder = "quickstart"
        config.evaluation.max_queries = 0
    if arg.taught:
        config.init.checkpoint = "runs/prefinetune"
        config.data.vocabulary = "runs/pairs.model"
        config.data.passage_length = 256
        config.data.one_task_per_batch = True
        config.data.teacher = "runs/teacher"
        config.data.teacher_dim = 256
        config.model.num_layers = 0
        config.model.vocab_size = 32_064
        config.model.model_dim = config.model.embedding_dim = 1024
        config.loss.mrl_dims = (256, 512, 1024)
        config.loss.matching_weight = 10.0
    return config
