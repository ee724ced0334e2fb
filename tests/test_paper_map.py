"""Every file and function that docs/paper_map.md names exists."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper_map.md").read_text("utf-8")
REFERENCES = sorted(set(re.findall(r"`([\w/]+\.(?:py|toml))(?::(\w+))?`", PAGE)))


@pytest.mark.parametrize(("file", "name"), REFERENCES)
def test_the_paper_map_points_at_code_that_exists(file, name):
    is_config = file.startswith(("configs/", "gecko_jax/"))
    path = ROOT / file if is_config else ROOT / "gecko_jax" / file
    text = path.read_text("utf-8")
    if name:
        assert name in {getattr(node, "name", None) for node in ast.parse(text).body}


def test_the_paper_map_has_references():
    assert ("losses/paper.py", "finetune_loss") in REFERENCES
