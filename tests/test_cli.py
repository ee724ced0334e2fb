"""The command line: its help teaches, its errors name the thing and the remedy."""

import subprocess
import sys
import time

import ml_collections
import pytest

from gecko_jax import cli, flags, verbs

VERBS = (
    ("train",),
    ("data", "show"),
    ("data", "vocabulary"),
    ("data", "prepare"),
    ("evaluate",),
    ("embed",),
    ("index",),
    ("search",),
    ("export",),
)


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
        "    return config\n"
    )
    return str(path)


def _run(capsys, *arguments):
    status = cli.main(list(arguments))
    output = capsys.readouterr()
    return status, output.out, output.err


# --- Help ---------------------------------------------------------------------------


def test_help_is_quick_and_needs_no_jax():
    code = (
        "import sys\n"
        "from gecko_jax import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('jax', 'tensorflow', 'numpy.f2py') if m in sys.modules])"
    )
    # The best of three: another program may have the processor.
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
    assert run.stdout.splitlines()[-1] == "[]"
    assert min(seconds) < 1.0


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_of_every_verb_has_an_example(capsys, verb):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*verb, "--help"])
    text = capsys.readouterr().out
    assert "example" in text
    assert f"\n  gecko {' '.join(verb)} " in text
    assert max(map(len, text.splitlines())) <= 88


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_its_function(verb):
    assert callable(getattr(verbs, "_".join(verb)))


def test_no_argument_shows_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([])
    assert "gecko train" in capsys.readouterr().out


# --- Errors of the command line -----------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean train?"),
        (["data", "vocab"], "did you mean vocabulary?"),
        (["data"], "required: VERB"),
        (["train", "--workdir=w"], "required: --config"),
        (["train", "--confg=c.py", "--workdir=w"], "--confg; did you mean --config?"),
        (["embed", "a", "--model=m", "--output=o", "--dmi=3"], "did you mean --dim?"),
        (["embed", "a", "--model=m", "--output=o", "--dim=x"], "'x' must be a whole"),
        (["embed", "a", "b", "--model=m", "--output=o"], "'b' is one too many"),
        (["index", "v", "--output=o", "--config.seed=3"], "takes no config"),
        (["evaluate", "f", "--model=m", "--dims=64,-2"], "'-2' must be a whole number"),
    ],
)
def test_a_command_line_that_is_wrong_is_told(capsys, arguments, message):
    status, out, err = _run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert message in err
    assert "--help" in err.splitlines()[-1]
    assert len(err.splitlines()) == 2


# --- Errors of a run ----------------------------------------------------------------


def _export(monkeypatch, error):
    def fail(options):
        raise error

    monkeypatch.setattr(verbs, "export", fail)
    return ["export", "run", "--output=there"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("dim=3: choose one of 64, 128"), "dim=3: choose one of 64, 128"),
        (
            FileNotFoundError(2, "No such file or directory", "a/b"),
            "a/b: no such file or directory",
        ),
        (OSError(28, "no disk space left for x"), "no disk space left for x"),
        (ImportError("pip install gecko-jax[eval]"), "pip install gecko-jax[eval]"),
        (ArithmeticError("wrong numbers"), "wrong numbers"),
    ],
)
def test_an_expected_error_is_one_line(capsys, monkeypatch, error, message):
    status, _, err = _run(capsys, *_export(monkeypatch, error))
    assert (status, err) == (1, f"gecko export: error: {message}\n")


def test_debug_shows_the_traceback(monkeypatch):
    arguments = _export(monkeypatch, ValueError("why"))
    with pytest.raises(ValueError, match="why"):
        cli.main([*arguments, "--debug"])
    monkeypatch.setenv("GECKO_DEBUG", "1")
    with pytest.raises(ValueError, match="why"):
        cli.main(arguments)


def test_an_error_of_our_own_is_not_hidden(monkeypatch):
    with pytest.raises(TypeError, match="a fault"):
        cli.main(_export(monkeypatch, TypeError("a fault")))


def test_an_interrupted_run_says_that_it_goes_on(capsys, monkeypatch):
    status, _, err = _run(capsys, *_export(monkeypatch, KeyboardInterrupt()))
    assert status == 130
    assert "the same command goes on" in err


# --- Config flags -------------------------------------------------------------------


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
def test_a_wrong_key_or_value_is_told(capsys, config_file, override, message):
    status, _, err = _run(
        capsys, "train", f"--config={config_file}", "--workdir=w", override
    )
    assert status == 1
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_config_that_is_not_there_is_told():
    with pytest.raises(ValueError, match=r"no file nowhere\.py"):
        flags.load("nowhere.py:local")


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
def test_overrides_are_set_apart(arguments, overrides, others):
    assert flags.split(arguments) == (overrides, others)
