"""Several processes as one run: how they find each other, and how they notice a loss.

JAX's runtime aborts a process whose peers are gone: no code of ours runs there any
more. So the process that a user starts is a parent that trains nothing; it starts the
one that does, passes signals on, and says in words how it ended.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Set in the process that trains, by its parent.
_CHILD = "GECKO_DISTRIBUTED_CHILD"


class Peers(NamedTuple):
    """How the processes of a run find each other.

    Attributes:
        coordinator: HOST:PORT of the first process; None to be told, with the numbers
            below, by the TPU's metadata, SLURM or Open MPI.
        num_processes: How many there are.
        process: Which one this is, from 0.
        timeout_seconds: How long a silent process is waited for.
    """

    coordinator: str | None
    num_processes: int | None
    process: int | None
    timeout_seconds: int


def check(peers: Peers) -> None:
    """Checks that the three numbers come together.

    Raises:
        ValueError: Some are given and some are not, or one is out of range.
    """
    given = {
        "--coordinator": peers.coordinator,
        "--processes": peers.num_processes,
        "--process": peers.process,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(
            f"{', '.join(missing)}: missing; give all of {', '.join(given)}, or "
            "--distributed alone where TPU metadata, SLURM or Open MPI know them"
        )
    if (peers.process or 0) >= (peers.num_processes or 1):
        raise ValueError(
            f"--process={peers.process}: must be below --processes="
            f"{peers.num_processes}; processes are numbered from 0"
        )


def is_child() -> bool:
    """Whether this process is the one that trains."""
    return _CHILD in os.environ


def run_child(arguments: Sequence[str], peers: Peers) -> int:
    """Runs `gecko` with the arguments in a process that may be aborted.

    Returns:
        Its exit status; 1 where a signal ended it, after a word about why.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "gecko_jax", *arguments], env=os.environ | {_CHILD: "1"}
    )

    def pass_on(number: int, _: object) -> None:
        child.send_signal(number)

    before = {
        number: signal.signal(number, pass_on)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status >= 0:
        return status
    name = signal.Signals(-status).name
    which = "this process" if peers.process is None else f"process {peers.process}"
    if -status == signal.SIGABRT:
        why = (
            f"{which} was stopped by JAX: another process of the run has ended or has "
            f"been silent for {peers.timeout_seconds} s (--peer-timeout)"
        )
    else:
        why = f"{which} was ended by {name}"
    print(
        f"gecko train: error: {why}. What was saved is whole: give every process its "
        "command again, and the run goes on",
        file=sys.stderr,
    )
    return 1


@contextlib.contextmanager
def join(peers: Peers) -> Iterator[None]:
    """Makes this process one of its run's.

    A failed exchange with another process ends this one at once: an orderly end would
    wait for the others.

    Raises:
        ValueError: No coordinator was found, or it did not answer.
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
            f"the processes of the run did not find each other ({error}); give "
            "--coordinator=HOST:PORT of the first, --processes and --process"
        ) from error
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        print(
            f"gecko train: error: process {jax.process_index()} lost another process "
            f"of the run ({first[:300]}). What was saved is whole: give every process "
            "its command again, and the run goes on",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
