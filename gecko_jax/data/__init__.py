"""Data: seqio tasks in, global batches of numpy arrays out.

    jsonl           JSON lines -> records, every bad line named
    preprocessors   record -> formatted texts -> tokens
    tasks           the one table of tasks and mixtures
    features        examples -> the arrays of a step, packed or not
    selection       a config's names -> tasks, sources, keys of caches
    cache           task -> tokenized records, addressed by number
    seqio_cache     the same work as a job of Apache Beam
    pipeline        tokenized records -> `Batches`, addressed by step
    negatives       which examples of a batch have any
    mining          BM25 hard negatives
    pieces          training a SentencePiece vocabulary
    fret_builder    an export of FRet -> a TFDS data set

TensorFlow lives here only, and only in the functions that define or run a seqio task:
once the caches are built, training reads them without it.
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
    """Imports seqio, and keeps TensorFlow away from the accelerators.

    TensorFlow would otherwise reserve all memory of the GPU that JAX is to use.

    Raises:
        ImportError: TensorFlow or seqio is not installed; says what needs them.
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
    """Keeps what C++ writes to stderr back, unless the import fails.

    Without CUDA drivers TensorFlow says so at every level of logging.
    """
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as notes:
        os.dup2(notes.fileno(), 2)
        try:
            yield
        except BaseException:
            notes.seek(0)
            os.write(before, notes.read())
            raise
        finally:
            os.dup2(before, 2)
            os.close(before)
