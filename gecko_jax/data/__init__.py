"""Data: seqio tasks in, global batches of numpy arrays out.

    jsonl           JSON lines -> checked examples
    task_table      the one table of tasks; `mixtures` sets their rates
    selection       a config's data settings -> tasks, their sources and cache keys
    registration    tasks -> seqio tasks, in the texts of `formatting`
    cache           seqio task -> tokenized examples, random access
    features        tokenized examples -> the arrays of a step, packed or not
    pipeline        all of it: `Batches`, random access by step

`prepare` turns a source of the table (`sources`) into JSON lines with `preprocessors`,
`classification` and `mining`.

Only this folder imports TensorFlow, and only in functions that define or run a seqio
task or read TensorFlow's files. Training from finished caches does not need it.
"""

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any


@functools.cache
def load_seqio() -> Any:
    """Imports seqio, and hides the accelerators from TensorFlow.

    TensorFlow would otherwise reserve all memory of the GPU that JAX uses. Raises an
    ImportError with the remedy if TensorFlow or seqio is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        with _silence_stderr():
            import tensorflow as tf

            tf.config.list_physical_devices()

        tf.config.set_visible_devices([], "GPU")
        tf.config.set_visible_devices([], "TPU")
        import seqio
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error}: tokenizing training data needs TensorFlow and seqio; install "
            "them with `pip install gecko-jax`, or train from a data.cache_dir that "
            "was filled where they are installed"
        ) from error
    return seqio


@contextlib.contextmanager
def _silence_stderr() -> Iterator[None]:
    """Withholds what C++ code writes to stderr, unless the import fails.

    Without CUDA drivers, TensorFlow prints a warning at every log level.
    """
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 2)
        try:
            yield
        except BaseException:
            output.seek(0)
            os.write(original, output.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)
