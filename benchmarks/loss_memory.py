"""Memory of the loss and its gradient on a TPU slice, by batch size.

    python benchmarks/loss_memory.py --topology=v5e:4x4 --batches 32768 65536

Compiles eq. 3 at MRL 256 and 768 with the TPU compiler on a CPU host (the extra "tpu").

The compiler's temporaries are buffers in the chip's main memory. By default the
compiler first fills the fast memory (128 MiB on a v5e), so temporaries are the total
minus a constant and grow faster than the batch. The step is therefore compiled a second
time with almost all of the fast memory reserved for kernels. These temporaries are the
memory that the loss needs.
"""

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]


# Part of the 128 MiB that is reserved for kernels, which store no arrays there.
_KERNEL_MEMORY = {"xla_tpu_scoped_vmem_limit_kib": "114688"}


def measure(devices, batch_size: int) -> dict[str, int]:
    """Returns the temporary bytes per chip: in all memory and in main memory."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from gecko_jax.losses import contrastive
    from gecko_jax.parallel import sharding

    mesh = sharding.build_mesh(devices=devices)
    spec = PartitionSpec(sharding.BATCH_AXES)

    def shape(*dims: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((batch_size, *dims), dtype, sharding=place)

    ids = contrastive.BatchIds(
        query_id=shape(2, dtype=jnp.uint32),
        passage_id=shape(2, dtype=jnp.uint32),
        negative_id=shape(1, 2, dtype=jnp.uint32),
        negative_mask=shape(1, dtype=bool),
        example_mask=shape(dtype=bool),
        negative_group=shape(dtype=jnp.int32),
    )

    def gradient(queries, positives, negatives, ids):
        def total(parts):
            return contrastive.mrl_loss(
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
    lowered = jax.jit(of_device).lower(*arguments)
    sizes = {}
    for name, keys in (("all", _KERNEL_MEMORY), ("in main memory", None)):
        memory = lowered.compile(compiler_options=keys).memory_analysis()
        assert memory is not None
        sizes[name] = memory.temp_size_in_bytes
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--batches", type=int, nargs="+", default=[32_768, 65_536])
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from gecko_jax.compile import aot

    before = {}
    with aot.topology_devices(options.topology) as devices:
        for batch_size in options.batches:
            sizes = measure(devices, batch_size)
            parts = [
                f"{name} {size / 2**20:,.1f} MiB"
                + (f" ({size / before[name]:.2f} times)" if before else "")
                for name, size in sizes.items()
            ]
            print(f"{batch_size:,} examples, temporaries of a chip: {', '.join(parts)}")
            sys.stdout.flush()
            before = sizes


if __name__ == "__main__":
    main()
