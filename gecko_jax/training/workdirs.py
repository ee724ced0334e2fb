"""The workdir of a training run: its lock, its config, and its model folder.

A run may continue in a workdir only with the same config, data and loss. The files of a
workdir are listed in `formats.checkpoints`.
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
from gecko_jax.losses import whole_batch

CONFIG = "config.json"
LOCK = "lock"

# Keys that may change on resume: they affect neither the parameters nor the contents of
# a checkpoint.
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
    """Creates the workdir, and locks it against other runs if this is process 0.

    The kernel releases the lock on exit. Raises a ValueError that names the process and
    machine of another run, if that holds the lock.
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
                f"{workdir}: another run uses it ({file.read().strip()}); wait for it, "
                "stop it, or choose another workdir"
            ) from None
        except OSError as error:
            # A bucket mounted as a folder may not support locks.
            logging.info("%s cannot be locked (%s)", workdir, error.strerror)
        # The next process that finds the lock taken reads who has it.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def check_config(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError that lists every key in which an earlier run differs."""
    path = workdir / CONFIG
    if not path.exists():
        return
    try:
        before = gecko_jax.config.flatten(reading.parse_json(path.read_text("utf-8")))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: damaged, not a config in JSON ({error}); restore it, or choose "
            "another workdir"
        ) from None
    # Older runs lack keys that were added since; ADDED_KEYS has the values they used.
    before = gecko_jax.config.ADDED_KEYS | before
    # Through JSON, so that tuples compare equal to the lists of the file.
    now = gecko_jax.config.flatten(json.loads(gecko_jax.config.to_json(config)))
    changed = [
        f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(_FREE_ON_RESUME)
    ]
    if changed:
        raise ValueError(
            f"{workdir}: belongs to a run with another config; change these keys back, "
            "or start in a new workdir with init.checkpoint set to this one:\n  "
            + "\n  ".join(changed)
        )


def check_position(
    saved: Mapping[str, Any],
    batches: pipeline.Batches,
    config: ml_collections.ConfigDict,
    loss: whole_batch.Loss | None,
) -> None:
    """Refuses to continue if the data or the loss differs from the checkpoint's.

    `saved` is what `position` returned when the checkpoint was saved. Raises a
    ValueError that names what has changed: task, source, rate, format, size or loss.
    """
    if saved.get("loss") != _loss_name(loss):
        before, now = saved.get("loss"), _loss_name(loss)
        raise ValueError(
            f"loss: the checkpoint was trained with {before or 'config.loss'}, not "
            f"with {now or 'config.loss'}; pass the same loss, or use a new workdir"
        )
    mixture_hash, facts = saved.get("mixture_hash"), saved.get("mixture", {})
    if not isinstance(mixture_hash, str) or not isinstance(facts, Mapping):
        raise ValueError(
            "the newest of checkpoints/ has an edited position (mixture_hash is "
            f"{mixture_hash!r}); remove that checkpoint to continue from the one before"
        )
    # The hash covers everything that step n depends on; the facts explain it.
    if mixture_hash != batches.mixture_hash:
        before = gecko_jax.config.flatten(facts)
        now = gecko_jax.config.flatten(batches.facts)
        changed = [
            f"{name}: was {before.get(name)!r}, is {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and not name.endswith(".cache")
        ] or ["the version of the code that tokenizes"]
        raise ValueError(
            f"the data has changed since the checkpoint was saved (mixture "
            f"{mixture_hash}, now {batches.mixture_hash}), so the run cannot continue "
            f"exactly; restore data.files={config.data.files} or "
            f"data.mixture={config.data.mixture}, or start in a new workdir. Changed:"
            "\n  " + "\n  ".join(changed)
        )


def position(
    batches: pipeline.Batches,
    config: ml_collections.ConfigDict,
    loss: whole_batch.Loss | None,
) -> dict[str, Any]:
    """Returns what a checkpoint records of the data and the loss, as JSON."""
    # The step is in the checkpoint; batch n depends on these facts and n alone.
    facts = {
        "mixture_hash": batches.mixture_hash,
        "mixture": batches.facts,
        "seed": config.seed,
    }
    return facts | ({"loss": _loss_name(loss)} if loss else {})


def _loss_name(loss: whole_batch.Loss | None) -> str | None:
    """Returns the name of a loss and a digest of its code, which must not change."""
    if loss is None:
        return None
    # The digest is of the bytecode: comments and line numbers may change.
    name = getattr(loss, "__qualname__", type(loss).__qualname__)
    content = _code(getattr(loss, "__code__", None))
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return f"{getattr(loss, '__module__', '')}.{name} ({digest})"


def _code(code: Any) -> str:
    """Returns what a code object computes, without its file and lines."""
    if not hasattr(code, "co_code"):
        return repr(code)
    constants = [_code(constant) for constant in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def write_model(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    batches: pipeline.Batches,
    start: model_folder.ModelFiles | None,
    loss: whole_batch.Loss | None,
) -> None:
    """Makes the workdir a model folder, before the first step."""
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
    if loss is not None:
        provenance["loss"] = _loss_name(loss)
    model_folder.write_model_json(
        workdir,
        model_folder.ModelFiles(
            params={},
            encoder_config=gecko_jax.config.encoder_config(config),
            text_format=batches.text_format,
            vocabulary_proto=batches.vocabulary.model_proto,
            extra_ids=batches.vocabulary.extra_ids,
            tokenizer_config=batches.vocabulary.tokenizer_config,
            mrl_dims=tuple(config.loss.mrl_dims),
            query_length=config.data.query_length,
            passage_length=config.data.passage_length,
            step=0,
            revision=_revision(provenance),
            provenance=provenance,
        ),
    )


def _revision(provenance: Mapping[str, Any]) -> str:
    """Returns a hash of everything that affects the parameters of the run."""
    # Keys that may change on resume do not affect the parameters.
    facts = {
        key: value
        for key, value in gecko_jax.config.flatten(provenance).items()
        if not key.removeprefix("config.").startswith(_FREE_ON_RESUME)
    }
    encoded = json.dumps(facts, sort_keys=True, default=list).encode()
    return hashlib.sha256(encoded).hexdigest()[:12]
