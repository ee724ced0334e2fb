"""Memory of the loss alone and of its gradient, as the batch grows, for a TPU slice.

    python benchmarks/loss_memory.py --topology=v5e:4x4 --batches 32768 65536

Eq. 3 at MRL 256 and 768, compiled from a CPU by the TPU's compiler (the extra "tpu").
"""

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]


def temporaries(devices, batch_size: int) -> int:
    """Returns the bytes that a chip needs beside arguments and results."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from gecko_jax import losses, sharding

    mesh = sharding.build_mesh(devices=devices)
    spec = PartitionSpec(sharding.BATCH_AXES)

    def shape(*dims: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((batch_size, *dims), dtype, sharding=place)

    ids = losses.BatchIds(
        query_id=shape(2, dtype=jnp.uint32),
        passage_id=shape(2, dtype=jnp.uint32),
        negative_id=shape(1, 2, dtype=jnp.uint32),
        negative_mask=shape(1, dtype=bool),
        example_mask=shape(dtype=bool),
        negative_group=shape(dtype=jnp.int32),
    )

    def gradient(queries, positives, negatives, ids):
        def total(parts):
            return losses.mrl_loss(
                *parts,
                ids,
                mrl_dims=(256, 768),
                mrl_weights=(1.0, 1.0),
                temperature=0.01,
                same_tower=True,
                mask_duplicates=True,
                axis_names=sharding.BATCH_AXES,
            )[0].sum()

        return jax.grad(total)((queries, positives, negatives))

    of_device = jax.shard_map(
        gradient,
        mesh=mesh,
        in_specs=(spec, spec, spec, spec),
        out_specs=spec,
        axis_names=set(sharding.BATCH_AXES),
    )
    arguments = (shape(768), shape(768), shape(1, 768), ids)
    compiled = jax.jit(of_device).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--batches", type=int, nargs="+", default=[32_768, 65_536])
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from gecko_jax import compile as compile_lib

    before = None
    with compile_lib.topology_devices(options.topology) as devices:
        for batch_size in options.batches:
            found = temporaries(devices, batch_size)
            ratio = (
                "" if before is None else f", {found / before:.2f} times that before"
            )
            print(f"batch {batch_size:,}: {found / 2**30:.3f} GiB a chip{ratio}")
            before = found


if __name__ == "__main__":
    main()
