r"""Pre-finetuning: pairs, in-batch negatives, large batches (section 3.3, eq. 2).

    gecko train --config=configs/prefinetune.py:local --workdir=runs/prefinetune
    gecko train --config=configs/prefinetune.py:base --workdir=/mnt/bucket/pre \
        --config.data.files='("pairs.jsonl.gz",)' \
        --config.data.vocabulary=t5.model --config.data.extra_ids=100

Arguments: a size (mini, small, base, large, xl, xxl) and `local`, which trains `mini`
on the bundled corpus on a laptop CPU in about four minutes. `local,bag` trains only the
token embeddings and processes many times as many texts per second; the next stage adds
layers, so a small model from scratch sees more text in the same time. `local,taught` is
such a bag of width 1,024 that also learns a teacher's vectors, the best recipe for one
hour on a CPU (docs/recipes.md). The sizes need an accelerator and your own data.
`paper`, `modern` and `multilingual` are the first stage of the recipes of finetune.py
(docs/recipes.md), for base, large and xl. `embeddinggemma`, `embeddinggemma-2`,
`t5gemma2-270m` and `qwen3-0.6b` (4b, 8b) start from the released model, which `gecko
import` has written to models/NAME, with the losses of `modern`
(docs/encoder_families.md). The paper gives no hyperparameters: numbers without a source
are ours.
"""

import ml_collections

import gecko_jax.config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; see the file's docstring for `arg`."""
    arg = gecko_jax.config.parse_arg(
        arg,
        size="mini",
        local=False,
        bag=False,
        taught=False,
        paper=False,
        modern=False,
        multilingual=False,
    )
    _check(arg)
    # Every key with its default, unit and source: gecko_jax/config/keys.py.
    config = gecko_jax.config.training(arg.size)
    width = config.model.embedding_dim
    config.data.num_negatives = 0  # Eq. 2 has none,
    config.loss.same_tower = False  # no same-tower negatives either,
    gecko_jax.config.set_mrl_dims(config, (width,))  # and only the full width.
    config.optimizer.warmup_steps = 1_000
    config.train.num_steps = 800_000  # GTR
    config.checkpoint.keep_every_steps = 100_000
    config.evaluation.every_steps = 10_000
    if arg.paper or arg.modern:
        t5x = "gs://t5-data/pretrained_models/t5x"
        config.init.checkpoint = f"{t5x}/t5_1_1_{arg.size}/checkpoint_1000000"
        config.data.mixture = "gecko_prefinetune"
        config.data.vocabulary = "t5.model"  # docs/recipes.md names its source.
        config.data.extra_ids = 100
        config.model.remat = "full"
        config.train.microbatch_size = 512  # Results do not depend on it.
        config.mesh.data = 1
        config.mesh.fsdp = -1  # All chips.
        if arg.multilingual:
            config.init.checkpoint = f"{t5x}/mt5_{arg.size}/checkpoint_1000000"
            config.data.vocabulary = "mt5.model"
            config.data.extra_ids = 0  # mT5's vocabulary includes them.
            config.model.vocab_size = 250_112  # mT5
    is_released = config.model.family != "t5" and arg.size != "gemma"
    if is_released and arg.local:
        raise ValueError(f"local: trains mini or gemma on a laptop, not {arg.size}")
    if is_released:
        config.init.checkpoint = config.data.vocabulary = f"models/{arg.size}"
        config.data.mixture = "gecko_prefinetune"
        config.update_from_flattened_dict(gecko_jax.config.RELEASED)
        config.optimizer.learning_rate = 1e-4
        # EmbeddingGemma: 314 billion tokens, here at the maximum lengths.
        config.train.num_steps = 266_000
    if arg.modern or is_released:
        config.data.one_task_per_batch = True  # EmbeddingGemma
        gecko_jax.config.set_mrl_dims(config, (128, 256, 512, width))  # EmbeddingGemma
        config.loss.mask_duplicates = True  # EmbeddingGemma
        config.loss.spread_weight = 1.0  # EmbeddingGemma's term; the weight is ours.
    if arg.local:
        config.update_from_flattened_dict(gecko_jax.config.LOCAL)
        gecko_jax.config.set_mrl_dims(config, (width // 4, width // 2, width))
        config.init.token_weights = "idf"
        config.init.align_steps = 60  # One epoch.
        config.optimizer.learning_rate = 5e-4
        config.optimizer.token_rate = 20.0
        config.optimizer.warmup_steps = 30
        config.train.num_steps = 200
        config.checkpoint.every_steps = 50
        config.evaluation.every_steps = 100
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
        config.data.vocabulary = "runs/pairs.model"  # 32,000 pieces.
        config.data.one_task_per_batch = True
        config.data.teacher = "runs/teacher"  # Output of `gecko data teach`.
        config.data.teacher_dim = 256
        config.model.vocab_size = 32_064
        config.model.model_dim = config.model.embedding_dim = 1024
        gecko_jax.config.set_mrl_dims(config, (256, 512, 1024))
        config.loss.matching_weight = 10.0
        config.optimizer.learning_rate = 2e-3
        config.train.num_steps = 250
    return config


def _check(arg: ml_collections.ConfigDict) -> None:
    if arg.taught and not (arg.local and arg.size == "mini"):
        raise ValueError("taught: has a size of its own; use it as local,taught")
    is_recipe = arg.paper or arg.modern
    if (arg.paper and arg.modern) or (arg.multilingual and not is_recipe):
        raise ValueError("paper, modern: name one of paper, modern")
    if is_recipe and arg.size not in ("base", "large", "xl"):
        raise ValueError("paper, modern: name a size with it: base, large or xl")
