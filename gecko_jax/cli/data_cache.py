"""`gecko data cache`: tokenizes with Apache Beam, on many machines."""

import argparse
from typing import Any

from gecko_jax.cli import flags, parsing
from gecko_jax.io import wording

_CACHE = """\
Tokenizes the data of a config with seqio's Apache Beam job, for data sets that are too
large for one machine. A training run whose data.cache_dir is the output folder reads
the cache and draws the same batches as without it. Training itself does not need Beam,
and without a cache it tokenizes the data when it starts.

Install Apache Beam in an environment of its own: pip install "gecko-jax[beam]"

examples:
  gecko data cache --config=configs/finetune.py:base --output=/mnt/bucket/cache \\
      --config.data.mixture=gecko_academic
  gecko data cache --config=configs/finetune.py:local --output=cache \\
      --pipeline-options=--direct_num_workers=4,--direct_running_mode=multi_processing"""


def add_parser(verbs: Any) -> None:
    """Adds the parser of `gecko data cache`."""
    parser = parsing.add_verb(verbs, "gecko data cache", _CACHE, cache)
    parsing.add_config(parser)
    parser.option("--output", "folder for the cache", "DIR", required=True)
    text = "options for Apache Beam, such as --runner=DataflowRunner"
    parser.option("--pipeline-options", text, parsing.words, (), metavar="OPTION,...")


def cache(options: argparse.Namespace) -> None:
    """Writes the caches of a config with Apache Beam and prints their sizes."""
    config = flags.load_checked(options, flags.TRAIN)
    from gecko_jax.data import selection, seqio_cache
    from gecko_jax.training import initialization, loop

    seqio_cache.load_beam()
    # The text format is that of the checkpoint from which training will start.
    vocabulary = loop.load_vocabulary(config)
    start = initialization.open_start(config, vocabulary)
    selected = selection.select(
        mixture=config.data.mixture,
        files=config.data.files,
        vocabulary=vocabulary,
        text_format=initialization.text_format(start, config.data.text_format),
        cache_dir=options.output,
        prepared_dir=config.data.prepared_dir,
        unique_ids=config.data.unique_ids,
        scores=config.loss.kl_weight > 0,
    )
    for task, key in zip(selected.tasks, selected.keys, strict=True):
        folder, stats = seqio_cache.write(
            task,
            key,
            selected.text_format,
            selected.vocabulary,
            selected.cache_dir,
            options.pipeline_options,
        )
        counts = {name: n for name, n in stats.items() if name.endswith("_tokens")}
        tokens = sum(n for name, n in counts.items() if "_max_tokens" not in name)
        parsing.say(
            f"{folder}: {wording.counted(stats['examples'], 'example')}, "
            f"{wording.counted(tokens, 'token')}"
        )
    parsing.say(f"Train on them with --config.data.cache_dir={options.output}")
