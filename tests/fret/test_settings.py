"""The keys of configs/fret.py."""

import fret_runs
import pytest

from gecko_jax.cli import flags
from gecko_jax.fret import runs, settings


def test_every_fault_of_the_config_is_told(tmp_path):
    config = fret_runs.load(
        "x", "localhost:8000", "llm.scoring=guess", "retrieve.num_candidates=1"
    )
    with pytest.raises(ValueError, match="the config has errors") as error:
        runs.run(config, tmp_path / "run")
    for key in ("llm.url", "llm.scoring", "retrieve.num_candidates"):
        assert f"{key}=" in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("llm.model=", "name the model"),
        ("llm.chat=True", "no query is scored"),
        ("llm.scoring=none", "no query is scored"),
        ("generate.max_words=1", "must not be below"),
    ],
)
def test_keys_must_fit_each_other(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        runs.run(fret_runs.load("x", "http://a", override), tmp_path / "run")


@pytest.mark.parametrize(
    "argument",
    [
        *("", ":local", ":local,recorded", ":local,llama_cpp", ":llama_cpp", ":hosted"),
        *(":relabel", ":local,relabel"),
        *(":local,qwen", ":local,qwen_small", ":local,relabel,qwen"),
    ],
)
def test_every_config_is_whole(argument):
    path = f"{fret_runs.ROOT / 'configs/fret.py'}{argument}"
    overrides = ["--config.llm.model=m", "--config.passages.files=a.jsonl"]
    settings.check(flags.load(path, overrides))


def test_the_bundled_recording_has_no_answers_to_relabel_with():
    path = f"{fret_runs.ROOT / 'configs/fret.py'}:local,relabel,recorded"
    with pytest.raises(ValueError, match="no answers for `gecko fret relabel`"):
        flags.load(path, [])
