"""Damage of checkpoints: what proves it, and the errors about it.

A checkpoint is *damaged* if its own files prove it: one is missing, truncated, cannot
be decoded, or differs from what was written. Any other failure, of the network or of
the machine, does not concern the files, and leaves them in place.
"""

import contextlib
import json
import operator
import pathlib
import re
from collections.abc import Iterator

from gecko_jax.io import reading, wording

# TensorStore's errors for missing bytes and bytes that cannot be decoded. Other codes,
# such as UNAVAILABLE and PERMISSION_DENIED, concern the access to the bytes.
_IS_DAMAGE = re.compile(
    r"^(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION): |"
    r"^Error .*(Error decoding|; at byte \d+)|"
    r"tree structures do not match"
)


class DamagedError(ValueError):
    """The files of a checkpoint prove that they are not what was written."""


@contextlib.contextmanager
def explain_reading(folder: pathlib.Path) -> Iterator[None]:
    """Raises a ValueError in place of the errors of Orbax, TensorStore and JSON."""
    try:
        yield
    except Exception as error:
        causes = list(_causes(error))
        if problem := _find_damage(folder, causes):
            raise damaged(folder, problem) from error
        # Orbax wraps the error of TensorStore, which is the last.
        raise ValueError(
            f"{folder}: this checkpoint cannot be read ({_described(causes[-1])}), and "
            "nothing proves that its files are damaged, so they stay in place; remove "
            "the cause and run the same command again"
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        if not isinstance(error, StopIteration):  # Python's JSON parser raises it.
            yield error
        context = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or context


def _find_damage(folder: pathlib.Path, causes: list[BaseException]) -> str:
    """Returns what proves that the files are damaged, "" if nothing does."""
    proofs = []
    for cause in causes:
        is_lost = isinstance(cause, FileNotFoundError) and folder.is_dir()
        if is_lost and str(folder) in str(cause):
            proofs.append(wording.first_line(cause))
        elif isinstance(cause, OSError | ImportError | MemoryError):
            return ""  # A failure of the system or of the installation.
        elif isinstance(cause, UnicodeDecodeError | json.JSONDecodeError) or (
            isinstance(cause, ValueError) and _IS_DAMAGE.search(str(cause))
        ):
            proofs.append(wording.first_line(cause))
    return _find_damaged_metadata(folder) or (proofs[-1] if proofs else "")


def _find_damaged_metadata(folder: pathlib.Path) -> str:
    """Returns what is wrong with the JSON files of a checkpoint, "" for nothing."""
    for path in (
        *sorted(folder.glob("*/_METADATA")),
        *sorted(folder.glob("*/array_metadatas/*")),
        folder / "position" / "metadata",
    ):
        try:
            values = reading.parse_json(path.read_bytes())
            if path.name == "_METADATA":
                read_value = operator.itemgetter("value_type", "skip_deserialize")
                read_key = operator.itemgetter("key", "key_type")
                for entry in values["tree_metadata"].values():
                    read_value(entry["value_metadata"])
                    list(map(read_key, entry["key_metadata"]))
            elif path.parent.name == "array_metadatas":
                fields = ("param_name", "write_shape", "chunk_shape")
                for entry in values["array_metadatas"]:
                    operator.itemgetter(*fields)(entry["array_metadata"])
        except OSError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{path}: {_described(error)}"
    return ""


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {wording.first_line(error)}"


def remedy(folder: pathlib.Path) -> str:
    """Returns what to do about a damaged checkpoint."""
    return f"move {folder} away to use the previous one"


def damaged(folder: pathlib.Path, problem: str) -> DamagedError:
    """Returns the error about a damaged checkpoint."""
    return DamagedError(
        f"{folder}: this checkpoint is damaged ({problem}); {remedy(folder)}"
    )
