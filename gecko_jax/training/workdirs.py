"""A training workdir as a run finds it and as it begins it.

The files are listed in `checkpoints`; here is what decides whether a run may go on in
a workdir, and what makes the workdir a model before its first step.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from absl import logging

import gecko_jax.config
from gecko_jax.data import pipeline
from gecko_jax.formats import model_folder
from gecko_jax.io import reading, writing
from gecko_jax.models import dual_encoder

CONFIG = "config.json"
LOCK = "lock"

# Keys that may differ when a workdir is taken up again: they change neither what is
# learned nor what a checkpoint holds.
_FREE_ON_RESUME = (
    "train.log_every_steps",
    "train.microbatch_size",
    "train.max_skipped_steps",
    "train.compilation_cache",
    "mesh.",
    "checkpoint.",
    "evaluation.",
    "data.cache_dir",
    "data.prepared_dir",
)


@contextlib.contextmanager
def hold(workdir: pathlib.Path, is_main: bool) -> Iterator[None]:
    """Keeps other runs out of a workdir for as long as this process lives in it.

    The lock is the kernel's: it is gone when the process is, however that ends.

    Args:
        workdir: The run's folder, made if it is not there.
        is_main: Whether this is the run's first process, the one that holds the lock.

    Raises:
        ValueError: Another run is in the workdir; names its process and machine.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if not is_main:
        yield
        return
    with (workdir / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{workdir}: another run is at work in it ({file.read().strip()}); "
                "wait for it, end it, or choose another workdir"
            ) from None
        except OSError as error:
            # A bucket that is mounted as a folder may know no locks.
            logging.info("%s cannot be locked (%s)", workdir, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def check_config(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Refuses to go on in the workdir of a run with another config.

    Raises:
        ValueError: Names every key that differs, with both values.
    """
    path = workdir / CONFIG
    if not path.exists():
        return
    try:
        before = gecko_jax.config.flatten(reading.parse_json(path.read_text("utf-8")))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: not the JSON of a config ({error}); the file is damaged, restore "
            "it or choose another workdir"
        ) from None
    before = gecko_jax.config.ADDED_KEYS | before
    now = gecko_jax.config.flatten(json.loads(gecko_jax.config.to_json(config)))
    changed = [
        f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(_FREE_ON_RESUME)
    ]
    if changed:
        raise ValueError(
            f"{workdir}: made by another config; set these back, or choose another "
            "workdir (init.checkpoint starts from this one):\n  " + "\n  ".join(changed)
        )


def check_position(
    position: Mapping[str, Any],
    batches: pipeline.Batches,
    config: ml_collections.ConfigDict,
) -> None:
    """Refuses to go on when the data is not what the checkpoint was trained on.

    Raises:
        ValueError: Names what has changed: task, source, rate, format or size.
    """
    mixture_hash, facts = position.get("mixture_hash"), position.get("mixture", {})
    if not isinstance(mixture_hash, str) or not isinstance(facts, Mapping):
        raise ValueError(
            "the newest of checkpoints/ has an edited position (mixture_hash is "
            f"{mixture_hash!r}); remove that checkpoint, and the run goes on from the "
            "one before"
        )
    if mixture_hash != batches.mixture_hash:
        before = _flat_facts(facts)
        now = _flat_facts(json.loads(json.dumps(batches.facts)))
        changed = [
            f"{name}: was {before.get(name)!r}, is {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and not name.endswith(".cache")
        ] or ["the version of the code that tokenizes"]
        raise ValueError(
            f"the data has changed since the checkpoint was made (mixture "
            f"{mixture_hash}, now {batches.mixture_hash}): a resumed run "
            "would not see the examples it should; restore the files of "
            f"data.files={config.data.files} or data.mixture={config.data.mixture}, or "
            "start in a new workdir. Changed:\n  " + "\n  ".join(changed)
        )


def _flat_facts(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"task docs.rate": ...}; task names may hold dots."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            part = "task " if name == "tasks" and not prefix else f"{prefix}{name}."
            flat |= _flat_facts(value, part)
        else:
            flat[prefix + name] = value
    return flat


def write_model(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    encoder_config: dual_encoder.EncoderConfig,
    batches: pipeline.Batches,
    start: model_folder.ModelFiles | None,
) -> None:
    """Writes what makes the workdir a model, before step 0."""
    with writing.write_file(workdir / CONFIG) as temporary:
        temporary.write_text(gecko_jax.config.to_json(config))
    provenance = {
        "config": json.loads(gecko_jax.config.to_json(config)),
        "mixture_hash": batches.mixture_hash,
        "tasks": {
            task.name: {"licence": task.licence, "num_examples": size}
            for task, size in zip(batches.tasks, batches.task_sizes, strict=True)
        },
        "started_from": start.revision if start else None,
    }
    model_folder.write_model_json(
        workdir,
        model_folder.ModelFiles(
            params={},
            encoder_config=encoder_config,
            text_format=batches.text_format,
            vocabulary_proto=batches.vocabulary.model_proto,
            extra_ids=batches.vocabulary.extra_ids,
            mrl_dims=tuple(config.loss.mrl_dims),
            query_length=config.data.query_length,
            passage_length=config.data.passage_length,
            step=0,
            revision=_revision(provenance),
            provenance=provenance,
        ),
    )


def _revision(provenance: Mapping[str, Any]) -> str:
    """Names the run by all that decides its parameters."""
    facts = {
        key: value
        for key, value in gecko_jax.config.flatten(provenance).items()
        if not key.removeprefix("config.").startswith(_FREE_ON_RESUME)
    }
    encoded = json.dumps(facts, sort_keys=True, default=list).encode()
    return hashlib.sha256(encoded).hexdigest()[:12]
