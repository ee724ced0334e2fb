"""Folders on this machine, in a bucket or behind a web server, through tensorstore.

    /models/t5/checkpoint_1000   gs://bucket/checkpoint_1000   https://host/checkpoint_1000

Arrays are opened with nothing but their place: what an array is stands in the files
beside its chunks, and a driver named elsewhere may not exist here.
"""

import pathlib
import urllib.parse
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from gecko_jax import files, tensors

_REMOTE = ("gs://", "http://", "https://")

# A few retries mend a hiccup; the defaults keep a machine without network waiting.
_CONTEXT = {
    "http_request_retries": {"max_retries": 3},
    "gcs_request_retries": {"max_retries": 3},
}


def is_remote(path: str) -> bool:
    """Whether a path is a URL of a kind that can be read."""
    return path.startswith(_REMOTE)


class Folder:
    """A folder of files by name, wherever it lies.

    Attributes:
        path: As the user wrote it, for errors.
    """

    def __init__(self, path: str, spec: dict[str, Any] | None = None):
        """Names the folder; nothing is read yet.

        Args:
            path: A local path or a URL.
            spec: The tensorstore spec of the folder; None is made from the path.
        """
        self.path = path.rstrip("/")
        self.spec = spec or _spec(self.path)
        self._store: ts.KvStore | None = None

    def __truediv__(self, name: str) -> "Folder":
        return Folder(
            f"{self.path}/{name}", {**self.spec, "path": f"{self.spec['path']}{name}/"}
        )

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    def read(self, name: str) -> bytes | None:
        """Returns the content of a file, or None where there is none."""
        try:
            result = self._open().read(name).result()
        except Exception as error:
            raise self._fault(error) from error
        return result.value if result.state == "value" else None

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        local = self.local_file(name)
        return self.read(name) is not None if local is None else local.is_file()

    def list(self) -> set[str]:
        """Returns the paths of all files below; a web server cannot tell them."""
        try:
            return {key.decode() for key in self._open().list().result()}
        except Exception as error:
            raise self._fault(error) from error

    def local_file(self, name: str) -> pathlib.Path | None:
        """Returns the path of a file that is on this machine."""
        if self.spec["driver"] != "file":
            return None
        return pathlib.Path(self.spec["path"]) / name

    def open_array(self, name: str) -> tensors.Tensor:
        """Opens the array in the folder `name`; its chunks are read later.

        Raises:
            ValueError: There is no array there, or it does not hold floats.
        """
        place = self / name.strip("/")
        driver = self._array_driver(place)
        array: Any = _result(
            ts.open(
                {
                    "driver": driver,
                    "kvstore": place.spec,
                    # A chunk that was lost would be read as zeros otherwise.
                    "fill_missing_data_reads": False,
                },
                open=True,
                read=True,
                context=ts.Context(_CONTEXT),
            ),
            place.path,
        )
        dtype = array.dtype.numpy_dtype
        # The second age of T5X stores bfloat16 under the name of its bits.
        is_bits = dtype == np.uint16
        if not is_bits and not (
            np.issubdtype(dtype, np.floating) or dtype == ml_dtypes.bfloat16
        ):
            raise ValueError(f"{place.path}: holds {dtype}, and weights must be floats")

        def read() -> np.ndarray:
            numbers = _result(array.read(), place.path)
            if is_bits:
                numbers = numbers.view(ml_dtypes.bfloat16)
            return np.asarray(numbers, np.float32)

        return tensors.Tensor(tuple(array.shape), read, place.path)

    def _array_driver(self, place: "Folder") -> str:
        if place.has(".zarray"):
            return "zarr"
        if place.has("zarr.json"):
            return "zarr3"
        raise ValueError(
            f"{place.path}: neither .zarray nor zarr.json here; a part of the "
            "checkpoint is missing, copy it again"
        )

    def _open(self) -> ts.KvStore:
        if self._store is None:
            self._store = ts.KvStore.open(
                self.spec, context=ts.Context(_CONTEXT)
            ).result()
        return self._store

    def _fault(self, error: Exception) -> ValueError:
        remedy = "check the address and the network" if is_remote(self.path) else ""
        return ValueError(
            f"{self.path}: cannot be read ({_first_line(error)}); "
            f"{remedy or 'check the path and who may read it'}"
        )


def ocdbt(folder: Folder) -> Folder:
    """Returns the folder inside the database that newer Orbax writes."""
    return Folder(folder.path, {"driver": "ocdbt", "base": folder.spec, "path": ""})


def read_json(folder: Folder, name: str) -> Any:
    """Returns the content of a JSON file, or None where there is none."""
    content = folder.read(name)
    try:
        return None if content is None else files.parse_json(content)
    except ValueError:
        raise ValueError(
            f"{folder.path}/{name}: not JSON; the file is damaged, copy it again"
        ) from None


def _spec(path: str) -> dict[str, Any]:
    if path.startswith("gs://"):
        bucket, _, inside = path.removeprefix("gs://").partition("/")
        if not bucket or not inside:
            raise ValueError(f"{path}: must be gs://BUCKET/FOLDER")
        return {"driver": "gcs", "bucket": bucket, "path": f"{inside}/"}
    if is_remote(path):
        parts = urllib.parse.urlsplit(path)
        return {
            "driver": "http",
            "base_url": f"{parts.scheme}://{parts.netloc}",
            "path": f"{parts.path}/",
        }
    return {"driver": "file", "path": f"{pathlib.Path(path).absolute()}/"}


def _result(future: Any, path: str) -> Any:
    try:
        return future.result()
    except Exception as error:
        raise ValueError(
            f"{path}: this array cannot be read ({_first_line(error)}); a chunk is "
            "missing or damaged, copy the checkpoint again"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
