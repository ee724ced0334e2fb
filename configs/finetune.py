r"""Fine-tuning: triples, hard and same-tower negatives, MRL (section 3.3, eq. 3).

    gecko train --config=configs/finetune.py:local --workdir=runs/finetune \
        --config.init.checkpoint=runs/prefinetune --config.data.files=triples.jsonl
    gecko train --config=configs/finetune.py:base --workdir=/mnt/bucket/finetune \
        --config.init.checkpoint=/mnt/bucket/prefinetune \
        --config.data.files=triples.jsonl.gz \
        --config.data.vocabulary=t5.model --config.data.extra_ids=100

Arguments: a size (mini, small, base, large, xl, xxl); `local`, which trains `mini` on a
laptop CPU in two to three minutes; `local,shipped`, which starts from the bundled
model; `local,taught`, the second stage of that recipe of prefinetune.py
(docs/recipes.md); `hardware=NAME`, one of the names below, for `xl`; and `fret`, for
the triples of `gecko fret run` in runs/fret (use --config.data.files for another
place). `gecko data prepare` mines hard negatives for pairs.

Three recipes set everything but the hardware, for base, large and xl (docs/recipes.md):
`paper` (eq. 3 unchanged, GTR's numbers), `zero_shot` (the same on FRet data only) and
`modern` (changes of later models: EmbeddingGemma's losses, a teacher, 7 negatives).
`multilingual` adapts each of them to mT5. They start from runs/prefinetune.

`local,gemma` trains a small Gemma 3 encoder on a laptop CPU. `embeddinggemma`,
`embeddinggemma-2`, `t5gemma2-270m` and `qwen3-0.6b` (4b, 8b) fine-tune the released
model, which `gecko import` has written to models/NAME, with the losses of `modern`
(docs/encoder_families.md).

The paper gives no hyperparameters: numbers without a source are ours.
"""

import ml_collections

import gecko_jax.config

# Batch, rows of a microbatch, and chips along fsdp, for `xl`. v5e-16 and v5e-256 were
# compiled for the TPU (docs/performance.md); the others are estimates.
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
    arg = gecko_jax.config.parse_arg(
        arg,
        size="mini",
        local=False,
        taught=False,
        shipped=False,
        fret=False,
        hardware="",
        paper=False,
        zero_shot=False,
        modern=False,
        multilingual=False,
    )
    recipes = [name for name in ("paper", "zero_shot", "modern") if arg[name]]
    _check(arg, recipes)
    # Every key with its default, unit and source: gecko_jax/config/keys.py.
    config = gecko_jax.config.training(arg.size)
    width = config.model.embedding_dim
    if recipes:
        config.init.checkpoint = "runs/prefinetune"
        config.data.mixture = "gecko_finetune"
        config.data.vocabulary = "t5.model"  # docs/recipes.md names its source.
        config.data.extra_ids = 100
        config.model.remat = "full"
        config.train.microbatch_size = 512  # Results do not depend on it.
        config.mesh.data = 1
        config.mesh.fsdp = -1  # All chips.
        config.checkpoint.keep = 5
    if arg.multilingual:
        config.data.mixture = "gecko_multilingual"
        config.data.vocabulary = "mt5.model"
        config.data.extra_ids = 0  # mT5's vocabulary includes them.
        config.model.vocab_size = 250_112  # mT5
    if arg.zero_shot:
        config.data.mixture = "gecko_fret"
    is_released = config.model.family != "t5" and arg.size != "gemma"
    if is_released and arg.local:
        raise ValueError(f"local: trains mini or gemma on a laptop, not {arg.size}")
    if is_released:
        config.init.checkpoint = config.data.vocabulary = f"models/{arg.size}"
        config.data.mixture = "gecko_finetune"
        config.update_from_flattened_dict(gecko_jax.config.RELEASED)
        config.optimizer.learning_rate = 2e-5  # sentence-transformers' example
        # EmbeddingGemma: 20 billion tokens, here at the maximum lengths.
        config.train.num_steps = 2_400
        config.checkpoint.every_steps = 200
    if arg.modern or is_released:
        config.data.num_negatives = 7  # Qwen3-Embedding and others use 1 to 7.
        config.data.one_task_per_batch = True  # EmbeddingGemma
        config.data.teacher = "runs/teacher"  # Output of `gecko data teach`.
        config.data.teacher_dim = width
        gecko_jax.config.set_mrl_dims(config, (128, 256, 512, width))  # EmbeddingGemma
        config.loss.same_tower = False  # EmbeddingGemma and Gemini Embedding
        config.loss.mask_duplicates = True  # EmbeddingGemma
        config.loss.hardness = 5.0  # EmbeddingGemma
        config.loss.spread_weight = 1.0  # EmbeddingGemma's term; the weight is ours.
        config.loss.matching_weight = 10.0  # Ours; 1 helps a bag only a little.
        # For `gecko average`.
        config.checkpoint.keep_every_steps = 400 if is_released else 2_000
    if arg.fret:
        config.data.files = ("runs/fret/export/fret.jsonl",)
    if arg.hardware:
        batch_size, microbatch_size, fsdp = HARDWARE[arg.hardware]
        config.data.batch_size = batch_size
        config.train.microbatch_size = microbatch_size
        config.mesh.data = 1
        config.mesh.fsdp = fsdp
        config.model.remat = "full"
    if arg.local:
        config.update_from_flattened_dict(gecko_jax.config.LOCAL)
        gecko_jax.config.set_mrl_dims(config, (width // 4, width // 2, width))
        config.optimizer.learning_rate = 1e-4
        config.optimizer.warmup_steps = 10
        config.train.num_steps = 60
        config.checkpoint.every_steps = 20
        config.evaluation.every_steps = 30
    if arg.shipped:
        config.init.checkpoint = "mini"
        config.data.vocabulary = "mini"
        config.data.text_format = "plain"
        config.model.num_layers = 0
        config.model.vocab_size = 32_000
        # One more column than the vectors have gives all tokens the same length.
        config.model.model_dim = 257
        config.model.num_heads = config.model.head_dim = config.model.mlp_dim = 1
        config.model.embedding_dim = 256
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
        gecko_jax.config.set_mrl_dims(config, (256, 512, 1024))
        config.loss.matching_weight = 10.0
    return config


def _check(arg: ml_collections.ConfigDict, recipes: list[str]) -> None:
    if len(recipes) > 1 or (arg.multilingual and not recipes):
        raise ValueError(
            f"{', '.join(recipes) or 'multilingual'}: name one of paper, zero_shot, "
            "modern"
        )
    if recipes and arg.size not in ("base", "large", "xl"):
        raise ValueError(f"{recipes[0]}: name a size with it: base, large or xl")
    sizes = [name for name in ("taught", "shipped") if arg[name]]
    if len(sizes) > 1:
        raise ValueError("taught, shipped: name one of them")
    if sizes and not (arg.local and arg.size == "mini"):
        raise ValueError(
            f"{sizes[0]}: has a size of its own; use it as local,{sizes[0]}"
        )
    if arg.hardware and arg.hardware not in HARDWARE:
        raise ValueError(f"hardware={arg.hardware}: known are {', '.join(HARDWARE)}")
