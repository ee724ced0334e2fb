"""Ahead-of-time compilation for TPU topologies: names, FLOPs, collectives."""

import dataclasses
import pathlib
import sys
import tempfile
import types

import jax
import jax.numpy as jnp
import pytest

from gecko_jax.cli import flags
from gecko_jax.compile import aot, hlo
from gecko_jax.parallel import sharding
from gecko_jax.training import train_step
from tests import tiny_encoders

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("v5e:4x4", "v5e:4x4"),
        ("v5litepod-8", "v5e:2x4"),
        ("v5litepod-256", "v5e:16x16"),
        ("v5p-128", "v5p:4x4x4"),
        ("v4-8", "v4:2x2x1"),
        ("v6e-4", "v6e:2x2"),
    ],
)
def test_cloud_names_map_to_topologies(name, topology):
    assert aot.parse_topology(name) == topology


@pytest.mark.parametrize("name", ["v5e:3x3", "v7:2x2", "v5litepod-3", "v5e", ""])
def test_an_unknown_topology_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"use v5e:\{2x2,.*v5litepod-16"):
        aot.parse_topology(name)


def test_flops_include_scans_and_recomputation():
    def layer(x, w):
        return jnp.tanh(x @ w), None

    def total(weights, x):
        return jax.lax.scan(jax.checkpoint(layer), x, weights)[0].sum()

    jaxpr = jax.make_jaxpr(jax.grad(total, (0, 1)))(
        jnp.ones((3, 8, 8)), jnp.ones((4, 8))
    )
    # In each of three layers: forward, recomputed, and two products backward.
    assert aot.count_flops(jaxpr) == 3 * 4 * (2 * 4 * 8 * 8)


def _step(microbatch_size, settings=None, **sizes):
    keys = {
        "data.batch_size": 32,
        "data.query_length": 8,
        "data.passage_length": 8,
        "data.packing": False,
        "model.vocab_size": 64,
        "model.model_dim": 16,
        "model.num_heads": 2,
        "model.head_dim": 8,
        "model.mlp_dim": 16,
        "model.embedding_dim": 8,
        "model.scan_layers": True,
        "model.remat": "full",
        "loss.mrl_dims": "(8,)",
        "loss.mrl_weights": "(1.0,)",
        "train.microbatch_size": microbatch_size,
        **{f"mesh.{name}": size for name, size in sizes.items()},
        **(settings or {}),
    }
    config = flags.load(
        f"{ROOT / 'configs/finetune.py'}:local",
        [f"--config.{key}={value}" for key, value in keys.items()],
    )
    mesh = sharding.build_mesh(**train_step.mesh_sizes(config))
    step = train_step.build(config, mesh, num_segments=1, num_tasks=1)
    batch = train_step.abstract_batch(config, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return step.run.trace(step.shapes, batch, key), config


def _in_microbatch_loop(traced):
    fast = {"xla_backend_optimization_level": 0}
    program = hlo.Program(traced.lower().compile(fast).as_text())
    collectives = program.collectives()
    assert collectives
    loops = [loop for one in collectives for loop in one.loops]
    return sum(map(aot._is_microbatch_loop, loops))


def test_no_microbatch_waits_for_another_device():
    traced, config = _step(8, data=2, fsdp=4)
    assert _in_microbatch_loop(traced) == 0
    # Layers run three times forward (for the embeddings, at the start of the backward
    # pass, and rematerialized in it) and once backward, at twice the cost. The loss is
    # extra.
    flops = aot.count_flops(traced.jaxpr)
    model = train_step.model_flops(config)
    assert 5 / 3 * model < flops < 2 * model


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma", "embeddinggemma2", "qwen3"])
def test_no_microbatch_of_another_family_waits_for_another_device(family):
    encoder = dataclasses.asdict(tiny_encoders.FAMILIES[family])
    names = encoder.keys() - {"scan_layers", "remat"}
    settings = {f"model.{name}": encoder[name] for name in names}
    traced, _ = _step(8, settings, data=2, fsdp=4)
    assert _in_microbatch_loop(traced) == 0


@pytest.mark.slow
def test_a_split_over_heads_has_collectives_in_the_loop():
    traced, _ = _step(8, data=2, fsdp=2, tensor=2)
    assert _in_microbatch_loop(traced) > 0


@pytest.fixture
def own_lock(monkeypatch, tmp_path):
    """The lock of libtpu in a folder of its own, where nothing else compiles."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.usefixtures("own_lock")
@pytest.mark.parametrize(("topology", "joined"), [("v4-32", True), ("v5p-8", False)])
def test_the_cores_of_a_v4_chip_are_one_device(monkeypatch, topology, joined):
    from jax.experimental import topologies

    monkeypatch.setitem(sys.modules, "libtpu", types.ModuleType("libtpu"))
    monkeypatch.setattr(
        topologies,
        "get_topology_desc",
        lambda **options: types.SimpleNamespace(devices=[options]),
    )
    with aot.topology_devices(topology) as (options,):
        assert (options.get("chip_config_name") == "megacore") == joined


@pytest.mark.usefixtures("own_lock")
def test_a_libtpu_held_by_another_process_is_reported(monkeypatch):
    from jax.experimental import topologies

    def refuse(**_):
        raise jax.errors.JaxRuntimeError("ABORTED: lockfile")

    monkeypatch.setitem(sys.modules, "libtpu", types.ModuleType("libtpu"))
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    error = pytest.raises(ValueError, match=r"v5e:2x2: .*any other process.*lockfile")
    with error, aot.topology_devices("v5e:2x2"):
        pass


@pytest.mark.slow
def test_a_step_compiles_for_a_topology():
    pytest.importorskip("libtpu", reason="needs gecko-jax[tpu]; .ci/run compiles one")
    _, config = _step(16, data=1, fsdp=4)
    report = aot.compile_step(config, "v5e:2x2")
    assert report.in_microbatch_loop == 0
    assert 0 < report.argument_bytes + report.temporary_bytes <= report.peak_bytes
    assert report.spare_share > 0.9
    assert report.collectives["all-gather"]["bytes"] > 0
    assert 0 < report.model_flops_utilisation < 1
    assert "nothing was run" in aot.describe(report)[-1]
