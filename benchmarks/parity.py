"""Compares loss, gradients and embeddings on this device with references from a CPU.

    python benchmarks/parity.py            compares, one JSON line per case
    python benchmarks/parity.py --write    writes the references, on a CPU

The gradient of the train step is computed for one batch of eq. 3 with MRL, one hard
negative per query and texts of many lengths: packed and unpacked, in float32 and
bfloat16, and on a GPU also with cuDNN's attention. Parameters and tokens are generated
from a seed. The file of references holds only results: the loss of each query, the
embedding of each text, and for each gradient its norm and its products with random
signs, which estimate the error of the whole gradient.

`*_error` is the norm of the difference divided by the norm of the reference. The
references are in float32. `bfloat16` rounds to 8 bits, so errors of a few 1e-3 are
expected. "highest" makes XLA compute full float32 products; by default a GPU rounds
them to TF32 and a TPU to bfloat16.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
REFERENCES = pathlib.Path(__file__).with_name("parity_references.npz")
BATCH, QUERY, PASSAGE, VOCABULARY = 32, 64, 128, 2_000
HEAD_DIM, MICROBATCH = 64, 16
SIGNS = 16  # number of products with random signs per gradient
CASES = (
    # (packed, dtype, attention, precision of products). The first is the reference.
    (False, "float32", "xla", "highest"),
    (False, "bfloat16", "xla", "default"),
    (False, "bfloat16", "cudnn", "default"),
    (True, "bfloat16", "cudnn", "default"),
    (True, "float32", "xla", "highest"),
    (False, "float32", "xla", "default"),
    (True, "bfloat16", "xla", "default"),
)


def draw_params(shapes: Any) -> Any:
    """Returns parameters at T5's scale, the same on every machine."""
    import jax

    rng = np.random.default_rng(0)

    def draw(path: Any, shape: Any) -> np.ndarray:
        values = rng.standard_normal(shape.shape, np.float32)
        if path[-1].key == "scale":
            return 1 + 0.1 * values
        if path[-1].key == "kernel":
            # T5's initializers. That of the query includes the 1/sqrt(K) of attention.
            is_query = path[-2].key == "query"
            return values * (shape.shape[0] * (HEAD_DIM if is_query else 1)) ** -0.5
        return values

    return jax.tree.map_with_path(draw, shapes)


def draw_examples() -> list[Any]:
    """Returns examples whose texts have between 4 tokens and the maximum length."""
    from gecko_jax.data import features

    rng = np.random.default_rng(1)

    def text(longest: int) -> np.ndarray:
        tokens = rng.integers(3, VOCABULARY, rng.integers(4, longest + 1), np.int32)
        tokens[-1] = 1
        return tokens

    def ids(*shape: int) -> np.ndarray:
        return rng.integers(0, 2**32, (*shape, 2), np.uint32)

    return [
        features.Example(
            text(QUERY), text(PASSAGE), (text(PASSAGE),), ids(), ids(), ids(1), 0
        )
        for _ in range(BATCH)
    ]


def measure(
    packed: bool, dtype: str, attention: str, precision: str
) -> dict[str, np.ndarray]:
    """Returns the loss of each query, the embeddings and the gradients' statistics."""
    import jax

    from gecko_jax.data import features
    from gecko_jax.models import dual_encoder
    from gecko_jax.parallel import sharding
    from gecko_jax.training import gradients

    config = dual_encoder.EncoderConfig(
        vocab_size=VOCABULARY,
        model_dim=256,
        num_layers=4,
        num_heads=4,
        head_dim=HEAD_DIM,
        mlp_dim=512,
        embedding_dim=256,
        dtype=dtype,
        scan_layers=True,
        attention=attention,
    )
    shape = features.Shape(
        QUERY, PASSAGE, 1, packing=packed, microbatch_rows=MICROBATCH
    )
    batch = features.convert(draw_examples(), shape)
    encoder = dual_encoder.DualEncoder(config)
    mesh = sharding.build_mesh(devices=jax.devices()[:1])
    shapes, axes = dual_encoder.abstract_params(config)
    shardings = sharding.param_shardings(shapes, axes, mesh, sharding.RULES)
    params = jax.device_put(draw_params(shapes), shardings)
    loss_and_gradients = gradients.build(
        encoder,
        mesh,
        shardings,
        num_segments=shape.num_segments,
        microbatch_size=MICROBATCH,
        loss_settings={
            "mrl_dims": (64, 256),
            "mrl_weights": (1.0, 1.0),
            "temperature": 0.05,
            "same_tower": True,
        },
    )

    def embed(params: Any, batch: Any) -> Any:
        sides = [
            dual_encoder.embed_texts(
                encoder, params, batch, side, num_segments=shape.num_segments
            )
            for side in gradients.SIDES
        ]
        return dual_encoder.normalize(jax.numpy.concatenate(sides))

    with jax.default_matmul_precision(precision):
        loss, _, grads = jax.jit(loss_and_gradients)(params, batch, jax.random.key(0))
        embeddings = jax.jit(embed)(params, batch)
    results = {"loss": np.asarray(loss), "embeddings": np.asarray(embeddings)}
    rng = np.random.default_rng(2)
    for path, leaf in sorted(_named(grads).items()):
        values = np.asarray(leaf, np.float64).ravel()
        signs = rng.choice(np.array([-1, 1], np.int8), (SIGNS, values.size))
        results[f"gradient/{path}"] = signs @ values
        results[f"norm/{path}"] = np.linalg.norm(values)
    return results


def _named(tree: Any) -> dict[str, Any]:
    import jax

    leaves = jax.tree.leaves_with_path(tree)
    return {"/".join(part.key for part in path): leaf for path, leaf in leaves}


def compare(results: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Returns relative errors of losses, embeddings and the worst gradient."""

    def relative(name: str) -> float:
        difference = np.linalg.norm(results[name] - reference[name])
        return float(difference / np.linalg.norm(reference[name]))

    gradients = {}
    for name in reference:
        if name.startswith("gradient/"):
            # The variance of each product is the squared norm of the difference.
            difference = np.sqrt(np.mean((results[name] - reference[name]) ** 2))
            path = name.partition("/")[2]
            gradients[path] = float(difference / reference[f"norm/{path}"])
    worst = max(gradients, key=gradients.__getitem__)
    cosines = np.sum(results["embeddings"] * reference["embeddings"], axis=1)
    return {
        "loss_error": relative("loss"),
        "embedding_error": relative("embeddings"),
        "least_cosine": float(cosines.min()),
        "gradient_error": float(np.median(list(gradients.values()))),
        "worst_gradient_error": gradients[worst],
        "worst_gradient": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the references")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import jax

    if options.write:
        if jax.default_backend() != "cpu":
            sys.exit("references are written on a CPU: set JAX_PLATFORMS=cpu")
        np.savez_compressed(REFERENCES, **measure(*CASES[0]))
        return
    with np.load(REFERENCES) as stored:
        reference = dict(stored)
    for case in CASES:
        packed, dtype, attention, precision = case
        if attention == "cudnn" and jax.default_backend() != "gpu":
            continue
        about = {
            "device": jax.devices()[0].device_kind,
            "packed": packed,
            "dtype": dtype,
            "attention": attention,
            "precision": precision,
        }
        try:
            errors = compare(measure(*case), reference)
        except Exception as error:  # Continue with the other cases.
            errors = {"failed": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(about | errors), flush=True)


if __name__ == "__main__":
    main()
