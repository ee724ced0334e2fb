"""Folders on this machine, in a bucket or behind a web server, through TensorStore.

    /models/t5/checkpoint_1000   gs://bucket/checkpoint_1000   https://host/checkpoint_1000

Arrays are opened by their path alone: the files next to the chunks describe the array,
and a driver that a checkpoint names may not exist here.
"""

import dataclasses
import functools
import pathlib
import urllib.parse
from typing import Any

import numpy as np
import tensorstore as ts

from gecko_jax.formats import source_files, tensors
from gecko_jax.io import wording

# Metadata file of an array -> TensorStore's driver, and its largest size.
_ARRAY_DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}
_MAX_METADATA_BYTES = 2**20

# With TensorStore's default number of retries, a machine without network waits long.
_CONTEXT = {
    "http_request_retries": {"max_retries": 3},
    "gcs_request_retries": {"max_retries": 3},
}


def is_remote(path: str) -> bool:
    """Whether a path is a URL that can be read."""
    return path.startswith(("gs://", "http://", "https://"))


@dataclasses.dataclass
class Folder:
    """A folder of files, local or remote; creating it reads nothing."""

    path: str  # local path or URL, for errors as the user wrote it
    # TensorStore spec of the folder; derived from the path if empty.
    spec: dict[str, Any] = dataclasses.field(default_factory=dict)
    database_bytes: int | None = None  # size of the OCDBT database around it

    def __post_init__(self):
        self.path = self.path.rstrip("/")
        self.spec = self.spec or _spec(self.path)

    def __truediv__(self, name: str) -> "Folder":
        spec = {**self.spec, "path": f"{self.spec['path']}{name}/"}
        return Folder(f"{self.path}/{name}", spec, self.database_bytes)

    @property
    def name(self) -> str:
        """Last part of the path, with links and `..` resolved."""
        return self.spec["path"].rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "Folder":
        """The folder that contains this one."""
        outer = self.spec["path"].rstrip("/").rpartition("/")[0]
        path = outer if self.spec["driver"] == "file" else self.path.rpartition("/")[0]
        return Folder(path, {**self.spec, "path": f"{outer}/"})

    def read(self, name: str, size: int = -1) -> bytes | None:
        """Returns `size` bytes of a file, or all if -1; None if it is missing."""
        local = self.local_file(name)
        try:
            if local is None:
                result = self._store.read(name).result()
                content = result.value if result.state == "value" else None
                return content if content is None or size < 0 else content[:size]
            if not local.is_file():
                return None
            with local.open("rb") as file:
                return file.read(size)
        except Exception as error:
            raise self._explain(error) from error

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.read(name, 0) is not None

    def list(self) -> set[str]:
        """Returns the paths of all files below; web servers do not list theirs."""
        try:
            return {key.decode() for key in self._store.list().result()}
        except Exception as error:
            raise self._explain(error) from error

    def local_file(self, name: str) -> pathlib.Path | None:
        """Returns the path of a file on this machine, None for a remote folder."""
        if self.spec["driver"] != "file":
            return None
        return pathlib.Path(self.spec["path"]) / name

    def open_array(self, name: str) -> tensors.Tensor:
        """Opens the array in the folder `name`; its chunks are read later.

        Raises ValueError if there is no array, or it claims more than is stored.
        """
        place = self / name.strip("/")
        spec = {
            "driver": place._array_driver(),
            "kvstore": place.spec,
            # By default, a missing chunk is read as zeros.
            "fill_missing_data_reads": False,
        }
        context = ts.Context(_CONTEXT)
        array: Any = _result(
            ts.open(spec, open=True, read=True, context=context), place.path
        )
        shape, dtype = tuple(array.shape), np.dtype(array.dtype.numpy_dtype)
        # TensorStore aborts the process when memory runs out.
        tensors.parse_shape(place.path, shape)
        # Listing the files of a remote folder is slow.
        local = place.local_file("")
        stored = place.database_bytes if local is None else _total_bytes(local)
        tensors.check_size(place.path, shape, dtype, stored)
        # The chunk shape of a scalar is None.
        chunk = tuple(array.chunk_layout.read_chunk.shape or ())
        if any(
            size > max(extent, 1) for size, extent in zip(chunk, shape, strict=True)
        ):
            raise ValueError(
                f"{place.path}: an array of shape {shape} in chunks of {chunk}; a "
                "chunk cannot be larger than its array, copy the checkpoint again"
            )
        return tensors.Tensor(
            shape, lambda: _result(array.read(), place.path), place.path, dtype
        )

    def _array_driver(self) -> str:
        name = next(filter(self.has, _ARRAY_DRIVERS), None)
        if name is None:
            raise ValueError(
                f"{self.path}: neither .zarray nor zarr.json here; a part of the "
                "checkpoint is missing, copy it again"
            )
        local = self.local_file(name)
        size = 0 if local is None else local.stat().st_size
        if size > _MAX_METADATA_BYTES:
            limit = f"the metadata of an array takes at most {_MAX_METADATA_BYTES:,}"
            raise source_files.damaged(local, f"{size:,} bytes, and {limit}")
        return _ARRAY_DRIVERS[name]

    @functools.cached_property
    def _store(self) -> ts.KvStore:
        return ts.KvStore.open(self.spec, context=ts.Context(_CONTEXT)).result()

    def _explain(self, error: Exception) -> ValueError:
        local, remote = "the path and its permissions", "the address and the network"
        return ValueError(
            f"{self.path}: cannot be read ({wording.first_line(error)}); check "
            f"{remote if is_remote(self.path) else local}"
        )


def ocdbt(folder: Folder) -> Folder:
    """Returns the folder inside the OCDBT database that newer Orbax writes."""
    local = folder.local_file("")
    return Folder(
        folder.path,
        {"driver": "ocdbt", "base": folder.spec, "path": ""},
        None if local is None else _total_bytes(local),
    )


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
    # TensorStore rejects `..` in a path.
    return {"driver": "file", "path": f"{pathlib.Path(path).resolve()}/"}


def _total_bytes(path: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _result(future: Any, path: str) -> Any:
    try:
        return future.result()
    except Exception as error:
        raise ValueError(
            f"{path}: this array cannot be read ({wording.first_line(error)}); a "
            "chunk is missing or damaged, copy the checkpoint again"
        ) from error
