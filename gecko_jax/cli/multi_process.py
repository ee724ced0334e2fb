"""Runs that span several processes: how they connect, and how they notice a failure.

JAX's runtime aborts a process when another process of the run is lost, and no Python
code runs after that. The process that the user starts is therefore a parent that does
not train: it starts the training process, forwards signals to it, and explains how it
ended.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Environment variable that the parent sets for the training process.
_CHILD = "GECKO_DISTRIBUTED_CHILD"

_RESUME = "Its checkpoints are complete; start every process again to resume"


class Peers(NamedTuple):
    """How the processes of a run connect.

    None is detected from TPU metadata, SLURM or Open MPI.
    """

    coordinator: str | None  # HOST:PORT of process 0
    num_processes: int | None
    process: int | None  # number of this process, from 0
    timeout_seconds: int  # how long to wait for an unresponsive process


def check(peers: Peers) -> None:
    """Raises ValueError if the settings are incomplete or out of range."""
    names = ("--coordinator", "--processes", "--process")
    missing = [n for n, value in zip(names, peers[:3], strict=True) if value is None]
    if 0 < len(missing) < len(names):
        raise ValueError(
            f"{', '.join(missing)}: missing; give all of {', '.join(names)}, or "
            "only --distributed on TPU slices and under SLURM or Open MPI"
        )
    if (peers.process or 0) >= (peers.num_processes or 1):
        raise ValueError(
            f"--process={peers.process}: must be below --processes="
            f"{peers.num_processes}; processes are numbered from 0"
        )


def is_child() -> bool:
    """Whether this process is the training process that a parent started."""
    return _CHILD in os.environ


def run_child(arguments: Sequence[str], peers: Peers) -> int:
    """Runs `gecko` in a child process; returns its exit status, 1 after a signal."""
    command = [sys.executable, "-m", "gecko_jax", *arguments]
    child = subprocess.Popen(command, env=os.environ | {_CHILD: "1"})

    def forward(number: int, _: object) -> None:
        child.send_signal(number)

    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, forward) for number in signals}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status >= 0:
        return status
    which = "this process" if peers.process is None else f"process {peers.process}"
    reason = f"was ended by {signal.Signals(-status).name}"
    if -status == signal.SIGABRT:
        reason = (
            "was stopped by JAX, because another process of the run ended or did not "
            f"respond for {peers.timeout_seconds} s (--peer-timeout)"
        )
    print(f"gecko train: error: {which} {reason}. {_RESUME}", file=sys.stderr)
    return 1


@contextlib.contextmanager
def join(peers: Peers) -> Iterator[None]:
    """Connects this process to the others of its run; raises ValueError if that fails.

    If communication with another process fails, this process exits at once: a normal
    exit would wait for the others.
    """
    import jax

    try:
        jax.distributed.initialize(
            peers.coordinator,
            peers.num_processes,
            peers.process,
            initialization_timeout=max(peers.timeout_seconds, 60),
            heartbeat_timeout_seconds=peers.timeout_seconds,
            shutdown_timeout_seconds=peers.timeout_seconds,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the processes of the run could not connect ({error}); give "
            "--coordinator=HOST:PORT of process 0, --processes and --process"
        ) from error
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        first_line = (str(error).strip().splitlines() or [""])[0][:300]
        print(
            f"gecko train: error: process {jax.process_index()} lost another process "
            f"of the run ({first_line}). {_RESUME}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
