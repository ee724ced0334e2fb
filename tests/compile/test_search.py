"""Search over settings of a train step, and its stored results."""

import contextlib
import json
import pathlib

import jax
import pytest

from gecko_jax.cli import entry, flags
from gecko_jax.compile import aot, search

ROOT = pathlib.Path(__file__).parents[2]


def _report(rows, tensor, gib, memory_seconds, compute_seconds):
    return aot.Report(
        topology="v5e:2x2",
        num_slices=1,
        num_devices=4,
        mesh={"data": 1, "fsdp": 4 // tensor, "tensor": tensor},
        settings={"rows": rows},
        batch_size=64,
        hbm_bytes=16.0 * 2**30,
        argument_bytes=0,
        temporary_bytes=0,
        peak_bytes=round(gib * 2**30),
        flops=2.0,
        model_flops=1.0,
        memory_bytes=0.0,
        collectives={},
        in_microbatch_loop=0,
        compute_seconds=compute_seconds,
        memory_seconds=memory_seconds,
        link_seconds=0.0,
        roofline_seconds=max(compute_seconds, memory_seconds),
        spare_share=1 - gib / 16,
        model_flops_utilisation=0.5,
        compile_seconds=0.0,
    )


@pytest.mark.parametrize("base_gib", [2, 20])
def test_a_search_skips_slower_settings_and_recommends_one_that_fits(
    monkeypatch, base_gib
):
    tried = []

    def compile_step(config, topology):
        tensor, remat = config.mesh.tensor, config.model.remat
        assert config.mesh.fsdp == 4 // tensor
        rows = config.train.microbatch_size // config.mesh.fsdp
        tried.append((tensor, remat, rows))
        gib = {"full": 1, "dots": 2, "none": 9}[remat] * rows / tensor
        gib += base_gib / tensor
        if gib > 16:
            raise MemoryError("too large")
        compute = {"full": 5.0, "dots": 4.5, "none": 4.0}[remat]
        return _report(rows, tensor, gib, 16.0 / rows, compute)

    monkeypatch.setattr(
        aot,
        "topology_devices",
        lambda topology: contextlib.nullcontext([None] * 4),
    )
    config = flags.load(f"{ROOT / 'configs/finetune.py'}:local", [])
    reports = list(search.search(config, "v5e:2x2", compile_step))
    best = search.recommend(reports)
    assert best is not None
    if base_gib == 2:
        # Compute bounds the step from four rows on; "none" fits with one row only.
        series = [(1, "full", rows) for rows in (1, 2, 4)]
        series += [(1, "dots", rows) for rows in (1, 2, 4)]
        assert tried == [*series, (1, "none", 1), (1, "none", 2)]
        assert (best.mesh["tensor"], best.roofline_seconds) == (1, 4.5)
    else:
        assert [one for one in tried if one[0] == 1] == [
            (1, remat, 1) for remat in ("full", "dots", "none")
        ]
        assert best.mesh["tensor"] == 2


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """A file of results, and the settings that were compiled for it."""
    compiled = []

    def compile_step(config, topology, num_slices):
        compiled.append((config.model.remat, topology, num_slices))
        if config.model.remat == "none":
            raise MemoryError("v5e:2x2: too large")
        return _report(1, 1, 2, 1.0, 2.0)

    monkeypatch.setattr(aot, "compile_step", compile_step)
    monkeypatch.setattr(search.importlib.metadata, "version", lambda _: "0.0.52")
    return tmp_path / "results.jsonl", compiled


def _config(**keys):
    overrides = [f"--config.{name}={value}" for name, value in keys.items()]
    return flags.load(f"{ROOT / 'configs/finetune.py'}:local", overrides)


def test_a_stored_result_is_not_compiled_again(stored):
    path, compiled = stored
    config = _config(**{"model.remat": "full"})
    first = search.Stored(path).compile_step(config, "v5e:2x2")
    # Another workdir and another name for the topology compile the same step.
    same = _config(**{"model.remat": "full", "init.checkpoint": "elsewhere"})
    assert search.Stored(path).compile_step(same, "v5litepod-4") == first
    # A config from before a key was added compiles the same step, too.
    with config.unlocked():
        del config.model.attention
    assert search.Stored(path).compile_step(config, "v5e:2x2") == first
    assert len(compiled) == 1


def test_the_command_goes_on_from_its_file_of_results(stored, monkeypatch, capsys):
    path, compiled = stored
    monkeypatch.setattr(
        aot, "topology_devices", lambda topology: contextlib.nullcontext([None] * 4)
    )
    config = f"--config={ROOT / 'configs/finetune.py'}:local"
    command = ["compile", config, "--topology=v5e:2x2", "--search", f"--results={path}"]
    outputs = []
    for _ in range(2):
        assert not entry.main(command)
        outputs.append(capsys.readouterr().out)
    # One size each of full and dots, compute bound; none does not fit.
    assert [remat for remat, *_ in compiled] == ["full", "dots", "none"]
    assert "The fastest setting that fits: " in outputs[0]
    assert outputs[0] == outputs[1]


def test_another_step_does_not_use_a_stored_result(stored, monkeypatch):
    path, compiled = stored
    config = _config(**{"model.remat": "full"})
    results = search.Stored(path)
    results.compile_step(config, "v5e:2x2")
    results.compile_step(config, "v5e:2x4")
    results.compile_step(config, "v5e:2x2", 2)
    results.compile_step(_config(**{"model.remat": "dots"}), "v5e:2x2")
    monkeypatch.setattr(jax, "__version__", "another")
    results.compile_step(config, "v5e:2x2")
    assert len(compiled) == len(path.read_text().splitlines()) == 5


def test_a_step_that_does_not_fit_is_stored(stored):
    path, compiled = stored
    for _ in range(2):
        with pytest.raises(MemoryError, match="too large"):
            search.Stored(path).compile_step(_config(), "v5e:2x2", 1)
    assert len(compiled) == 1


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"key": "a"}', '{"key": "", "report": 1}']
)
def test_a_damaged_file_of_results_is_refused(stored, line):
    path, _ = stored
    path.write_text(json.dumps({"key": "a", "too_large": "b"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl:2: .*remove the line"):
        search.Stored(path)
