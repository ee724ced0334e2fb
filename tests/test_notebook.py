import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

from gecko_jax.formats import checkpoints, model_folder, parameters

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "notebook.md"
CUSTOM_LOSS = ROOT / "docs" / "custom_loss.md"

# The page's config with smaller values.
CONFIG = """
import importlib.util

spec = importlib.util.spec_from_file_location("finetune", {real!r})
finetune = importlib.util.module_from_spec(spec)
spec.loader.exec_module(finetune)

def get_config(arg=None):
    config = finetune.get_config(arg)
    config.model.update({sizes!r})
    config.data.vocabulary = "quickstart"
    config.loss.mrl_dims = (4, 8, 16)
    config.data.batch_size = 8
    config.data.passage_length = 32
    config.data.cache_dir = "cache"
    config.checkpoint.every_steps = 100
    return config
"""


def blocks(page=PAGE):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)


def write_config(folder, encoder_config):
    sizes = dataclasses.asdict(encoder_config)
    real = str(ROOT / "configs" / "finetune.py")
    (folder / "configs").mkdir()
    (folder / "configs" / "finetune.py").write_text(
        CONFIG.format(real=real, sizes=sizes)
    )


def run(page):
    names: dict[str, Any] = {"__name__": "notebook"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)
    return names


def test_the_page_is_twenty_lines():
    lines = [line for block in blocks() for line in block.splitlines() if line.strip()]
    assert 18 <= len(lines) <= 24


@pytest.mark.slow
def test_the_page_runs(tiny_files, tmp_path, monkeypatch, capsys):
    model_folder.save_model(tmp_path / "demo" / "finetune", tiny_files)
    with (tmp_path / "demo" / "triples.jsonl").open("w") as file:
        for i in range(32):
            record = {
                "task": "docs",
                "query": f"what is number {i} of the list",
                "positive": f"number {i} of the list is {chr(97 + i % 26)}{i}",
                "negatives": [f"there is no such number as {i + 100}"],
            }
            file.write(json.dumps(record) + "\n")
    write_config(tmp_path, tiny_files.encoder_config)
    monkeypatch.chdir(tmp_path)
    names = run(PAGE)
    printed = capsys.readouterr().out

    for name in parameters.flatten(tiny_files.params):
        assert re.search(rf"^{re.escape(name)} +\(", printed, re.M)
    kernel = names["model"].files.params["encoder"]["layers_0"]["mlp"]["wo"]["kernel"]
    assert "fsdp" in kernel.sharding.spec
    assert names["mesh"].size == jax.device_count()
    # Both dims were searched: the last one is the smallest.
    assert names["built"].dim == names["model"].dims[0] == 4
    assert {name for row in names["ids"] for name in row} <= {"heron", "role"}
    assert checkpoints.latest_step(tmp_path / "demo" / "further") == 100
    # Training started from the model and changed it.
    before = tiny_files.params["projection_layer"]["kernel"]
    after = names["further"].files.params["projection_layer"]["kernel"]
    distance = np.abs(np.asarray(after) - np.asarray(before)).mean()
    assert 0 < distance < 0.2 * np.abs(before).mean()


@pytest.mark.slow  # `.ci/run` runs the slow tests of this file.
def test_the_page_of_a_custom_loss_runs(tiny_files, tmp_path, monkeypatch):
    write_config(tmp_path, tiny_files.encoder_config)
    monkeypatch.chdir(tmp_path)
    names = run(CUSTOM_LOSS)
    assert checkpoints.latest_step(tmp_path / "runs" / "margin") == 30
    # Three dims and seven other positives; a violation is at most the margin plus 2.
    metrics = names["metrics"]
    assert 0 < metrics["loss"] < 3 * 7 * 2.2
    assert metrics["loss"] == pytest.approx(
        sum(metrics[f"loss_{dim}"] for dim in (4, 8, 16)), rel=1e-4
    )
    provenance = names["model"].files.provenance
    assert provenance["loss"].startswith("notebook.margin_loss (")
