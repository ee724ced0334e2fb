"""Prices of training, from compiled steps that are written here by hand."""

import json
import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import recipe_cost

STEP = {
    "preset": "base",
    "topology": "v5e:4x4",
    "num_devices": 16,
    "batch_size": 512,
    "hbm_bytes": 16.0 * 2**30,
    "peak_bytes": 4 * 2**30,
    "spare_share": 0.75,
    "in_microbatch_loop": 0,
    "compute_seconds": 2.0,
    "memory_seconds": 1.0,
    "link_seconds": 0.1,
    "roofline_seconds": 2.0,
    "model_flops_utilisation": 0.5,
}


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    path = tmp_path / "compiled.jsonl"
    monkeypatch.setattr(recipe_cost, "COMPILED", path)

    def write(*steps):
        path.write_text("".join(json.dumps(step) + "\n" for step in steps))

    return write


def test_a_pass_over_the_triples_is_priced_by_the_roofline_and_half_of_it(compiled):
    compiled(STEP, {"preset": "xl", "topology": "v5e:4x4", "failed": "too large"})
    head, base, xl, large = recipe_cost.price_rows(["base", "xl", "large"], ["v5e:4x4"])
    values = dict(zip(head, base, strict=True))
    assert values["limit"] == "compute"
    # 512 examples in 2 s on 16 chips.
    assert values["examples per chip-second, 100%"] == "16"
    assert values["examples per chip-second, 50%"] == "8"
    assert values["hours, 100%"] == f"{10_000_000 / 256 / 3600:.1f}"
    assert values["chip-hours, 50%"] == f"{10_000_000 / 8 / 3600:.0f}"
    assert (xl[2], large[2]) == ("too large", "not compiled")
    assert len(xl) == len(large) == len(head)


def test_recipes_cost_their_flops_at_the_utilisation_of_the_size(compiled):
    compiled(STEP)
    head, *rows = recipe_cost.recipe_rows("v5e:4x4", 1.0)
    first = dict(zip(head[2:], rows[0][2:], strict=False))
    # The FLOPs of the model in all steps, at half of a chip's 197e12 a second.
    assert first["FLOPs, stage 1"] == "5.29e+20"
    hours = float(first["v5e hours at 100%, stage 1"].replace(",", ""))
    assert hours == pytest.approx(5.29e20 / 98.5e12 / 3600, rel=1e-3)
    assert rows[-1][4:] == ["not compiled", *[""] * 4]
