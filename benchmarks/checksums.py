"""Throughput of checksums in GiB/s: hash functions, files and arrays.

    python benchmarks/checksums.py --mib=1024

Runs in one thread. Files are in the page cache, as after a download.
"""

import argparse
import hashlib
import pathlib
import tempfile
import time
import zlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import xxhash

from gecko_jax.io import checksums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    options = parser.parse_args()
    array = np.random.default_rng(0).standard_normal(
        options.mib * 2**18, dtype=np.float32
    )
    content = memoryview(array).cast("B")
    placed = jnp.asarray(array)
    checksums.of_arrays({"array": placed})  # compiles
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "file"
        path.write_bytes(content)
        measured: dict[str, Callable[[], object]] = {
            "XXH3, 128 bits": lambda: xxhash.xxh3_128(content).digest(),
            "CRC-32": lambda: zlib.crc32(content),
            "SHA-256": lambda: hashlib.sha256(content).digest(),
            "BLAKE2b": lambda: hashlib.blake2b(content).digest(),
            "a file (checksums.of_file)": lambda: checksums.of_file(path),
            "a NumPy array": lambda: checksums.of_host_array(array),
            "a device array": lambda: checksums.of_arrays({"array": placed}),
        }
        for name, run in measured.items():
            began = time.perf_counter()
            run()
            seconds = time.perf_counter() - began
            print(f"{name:28} {options.mib / 1024 / seconds:6.2f} GiB/s")


if __name__ == "__main__":
    main()
