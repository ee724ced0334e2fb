"""Meshes and shardings, on eight CPU devices."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gecko_jax import model, optimizer, sharding


def test_the_free_axis_takes_the_devices_that_are_left():
    mesh = sharding.build_mesh(data=-1, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.num_batch_shards(mesh) == 4


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 1), (-1, 3, 1), (16, 1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    data, fsdp, tensor = sizes
    with pytest.raises(
        ValueError, match=r"number of devices, 8; set one of them to -1"
    ):
        sharding.build_mesh(data=data, fsdp=fsdp, tensor=tensor)


@pytest.mark.parametrize("size", model.PRESETS)
def test_every_preset_fits_a_mesh_and_is_split_over_it(size):
    config = model.EncoderConfig(**model.PRESETS[size])
    shapes, axes = model.abstract_params(config)
    mesh = sharding.build_mesh(data=1, fsdp=4, tensor=2)
    shardings = sharding.param_shardings(shapes, axes, mesh)
    held = sum(
        np.prod(place.shard_shape(leaf.shape), dtype=np.int64)
        for leaf, place in zip(
            jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True
        )
    )
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    # Vectors and position biases stay whole; they are next to nothing.
    assert held < total / 8 * 1.02


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = sharding.build_mesh(data=1, fsdp=4, tensor=2)
    place = sharding.param_shardings(
        {"kernel": jax.ShapeDtypeStruct((6, 4), np.float32)},
        {"kernel": PartitionSpec("embed", "mlp")},
        mesh,
    )["kernel"]
    assert place.spec == PartitionSpec(None, "tensor")


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_moments_lie_where_their_parameter_lies(name):
    config = model.EncoderConfig(**model.PRESETS["mini"])
    shapes, axes = model.abstract_params(config)
    mesh = sharding.build_mesh(data=1, fsdp=4, tensor=2)
    shardings = sharding.param_shardings(shapes, axes, mesh)
    tx = optimizer.build_optimizer(
        name, lambda _: 1e-3, weight_decay=0.0, clip_norm=1.0, beta1=0.9, beta2=0.99
    )
    state = jax.eval_shape(tx.init, shapes)
    places = sharding.state_shardings(state, shapes, shardings, mesh)
    kernel = ("encoder", "layers_0", "attention", "query", "kernel")
    wanted = sharding._path(tuple(jax.tree_util.DictKey(key) for key in kernel))
    found = [
        place.spec
        for (path, leaf), place in zip(
            jax.tree.leaves_with_path(state), jax.tree.leaves(places), strict=True
        )
        if sharding._path(path)[-len(wanted) :] == wanted and leaf.ndim == 2
    ]
    assert found
    assert set(found) == {PartitionSpec("fsdp", "tensor")}


def test_token_rows_are_split_and_ids_are_everywhere():
    mesh = sharding.build_mesh(data=4, fsdp=2)
    batch = {
        "query_tokens": np.arange(32, dtype=np.int32).reshape(16, 2),
        "query_id": np.zeros((16, 2), np.uint32),
    }
    placed = sharding.place_batch(batch, mesh)
    assert placed["query_tokens"].sharding.shard_shape((16, 2)) == (2, 2)
    assert placed["query_id"].sharding.is_fully_replicated
    for name, value in batch.items():
        np.testing.assert_array_equal(placed[name], value)
