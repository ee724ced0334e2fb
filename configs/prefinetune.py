r"""Pre-finetuning: pairs, in-batch negatives, large batches (section 3.3, eq. 2).

    gecko train --config=configs/prefinetune.py:local --workdir=runs/prefinetune
    gecko train --config=configs/prefinetune.py:base --workdir=/mnt/bucket/pre \
        --config.data.files='("pairs.jsonl.gz",)' \
        --config.data.vocabulary=t5.model --config.data.extra_ids=100

Arguments: a size (mini, small, base, large, xl, xxl) and `local`, which trains `mini`
on the bundled corpus on a laptop CPU in about four minutes. `local,bag` trains its
token embeddings alone, on many times as many texts a second; the next stage puts layers
on top, so that a small model from scratch sees more text in its time. `local,taught` is
such a bag of width 1,024 that follows a teacher's vectors as well, the best found for
an hour of a CPU (docs/recipes.md). The sizes want an accelerator and their own data.
`paper`, `modern` and `multilingual` are the first stage of the recipes of finetune.py
(docs/recipes.md), for base, large and xl. The paper gives no hyperparameters: numbers
without a source are ours.
"""

import ml_collections

from gecko_jax.config import parse_arg
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import sharding


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; see the file's docstring for `arg`."""
    arg = parse_arg(
        arg,
        size="mini",
        local=False,
        bag=False,
        taught=False,
        paper=False,
        modern=False,
        multilingual=False,
    )
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.mixture = "quickstart"  # used when there are no files
    config.data.files = ()  # JSONL of pairs: task, query, positive
    config.data.vocabulary = "quickstart"  # or the path of a SentencePiece .model
    config.data.extra_ids = 0  # sentinels after its pieces; T5 has 100
    config.data.query_length = 64  # tokens (GTR)
    config.data.passage_length = 512  # tokens (GTR)
    config.data.text_format = "gecko"  # or "plain": texts without task and title
    config.data.batch_size = 2048  # examples, over all hosts (GTR)
    config.data.num_negatives = 0  # eq. 2 has none
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
    config.loss.mrl_dims = (width,)  # eq. 2 is at full width alone
    config.loss.mrl_weights = (1.0,)
    config.loss.same_tower = False
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
    config.optimizer.warmup_steps = 1_000
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.beta1 = 0.0  # T5's Adafactor has no momentum
    config.optimizer.beta2 = 0.999  # AdamW's alone

    config.train = ml_collections.ConfigDict()
    config.train.num_steps = 800_000  # GTR
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
    config.checkpoint.keep_every_steps = 100_000  # these stay too; 0 for none

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.every_steps = 10_000  # 0 for the end alone
    config.evaluation.folder = ""  # BEIR layout; empty for no evaluation
    config.evaluation.max_queries = 1_000  # of them, for speed; 0 for all

    if arg.taught and not (arg.local and arg.size == "mini"):
        raise ValueError("taught: has a size of its own; name local with it, no other")
    if (arg.paper and arg.modern) or (
        arg.multilingual and not (arg.paper or arg.modern)
    ):
        raise ValueError("name one of paper, modern")
    if arg.paper or arg.modern:
        if arg.size not in ("base", "large", "xl"):
            raise ValueError("paper, modern: name a size with it: base, large or xl")
        t5x = "gs://t5-data/pretrained_models/t5x"
        config.init.checkpoint = f"{t5x}/t5_1_1_{arg.size}/checkpoint_1000000"
        config.data.mixture = "gecko_prefinetune"
        config.data.vocabulary = "t5.model"  # docs/recipes.md says where it comes from
        config.data.extra_ids = 100
        config.model.remat = "full"
        config.train.microbatch_size = 512  # rows; it decides memory alone
        config.mesh.data = 1
        config.mesh.fsdp = -1  # all chips
        if arg.multilingual:
            config.init.checkpoint = f"{t5x}/mt5_{arg.size}/checkpoint_1000000"
            config.data.vocabulary = "mt5.model"
            config.data.extra_ids = 0  # they are among its pieces
            config.model.vocab_size = 250_112  # mT5
    if arg.modern:
        config.data.one_task_per_batch = True  # EmbeddingGemma
        config.loss.mrl_dims = (128, 256, 512, 768)  # EmbeddingGemma
        config.loss.mrl_weights = (1.0,) * 4
        config.loss.mask_duplicates = True  # EmbeddingGemma
        config.loss.spread_weight = 1.0  # of EmbeddingGemma's term; the weight is ours

    if arg.local:
        config.init.token_weights = "idf"
        config.init.align_steps = 60  # one epoch
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
        config.optimizer.learning_rate = 5e-4
        config.optimizer.token_rate = 20.0
        config.optimizer.warmup_steps = 30
        config.optimizer.beta1 = 0.9
        config.optimizer.beta2 = 0.98
        config.train.num_steps = 200
        config.train.log_every_steps = 10
        config.train.compilation_cache = ""
        config.checkpoint.every_steps = 50
        config.checkpoint.keep_every_steps = 0
        config.evaluation.every_steps = 100
        config.evaluation.folder = "quickstart"
        config.evaluation.max_queries = 0
    if arg.bag or arg.taught:
        config.model.num_layers = 0
        config.model.scan_layers = False
        config.data.batch_size = 1024
        config.init.token_weights = "idf"
        config.init.align_steps = 10
        config.optimizer.learning_rate = 1e-3
        config.optimizer.token_rate = 60.0
        config.train.num_steps = 400
        config.checkpoint.every_steps = 100
    if arg.taught:
        config.data.vocabulary = "runs/pairs.model"  # 32,000 pieces
        config.data.one_task_per_batch = True
        config.data.teacher = "runs/teacher"  # of `gecko data teach`
        config.data.teacher_dim = 256
        config.model.vocab_size = 32_064
        config.model.model_dim = config.model.embedding_dim = 1024
        config.loss.mrl_dims = (256, 512, 1024)
        config.loss.matching_weight = 10.0
        config.optimizer.learning_rate = 2e-3
        config.train.num_steps = 250
    return config
