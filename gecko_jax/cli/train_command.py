"""`gecko train`: trains a model, on one host or on several."""

import argparse
import contextlib
import pathlib
import signal
import sys
from typing import Any

from gecko_jax.cli import flags, parsing

_TRAIN = """\
Trains a model, or goes on where an earlier run in the same workdir stopped.

examples:
  gecko train --config=configs/prefinetune.py:local --workdir=runs/prefinetune
  gecko train --config=configs/finetune.py:base --workdir=runs/finetune \\
      --config.init.checkpoint=runs/prefinetune \\
      --config.data.files=pairs.jsonl --config.data.batch_size=512

What follows the colon is the config's own argument, such as `local` (a laptop) or a
size. Every key of the config can be set: --config.GROUP.KEY=VALUE; tuples in quotes,
--config.loss.mrl_dims='(256,768)'. The workdir gets the resolved config, checkpoints,
metrics.jsonl and TensorBoard files, and can be used as a model at any time. After
SIGTERM everything is saved and the status is 143; the same command goes on.

several hosts, each with the same workdir:
  gecko train --distributed --config=... --workdir=...        TPU slices, srun, mpirun
  gecko train --coordinator=HOST:1234 --processes=2 --process=0 --config=..."""


def add_parser(verbs: Any) -> None:
    """Adds the parser of `gecko train`."""
    parser = parsing.add_verb(verbs, "gecko train", _TRAIN, train)
    parsing.add_config(parser)
    parser.add_argument(
        "--workdir", required=True, type=parsing.path, metavar="DIR", help="of the run"
    )
    parser.add_argument(
        "--profile",
        type=parsing.count,
        default=0,
        metavar="STEPS",
        help="write a trace of so many steps to DIR/profile, for xprof (0)",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, as TPU metadata, SLURM or Open MPI say",
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0, where nothing says so"
    )
    parser.add_argument(
        "--processes", type=parsing.positive, metavar="N", help="how many"
    )
    parser.add_argument(
        "--process", type=parsing.count, metavar="I", help="which, from 0"
    )
    parser.add_argument(
        "--peer-timeout",
        type=parsing.positive,
        default=100,
        metavar="SECONDS",
        help="how long a silent process is waited for (100)",
    )


def train(options: argparse.Namespace) -> None:
    """Trains, or goes on with, the run of a workdir."""
    from gecko_jax.cli import multi_process

    peers = multi_process.Peers(
        options.coordinator, options.processes, options.process, options.peer_timeout
    )
    multi_process.check(peers)
    is_distributed = options.distributed or peers.coordinator is not None
    if is_distributed and not multi_process.is_child():
        status = multi_process.run_child(options.arguments, peers)
        if status:
            raise SystemExit(status)
        return
    with multi_process.join(peers) if is_distributed else contextlib.nullcontext():
        _train(options)


def _train(options: argparse.Namespace) -> None:
    config = flags.load(options.config, options.overrides, flags.TRAIN)
    import gecko_jax.config
    from gecko_jax.training import interruption, loop

    # A wrong key should be told before anything else can fail.
    gecko_jax.config.check(config)
    from gecko_jax import evaluation
    from gecko_jax.plots import loss_curves

    evaluate = evaluation.build_callback(config, options.workdir)
    try:
        loop.train(
            config, options.workdir, evaluate=evaluate, profile_steps=options.profile
        )
    except interruption.Interrupted as interrupted:
        print(f"gecko train: {interrupted}", file=sys.stderr)
        # What a shell reports of a process that SIGTERM has ended.
        raise SystemExit(128 + signal.SIGTERM) from None
    # The stages of a model in one picture: the run it started from, then its own.
    folders = (config.init.checkpoint or options.workdir, options.workdir)
    runs = [pathlib.Path(folder) / "metrics.jsonl" for folder in folders]
    runs = [run for run in dict.fromkeys(runs) if run.is_file()]
    if runs and _is_first_process():
        loss_curves.plot_training(runs, pathlib.Path(options.workdir) / "training.png")
    print(f"{options.workdir}: load it with gecko_jax.load({options.workdir!r})")


def _is_first_process() -> bool:
    import jax

    return jax.process_index() == 0
