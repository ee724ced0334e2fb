"""The commands of the documentation name configs and keys that exist."""

import pathlib
import re
import shlex

import pytest

import gecko_jax.config
from gecko_jax.cli import flags
from gecko_jax.formats import model_folder, pretrained
from gecko_jax.fret import settings

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), ROOT / "tpu_scripts/README.md"]


def find_commands():
    """Yields (page:line, words) of each command with a config of this repository."""
    for page in PAGES:
        text = page.read_text()
        for block in re.finditer(r"^```bash\n(.*?)^```$", text, re.M | re.S):
            first = text[: block.start()].count("\n") + 2
            commands = block[1].replace("\\\n", "\0").splitlines()
            for command in commands:
                place = f"{page.name}:{first}"
                first += command.count("\0") + 1
                if "--config=configs/" in command:
                    command = re.sub(r'^ARGUMENTS="(.*)"$', r"\1", command)
                    words = shlex.split(command.replace("\0", " "), comments=True)
                    yield pytest.param(words, id=place)


@pytest.mark.parametrize("words", list(find_commands()))
def test_a_command_has_a_valid_config(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides, rest = flags.split([word for word in words if word != "..."])
    (name,) = {word[9:] for word in rest if word.startswith("--config=configs/")}
    config = flags.load(name, overrides)
    if "..." in words:  # The reader completes the command.
        return
    if name.startswith("configs/fret.py"):
        settings.check(config)
    elif "evaluate.py" not in name:
        gecko_jax.config.check(config)
        start = config.init.checkpoint
        if pretrained.find(start) != start:  # A bundled model.
            files = model_folder.open_model(pathlib.Path(pretrained.find(start)))
            sizes = ("vocab_size", "model_dim", "num_layers", "embedding_dim")
            for size in sizes:
                assert config.model[size] == getattr(files.encoder_config, size), size


def test_commands_are_found():
    assert len(list(find_commands())) > 40
