"""Meshes and shardings, on eight CPU devices."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gecko_jax.models import dual_encoder
from gecko_jax.parallel import sharding
from gecko_jax.training import optimizer


def test_the_axis_of_size_minus_one_takes_the_remaining_devices():
    mesh = sharding.build_mesh(data=-1, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.num_batch_shards(mesh) == 4


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 1), (-1, 3, 1), (16, 1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    data, fsdp, tensor = sizes
    with pytest.raises(ValueError, match=r"number of devices, 8; set one of them"):
        sharding.build_mesh(data=data, fsdp=fsdp, tensor=tensor)


class _Device:
    platform = "gpu"
    device_kind = "any"
    client = None

    def __init__(self, number):
        self.id = number
        self.slice_index = self.process_index = number // 4


def _two_slices():
    return [_Device(number) for number in range(8)]


def test_slices_are_along_data_or_fsdp_and_never_along_tensor():
    along_data = sharding.build_mesh(data=2, tensor=2, devices=_two_slices()).devices
    slices = np.vectorize(lambda device: device.slice_index)
    assert slices(along_data).tolist() == [[[0, 0]]] * 2 + [[[1, 1]]] * 2
    along_fsdp = sharding.build_mesh(
        data=1, fsdp=2, tensor=2, dcn_fsdp=2, dcn_data=1, devices=_two_slices()
    ).devices
    assert slices(along_fsdp).tolist() == [[[0, 0], [0, 0], [1, 1], [1, 1]]]
    with pytest.raises(ValueError, match=r"product must be .* each of 2 slices, 4"):
        sharding.build_mesh(data=8, devices=_two_slices())
    with pytest.raises(ValueError, match=r"dcn_data=1 .* number of slices, 2"):
        sharding.build_mesh(data=4, dcn_data=1, devices=_two_slices())


@pytest.mark.parametrize("size", dual_encoder.PRESETS)
def test_every_preset_fits_a_mesh_and_is_split_over_it(size):
    config = dual_encoder.EncoderConfig(**dual_encoder.PRESETS[size])
    shapes, axes = dual_encoder.abstract_params(config)
    mesh = sharding.build_mesh(data=1, fsdp=4, tensor=2)
    shardings = sharding.param_shardings(shapes, axes, mesh)
    held = sum(
        np.prod(place.shard_shape(leaf.shape), dtype=np.int64)
        for leaf, place in zip(
            jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True
        )
    )
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    # `tensor` does not split an odd number of rows (Qwen3-Embedding).
    table = shapes["token_embedder"]["embedding"]
    unsplit = table.size / 8 if table.shape[0] % 2 else 0
    # Vectors and position biases are replicated; they are below 2% of the parameters.
    assert held < (total / 8 + unsplit) * 1.02


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = sharding.build_mesh(data=1, fsdp=4, tensor=2)
    place = sharding.param_shardings(
        {"kernel": jax.ShapeDtypeStruct((6, 4), np.float32)},
        {"kernel": PartitionSpec("embed", "mlp")},
        mesh,
    )["kernel"]
    assert place.spec == PartitionSpec(None, "tensor")


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_moments_are_sharded_like_their_parameter(name):
    config = dual_encoder.EncoderConfig(**dual_encoder.PRESETS["mini"])
    shapes, axes = dual_encoder.abstract_params(config)
    mesh = sharding.build_mesh(data=1, fsdp=4, tensor=2)
    shardings = sharding.param_shardings(shapes, axes, mesh)
    tx = optimizer.build_optimizer(
        name,
        lambda _: 1e-3,
        token_rate=2.0,
        weight_decay=0.0,
        clip_norm=1.0,
        beta1=0.9,
        beta2=0.99,
    )
    state = jax.eval_shape(tx.init, shapes)
    places = sharding.state_shardings(state, shapes, shardings, mesh)
    kernel = ("encoder", "layers_0", "attention", "query", "kernel")
    suffix = sharding._path(tuple(jax.tree_util.DictKey(key) for key in kernel))
    specs = [
        place.spec
        for (path, leaf), place in zip(
            jax.tree.leaves_with_path(state), jax.tree.leaves(places), strict=True
        )
        if sharding._path(path)[-len(suffix) :] == suffix and leaf.ndim == 2
    ]
    assert specs
    assert set(specs) == {PartitionSpec("fsdp", "tensor")}


def test_rows_and_examples_are_split_and_text_indices_are_replicated():
    mesh = sharding.build_mesh(data=4, fsdp=2)
    batch = {
        "query_tokens": np.arange(32, dtype=np.int32).reshape(16, 2),
        "query_id": np.zeros((16, 2), np.uint32),
        "query_index": np.zeros((16, 2), np.int32),
    }
    placed = sharding.place_batch(batch, mesh)
    for name in ("query_tokens", "query_id"):
        assert placed[name].sharding.shard_shape((16, 2)) == (2, 2)
    assert placed["query_index"].sharding.is_fully_replicated
    for name, value in batch.items():
        np.testing.assert_array_equal(placed[name], value)


def test_a_batch_must_divide_over_the_devices_that_split_it():
    mesh = sharding.build_mesh(data=2, fsdp=2, tensor=2)
    sharding.check_batch(8, 4, mesh)
    with pytest.raises(ValueError, match=r"batch_size=30: .* the 4 .*; set it to 32"):
        sharding.check_batch(30, 0, mesh)
    with pytest.raises(ValueError, match=r"microbatch_size=6: .*; set it to 8"):
        sharding.check_batch(32, 6, mesh)


def test_the_first_rule_with_free_mesh_axes_applies():
    mesh = sharding.build_mesh(data=1, fsdp=4, tensor=2)
    shapes = {"kernel": jax.ShapeDtypeStruct((8, 8), np.float32)}
    axes = {"kernel": PartitionSpec("embed", "mlp")}
    rules = (("embed", ("fsdp", "tensor")), ("mlp", "tensor"), ("mlp", None))
    place = sharding.param_shardings(shapes, axes, mesh, rules)["kernel"]
    assert place.spec == PartitionSpec(("fsdp", "tensor"), None)
    with pytest.raises(ValueError, match="no rule for the logical axis 'mlp'"):
        sharding.param_shardings(shapes, axes, mesh, rules[:1])
    with pytest.raises(ValueError, match="'model' is not a mesh axis; use data, fsdp"):
        sharding.param_shardings(shapes, axes, mesh, (("embed", "model"),))


def test_factored_moments_are_sharded_like_the_dimensions_they_keep():
    mesh = sharding.build_mesh(data=1, fsdp=4, tensor=2)
    tx = optimizer.build_optimizer(
        "adafactor",
        lambda _: 1e-3,
        token_rate=1.0,
        weight_decay=0.0,
        clip_norm=0.0,
        beta1=0.0,
        beta2=0.0,
    )

    @jax.jit
    def first_state(params):
        return tx.update(params, tx.init(params), params)[1]

    for shape in ((128, 128), (128, 256), (256, 128)):
        shapes = {"kernel": jax.ShapeDtypeStruct(shape, np.float32)}
        axes = {"kernel": PartitionSpec("embed", "mlp")}
        shardings = sharding.param_shardings(shapes, axes, mesh)
        rng = np.random.default_rng(0)
        params = {"kernel": rng.normal(size=shape).astype(np.float32)}
        state = first_state(params)
        places = sharding.state_shardings(state, shapes, shardings, mesh)
        mean_square = np.square(params["kernel"])
        specs = {}
        for leaf, place in zip(
            jax.tree.leaves(state), jax.tree.leaves(places), strict=True
        ):
            for axis in (0, 1):
                mean = mean_square.mean(1 - axis)
                if leaf.shape == mean.shape and np.allclose(leaf, mean, rtol=1e-3):
                    specs[axis] = place.spec
        assert specs == {0: PartitionSpec("fsdp"), 1: PartitionSpec("tensor")}, shape


def test_the_table_shows_the_memory_per_chip():
    config = dual_encoder.EncoderConfig(**dual_encoder.PRESETS["mini"])
    shapes, axes = dual_encoder.abstract_params(config)
    mesh = sharding.build_mesh(data=1, fsdp=4, tensor=2)
    shardings = sharding.param_shardings(shapes, axes, mesh)
    lines = sharding.describe(shapes, shardings)
    assert "token_embedder/embedding" in lines[0]
    assert "(tensor, fsdp)  1.0 of 7.9 MiB per chip" in lines[0]
    assert any("layers_*/mlp/wi_0/kernel" in line and "x2" in line for line in lines)
