"""Config overrides take the type of their key; errors name the key."""

import pathlib

import ml_collections
import pytest

from gecko_jax.cli import flags

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(
        "import ml_collections\n"
        "def get_config(arg=''):\n"
        "    config = ml_collections.ConfigDict()\n"
        "    config.seed = 7 if arg == 'local' else 0\n"
        "    config.data = ml_collections.ConfigDict()\n"
        "    config.data.batch_size = 16\n"
        "    config.data.packing = True\n"
        "    config.data.files = ()\n"
        "    config.loss = ml_collections.ConfigDict()\n"
        "    config.loss.temperature = 0.05\n"
        "    config.loss.mrl_dims = (64, 128)\n"
        "    config.train = ml_collections.ConfigDict()\n"
        "    return config\n"
    )
    return str(path)


def test_overrides_take_the_type_of_their_key(config_file):
    config = flags.load(
        f"{config_file}:local",
        [
            "--config.data.batch_size=512",
            "--noconfig.data.packing",
            "--config.data.files=a.jsonl",
            "--config.data.files=b.jsonl",
            "--config.loss.mrl_dims=(256,768)",
            "--config.loss.temperature=1",
        ],
    )
    assert config.seed == 7
    assert config.data.batch_size == 512
    assert config.data.packing is False
    assert config.data.files == ("a.jsonl", "b.jsonl")
    assert config.loss.mrl_dims == (256, 768)
    assert config.loss.temperature == 1.0


def test_a_config_without_an_argument_is_its_default(config_file):
    assert flags.load(config_file).seed == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.data.batchsize=3", "did you mean data.batch_size?"),
        ("--config.loss.batch_size=3", "did you mean data.batch_size?"),
        ("--config.loss.temprature=3", "did you mean loss.temperature?"),
        ("--config.data=3", "is a group; set one of its keys: data.batch_size"),
        ("--config.data.batch_size=many", "--config.data.batch_size=many"),
        ("--config.data.batch_size=1.5", "--config.data.batch_size=1.5"),
        ("--config.loss.mrl_dims=(1,", "mrl_dims"),
    ],
)
def test_an_invalid_key_or_value_is_one_line(gecko, config_file, override, message):
    status, _, err = gecko("train", f"--config={config_file}", "--workdir=w", override)
    assert status == 1
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_missing_config_is_an_error():
    with pytest.raises(ValueError, match=r"no file nowhere\.py"):
        flags.load("nowhere.py:local")


@pytest.mark.parametrize("kind", ["TRAIN", "EVALUATE", "FRET"])
def test_a_config_for_another_verb_is_an_error(kind):
    names = {"TRAIN": "prefinetune", "EVALUATE": "evaluate", "FRET": "fret"}
    expected = getattr(flags, kind)
    assert expected[1] == f"configs/{names[kind]}.py"
    for name, other in names.items():
        path = str(ROOT / f"configs/{other}.py")
        if name == kind:
            assert flags.load(path, kind=expected)
        else:
            with pytest.raises(ValueError, match=f"another verb.*use {expected[1]}"):
                flags.load(path, kind=expected)


def test_the_config_is_locked(config_file):
    config = flags.load(config_file)
    assert isinstance(config, ml_collections.ConfigDict)
    with pytest.raises(AttributeError, match="sed"):
        config.sed = 3


@pytest.mark.parametrize(
    ("arguments", "overrides", "others"),
    [
        (["--config.a.b", "3", "x"], ["--config.a.b=3"], ["x"]),
        (["--config.a.b=3", "x"], ["--config.a.b=3"], ["x"]),
        (["--config.a.b", "--y"], ["--config.a.b"], ["--y"]),
        (["--noconfig.a.b", "x"], ["--noconfig.a.b"], ["x"]),
        (["--config=c.py", "--config.a", "-1"], ["--config.a=-1"], ["--config=c.py"]),
    ],
)
def test_overrides_are_split_off(arguments, overrides, others):
    assert flags.split(arguments) == (overrides, others)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def get_config(:", "SyntaxError"),
        ("def get_config(arg=None): return {}", "must return an ml_collections"),
        ("def get_config(): return 1", "TypeError: get_config"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def get_config(arg): 1 / 0", "ZeroDivisionError"),
    ],
)
def test_an_error_in_the_config_file_is_one_error(tmp_path, code, message):
    path = tmp_path / "own.py"
    path.write_text(code + "\n")
    with pytest.raises(ValueError, match=rf"--config=.*own\.py:x: .*{message}"):
        flags.load(f"{path}:x")
