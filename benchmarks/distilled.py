"""Writes a table of `distil.py` as a model folder.

    python benchmarks/distilled.py DIR --vocabulary=FILE --output=DIR

DIR is the output of `distil.py`: table.safetensors, and run.json, which becomes the
model's provenance.

In the table, the length of a row is the weight of its token. The encoder's last norm
gives all token vectors the same length, which would lose the weights. Each row gets one
more entry, therefore, that fills it up to the common length. The projection drops this
entry, so the mean of the projected rows is the mean of the table's rows.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import distil_texts
import numpy as np
from jaxtyping import Float
from safetensors import numpy as safetensors

from gecko_jax.formats import model_folder, parameters
from gecko_jax.models import dual_encoder
from gecko_jax.text import text_formats


def main():
    """Parses the flags and writes the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("distilled", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--vocabulary", required=True, type=pathlib.Path)
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
    options = parser.parse_args()
    table = safetensors.load_file(options.distilled / "table.safetensors")["table"]
    run = json.loads((options.distilled / "run.json").read_text())
    files = to_model(
        table.astype(np.float32),
        options.vocabulary.read_bytes(),
        options.dims,
        step=run["train"]["steps"],
        provenance=run,
    )
    written = model_folder.save_model(options.output, files, dtype="float16")
    size = sum(path.stat().st_size for path in options.output.iterdir())
    print(f"{options.output}: {size / 1e6:.1f} MB, revision {written.revision}")


def to_model(
    table: Float[np.ndarray, "V D"],
    vocabulary: bytes,
    dims: Sequence[int],
    step: int,
    provenance: Mapping[str, Any],
) -> model_folder.ModelFiles:
    """Returns the model whose text vectors are means of the table's rows."""
    rows, dim = table.shape
    width = dim + 1
    # RMS norm does not change a row of this length.
    length = np.sqrt(width)
    # The longest row stays below the common length, so that the square root exists.
    table = table * (0.99 * length / np.linalg.norm(table, axis=1).max())
    rest = np.sqrt(width - np.sum(np.square(table), axis=1, keepdims=True))
    config = dual_encoder.EncoderConfig(
        vocab_size=rows, model_dim=width, num_layers=0, num_heads=1, head_dim=1,
        mlp_dim=1, embedding_dim=dim,
    )  # fmt: skip
    shapes, _ = dual_encoder.abstract_params(config)
    flat: dict[str, np.ndarray] = {
        name: np.zeros(leaf.shape, np.float32)
        for name, leaf in parameters.flatten(shapes).items()
    }
    flat["token_embedder/embedding"] = np.concatenate([table, rest], axis=1)
    flat["projection_layer/kernel"] = np.eye(width, dim, dtype=np.float32)
    flat["encoder/encoder_norm/scale"] = np.ones(width, np.float32)
    return model_folder.ModelFiles(
        params=parameters.unflatten(flat),
        encoder_config=config,
        text_format=text_formats.TextFormat(query="{text}", passage="{text}"),
        vocabulary_proto=vocabulary,
        extra_ids=0,
        mrl_dims=tuple(dims),
        query_length=distil_texts.LENGTH,
        passage_length=distil_texts.LENGTH,
        step=step,
        revision="",
        provenance=provenance,
    )


if __name__ == "__main__":
    main()
