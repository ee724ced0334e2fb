"""`gecko train`: trains a model, on one host or on several."""

import argparse
import contextlib
import pathlib
import signal
import sys
from typing import Any

from gecko_jax.cli import flags, multi_process, parsing

_TRAIN = """\
Trains a model. If the workdir holds an earlier run, training resumes from its newest
checkpoint.

examples:
  gecko train --config=configs/prefinetune.py:local --workdir=runs/prefinetune
  gecko train --config=configs/finetune.py:base --workdir=runs/finetune \\
      --config.init.checkpoint=runs/prefinetune \\
      --config.data.files=pairs.jsonl --config.data.batch_size=512

The text after the colon is the config's own argument: `local` for a laptop, or a model
size such as `base`. --config.GROUP.KEY=VALUE sets any key of the config. Put tuples in
quotes: --config.loss.mrl_dims='(256,768)'.

The workdir receives the resolved config, checkpoints, metrics.jsonl and TensorBoard
files. It can be used as a model at any time: gecko_jax.load("runs/finetune"). On
SIGTERM the run saves a checkpoint and exits with status 143; the same command resumes
it.

several hosts, with the same workdir on each:
  gecko train --distributed --config=... --workdir=...        TPU slices, srun, mpirun
  gecko train --coordinator=HOST:1234 --processes=2 --process=0 --config=..."""


def add_parser(verbs: Any) -> None:
    """Adds the parser of `gecko train`."""
    parser = parsing.add_verb(verbs, "gecko train", _TRAIN, train)
    add = parser.option
    parsing.add_config(parser)
    add("--workdir", "folder of the run", "DIR", required=True)
    text = "write a profile of this many steps to DIR/profile, for xprof"
    add("--profile", text, parsing.count, 0, metavar="STEPS")
    text = "detect the other processes from TPU metadata, SLURM or Open MPI"
    add("--distributed", text, bool)
    add("--coordinator", "address of process 0", "HOST:PORT")
    add("--processes", "number of processes", parsing.positive)
    add("--process", "number of this process, from 0", parsing.count)
    text = "time to wait for an unresponsive process"
    add("--peer-timeout", text, parsing.positive, 100, metavar="SECONDS")


def train(options: argparse.Namespace) -> None:
    """Trains or resumes the run of a workdir."""
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
    config = flags.load_checked(options, flags.TRAIN)
    import jax

    from gecko_jax import evaluation
    from gecko_jax.plots import loss_curves
    from gecko_jax.training import interruption, loop

    evaluate = evaluation.build_callback(config, options.workdir)
    try:
        loop.train(
            config, options.workdir, evaluate=evaluate, profile_steps=options.profile
        )
    except interruption.Interrupted as interrupted:
        print(f"gecko train: {interrupted}", file=sys.stderr)
        # The exit status that a shell reports for a process ended by SIGTERM.
        raise SystemExit(128 + signal.SIGTERM) from None
    # One plot of all stages: the run that this one started from, and this one.
    folders = (config.init.checkpoint or options.workdir, options.workdir)
    runs = [pathlib.Path(folder) / "metrics.jsonl" for folder in folders]
    runs = [run for run in dict.fromkeys(runs) if run.is_file()]
    if runs and jax.process_index() == 0:
        loss_curves.plot_training(runs, pathlib.Path(options.workdir) / "training.png")
    print(f"{options.workdir}: load it with gecko_jax.load({options.workdir!r})")
