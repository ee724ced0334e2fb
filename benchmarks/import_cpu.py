"""Time and memory of importing and exporting a T5 1.1 base encoder (109.6M).

    python benchmarks/import_cpu.py [--scratch DIR]     needs 2 GB of disk

Imports random weights from a legacy T5X checkpoint (zarr, gzip) and from a Hugging Face
folder (safetensors), then exports the second import to every format. Memory is the peak
of the whole process minus its memory after `import gecko_jax`, JAX and Orbax included,
relative to the bytes of the parameters.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import gecko_jax

RUNS = (
    ("import", "t5x"),
    ("import", "hugging_face"),
    ("export", "gecko"),
    ("export", "sentence-transformers"),
    ("export", "t5x"),
    ("export", "onnx"),
)
MOST_SECONDS = 60
MOST_MEMORY = 1.5  # of the parameters' bytes
VOCABULARY = pathlib.Path(gecko_jax.__file__).parent / "quickstart" / "vocabulary.model"


def make(form: str, folder: pathlib.Path) -> int:
    """Writes a checkpoint of random weights and returns its parameters' bytes."""
    import numpy as np
    import safetensors.numpy

    from gecko_jax.formats import names, parameters
    from gecko_jax.models import dual_encoder

    config = dual_encoder.EncoderConfig(
        **dual_encoder.PRESETS["base"], projection=False
    )
    shapes = parameters.flatten(dual_encoder.abstract_params(config)[0])
    rng = np.random.default_rng(0)
    params = {
        name: rng.standard_normal(leaf.shape, np.float32)
        for name, leaf in shapes.items()
    }
    if form == "t5x":
        _write_t5x(params, folder / "checkpoint_1000")
    else:
        folder.mkdir()
        table = names.hugging_face_names(config)
        safetensors.numpy.save_file(
            {
                table[name].name: np.ascontiguousarray(
                    leaf.T if table[name].transposed else leaf
                )
                for name, leaf in params.items()
            },
            folder / "model.safetensors",
        )
        (folder / "config.json").write_text(json.dumps(_HF_CONFIG))
    return sum(leaf.nbytes for leaf in params.values())


_HF_CONFIG = {
    "model_type": "t5",
    "architectures": ["T5EncoderModel"],
    "vocab_size": 32_128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2_048,
    "num_layers": 12,
    "num_heads": 12,
    "feed_forward_proj": "gated-gelu",
}


def _write_t5x(params, folder: pathlib.Path) -> None:
    """Writes each parameter as t5x does: a zarr folder that `checkpoint` names."""
    import msgpack
    import numpy as np
    import tensorstore

    tree: dict = {}
    for name, leaf in params.items():
        place = f"target.{name.replace('/', '.')}/"
        metadata = {
            "shape": list(leaf.shape),
            "chunks": list(leaf.shape),
            "compressor": {"id": "gzip", "level": 1},
        }
        store = tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": str(folder / place)},
                "metadata": {**metadata, "dtype": "<f4"},
                "create": True,
            }
        ).result()
        store.write(np.asarray(leaf)).result()
        node = tree
        *parents, last = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = {
            "driver": "zarr",
            "dtype": "float32",
            "kvstore": {"driver": "file", "path": place},
            "metadata": metadata,
        }
    content = {"version": 3, "optimizer": {"state": {}, "target": tree}}
    (folder / "checkpoint").write_bytes(msgpack.packb(content))


def _peak_bytes() -> int:
    # In getrusage, the peak of a child starts at the peak of its parent.
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: this benchmark needs Linux")


def convert(verb: str, form: str, source: str, output: str) -> None:
    """Runs `gecko import` or `gecko export` in this process, prints time and memory."""
    before = _peak_bytes()
    from gecko_jax.cli import entry

    began = time.perf_counter()
    # The token table may have more rows than the bundled vocabulary has ids.
    settings = [f"--vocabulary={VOCABULARY}", "--extra-ids=24064"]
    if verb == "export":
        settings = [f"--to={form}"]
    status = entry.main([verb, source, f"--output={output}", *settings])
    seconds = time.perf_counter() - began
    rise = _peak_bytes() - before
    if status:
        sys.exit(status)
    print(json.dumps({"seconds": seconds, "rise": rise}))


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--scratch", help="folder for the checkpoints (default: a temporary folder)"
    )
    parser.add_argument(
        "--worker", nargs=4, metavar=("VERB", "FORM", "SOURCE", "OUTPUT")
    )
    options = parser.parse_args()
    if options.worker:
        convert(*options.worker)
        return
    print(f"gecko_jax {gecko_jax.__version__}, T5 1.1 base encoder, float32")
    head = f"{'MB':>8}{'seconds':>10}{'peak rise':>12}{'of its size':>13}"
    print(f"{'':<30}{head}")
    too_much = False
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        imported = pathlib.Path(scratch) / "imported"
        size = 0
        for verb, form in RUNS:
            source, output = imported, pathlib.Path(scratch) / "exported"
            if verb == "import":
                source, output = pathlib.Path(scratch) / form, imported
                size = make(form, source)
            done = subprocess.run(
                [sys.executable, __file__, "--worker", verb, form, source, output],
                check=True,
                capture_output=True,
                text=True,
            )
            result = json.loads(done.stdout.splitlines()[-1])
            share = result["rise"] / size
            print(
                f"{verb + ' ' + form:<30}{size / 1e6:>8.0f}{result['seconds']:>10.1f}"
                f"{result['rise'] / 1e6:>9.0f} MB{share:>13.2f}",
                flush=True,
            )
            too_much |= result["seconds"] > MOST_SECONDS or share > MOST_MEMORY
            shutil.rmtree(source if verb == "import" else output)
    if too_much:
        sys.exit(f"above {MOST_SECONDS} s or {MOST_MEMORY} of the size")


if __name__ == "__main__":
    main()
