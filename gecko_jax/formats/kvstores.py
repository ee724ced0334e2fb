"""Folders on this machine, in a bucket or behind a web server, through tensorstore.

    /models/t5/checkpoint_1000   gs://bucket/checkpoint_1000   https://host/checkpoint_1000

Arrays are opened with nothing but their place: what an array is stands in the files
beside its chunks, and a driver named elsewhere may not exist here.
"""

import pathlib
import urllib.parse
from typing import Any

import numpy as np
import tensorstore as ts

from gecko_jax.formats import arrays
from gecko_jax.io import reading

_REMOTE = ("gs://", "http://", "https://")

# Size of the file that says what an array is, beyond any that is written.
_MOST_METADATA_BYTES = 2**20

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

    def __init__(
        self,
        path: str,
        spec: dict[str, Any] | None = None,
        database_bytes: int | None = None,
    ):
        """Names the folder; nothing is read yet.

        Args:
            path: A local path or a URL.
            spec: The tensorstore spec of the folder; None is made from the path.
            database_bytes: Size of the database that the folder is inside of.
        """
        self.path = path.rstrip("/")
        self.spec = spec or _spec(self.path)
        self._database_bytes = database_bytes
        self._store: ts.KvStore | None = None

    def __truediv__(self, name: str) -> "Folder":
        spec = {**self.spec, "path": f"{self.spec['path']}{name}/"}
        return Folder(f"{self.path}/{name}", spec, self._database_bytes)

    @property
    def name(self) -> str:
        """The last part of the path, with links and `..` followed."""
        return self.spec["path"].rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "Folder":
        """The folder that this one lies in."""
        outer = self.spec["path"].rstrip("/").rpartition("/")[0]
        path = outer if self.spec["driver"] == "file" else self.path.rpartition("/")[0]
        return Folder(path, {**self.spec, "path": f"{outer}/"})

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

    def open_array(self, name: str) -> arrays.Array:
        """Opens the array in the folder `name`; its chunks are read later.

        Raises:
            ValueError: There is no array there, or it claims more than is stored.
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
        shape, dtype = tuple(array.shape), np.dtype(array.dtype.numpy_dtype)
        # tensorstore aborts the process where memory ends.
        arrays.parse_shape(place.path, shape)
        arrays.check_size(place.path, shape, dtype, place._stored_bytes())
        # A scalar has no shape of a chunk.
        chunk = tuple(array.chunk_layout.read_chunk.shape or ())
        if any(size > max(whole, 1) for size, whole in zip(chunk, shape, strict=True)):
            raise ValueError(
                f"{place.path}: an array of shape {shape} in chunks of {chunk}; a "
                "chunk cannot be larger than its array, copy the checkpoint again"
            )
        return arrays.Array(
            place.path, shape, dtype, lambda: _result(array.read(), place.path)
        )

    def _stored_bytes(self) -> int | None:
        """Returns the size of the files below; None where listing them is slow."""
        local = self.local_file("")
        return self._database_bytes if local is None else _total_bytes(local)

    def _array_driver(self, place: "Folder") -> str:
        for name, driver in ((".zarray", "zarr"), ("zarr.json", "zarr3")):
            local = place.local_file(name)
            if local is not None and local.is_file():
                if local.stat().st_size > _MOST_METADATA_BYTES:
                    raise ValueError(
                        f"{local}: {local.stat().st_size:,} bytes, and what an array "
                        f"is takes at most {_MOST_METADATA_BYTES:,}; copy it again"
                    )
                return driver
            if place.has(name):
                return driver
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
    local = folder.local_file("")
    return Folder(
        folder.path,
        {"driver": "ocdbt", "base": folder.spec, "path": ""},
        None if local is None else _total_bytes(local),
    )


def read_json(folder: Folder, name: str) -> Any:
    """Returns the content of a JSON file, or None where there is none."""
    content = folder.read(name)
    try:
        return None if content is None else reading.parse_json(content)
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
    # Resolved, for tensorstore refuses `..` in a path.
    return {"driver": "file", "path": f"{pathlib.Path(path).resolve()}/"}


def _total_bytes(path: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


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
