"""`gecko data cache`: tokenizing with Apache Beam, on many machines."""

import argparse
from typing import Any

from gecko_jax.cli import flags, parsing
from gecko_jax.io import wording

_CACHE = """\
Tokenizes the data of a config with seqio's Apache Beam job, whose workers share the
files: for sets that are too large for one machine. Training takes the caches over when
its data.cache_dir is the folder, and draws the same batches as without them; it needs
no Beam. Without this verb training tokenizes by itself.

Apache Beam wants an environment of its own: pip install "gecko-jax[beam]"

examples:
  gecko data cache --config=configs/finetune.py:base --output=/mnt/bucket/cache \\
      --config.data.mixture=gecko_academic
  gecko data cache --config=configs/finetune.py:local --output=cache \\
      --pipeline-options=--direct_num_workers=4,--direct_running_mode=multi_processing"""


def add_parser(verbs: Any) -> None:
    """Adds the parser of `gecko data cache`."""
    parser = parsing.add_verb(verbs, "gecko data cache", _CACHE, cache)
    parsing.add_config(parser)
    parsing.add_output(parser, "DIR", "the data.cache_dir of the runs to come")
    parser.add_argument(
        "--pipeline-options",
        type=parsing.words,
        default=(),
        metavar="OPTION,...",
        help="of Apache Beam, such as --runner=DataflowRunner",
    )


def cache(options: argparse.Namespace) -> None:
    """Fills the caches of a config with Apache Beam, and says what they hold."""
    config = flags.load(options.config, options.overrides, flags.TRAIN)
    import gecko_jax.config
    from gecko_jax.data import selection, seqio_cache
    from gecko_jax.training import initialization, loop

    gecko_jax.config.check(config)
    seqio_cache.load_beam()
    # How texts are written comes from the checkpoint that training will start from.
    start = initialization.load_start(config)
    chosen = selection.select(
        mixture=config.data.mixture,
        files=config.data.files,
        vocabulary=loop.load_vocabulary(config),
        text_format=initialization.text_format(start, config.data.text_format),
        cache_dir=options.output,
        prepared_dir=config.data.prepared_dir,
        unique_ids=config.data.unique_ids,
    )
    for task, key in zip(chosen.tasks, chosen.keys, strict=True):
        folder, stats = seqio_cache.write(
            task,
            key,
            chosen.text_format,
            chosen.vocabulary,
            chosen.cache_dir,
            options.pipeline_options,
        )
        tokens = sum(
            n
            for name, n in stats.items()
            if name.endswith("_tokens") and not name.endswith("_max_tokens")
        )
        parsing.say(
            f"{folder}: {wording.counted(stats['examples'], 'example')}, "
            f"{wording.counted(tokens, 'token')}"
        )
    parsing.say(f"Train on them with --config.data.cache_dir={options.output}")
