"""The command line: help with examples, and errors that say what to do."""

import logging
import os
import subprocess
import sys
import textwrap
import types

import pytest
import samples

from gecko_jax.cli import convert_command, entry

VERBS = (
    ("train",),
    ("compile",),
    ("data", "show"),
    ("data", "vocabulary"),
    ("data", "prepare"),
    ("data", "teach"),
    ("evaluate",),
    ("embed",),
    ("index",),
    ("search",),
    ("import",),
    ("export",),
    ("average",),
    ("fret", "plan"),
    ("fret", "calibrate"),
    ("fret", "run"),
    ("fret", "bootstrap"),
    ("fret", "report"),
    ("fret", "fetch-model"),
)


# --- Help ---------------------------------------------------------------------------


def test_help_needs_no_jax():
    code = (
        "import sys\n"
        "from gecko_jax.cli import entry\n"
        "try: entry.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('jax', 'tensorflow', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_of_every_verb_has_an_example(capsys, verb):
    with pytest.raises(SystemExit, match="0"):
        entry.main([*verb, "--help"])
    text = capsys.readouterr().out
    assert "example" in text
    assert f"\n  gecko {' '.join(verb)} " in text
    assert max(map(len, text.splitlines())) <= 88


def test_no_argument_shows_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        entry.main([])
    assert "gecko train" in capsys.readouterr().out


# --- Errors of the command line -----------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean train?"),
        (["data", "vocab"], "did you mean vocabulary?"),
        (["data"], "required: VERB"),
        (["export", "run", "--output="], "--output: the value is empty"),
        (["train", "--workdir=w"], "required: --config"),
        (["train", "--confg=c.py", "--workdir=w"], "--confg; did you mean --config?"),
        (["embed", "a", "--model=m", "--output=o", "--dmi=3"], "did you mean --dim?"),
        (["embed", "a", "--model=m", "--output=o", "--dim=x"], "'x' must be a whole"),
        (["embed", "a", "b", "--model=m", "--output=o"], "unexpected argument 'b'"),
        (["index", "v", "--output=o", "--config.seed=3"], "takes no config"),
        (["evaluate", "f", "--model=m", "--dims=64,-2"], "'-2' must be a whole number"),
    ],
)
def test_an_invalid_command_line_is_reported(gecko, arguments, message):
    status, out, err = gecko(*arguments)
    assert status == 2
    assert out == ""
    assert message in err
    assert "--help" in err.splitlines()[-1]
    assert len(err.splitlines()) == 2


# --- Errors of a run ----------------------------------------------------------------


_FILE_NOT_FOLDER = "a: is a file, not a folder; choose another path"


def _export(monkeypatch, error):
    def fail(options):
        raise error

    monkeypatch.setattr(convert_command, "export", fail)
    return ["export", "run", "--output=there"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("dim=3: choose one of 64, 128"), "dim=3: choose one of 64, 128"),
        (
            FileNotFoundError(2, "No such file or directory", "a/b"),
            "a/b: no such file or directory",
        ),
        *(
            (kind(error, "in the way", "a"), _FILE_NOT_FOLDER)
            for kind, error in ((FileExistsError, 17), (NotADirectoryError, 20))
        ),
        (OSError(28, "no disk space left for x"), "no disk space left for x"),
        (ImportError("pip install gecko-jax[eval]"), "pip install gecko-jax[eval]"),
        (ArithmeticError("wrong numbers"), "wrong numbers"),
    ],
)
def test_an_expected_error_is_one_line(gecko, monkeypatch, error, message):
    status, _, err = gecko(*_export(monkeypatch, error))
    assert (status, err) == (1, f"gecko export: error: {message}\n")


def test_debug_shows_the_traceback(monkeypatch):
    arguments = _export(monkeypatch, ValueError("why"))
    with pytest.raises(ValueError, match="why"):
        entry.main([*arguments, "--debug"])
    monkeypatch.setenv("GECKO_DEBUG", "1")
    with pytest.raises(ValueError, match="why"):
        entry.main(arguments)


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    with pytest.raises(TypeError, match="a fault"):
        entry.main(_export(monkeypatch, TypeError("a fault")))


def test_an_interrupted_run_explains_how_to_resume(gecko, monkeypatch):
    status, _, err = gecko(*_export(monkeypatch, KeyboardInterrupt()))
    assert status == 130
    assert "run the same command to resume" in err


def _run_process(body):
    """Runs `gecko index` with a replaced body in a new process."""
    code = (
        "import atexit, gc, os, sys, time\n"
        "from gecko_jax import __main__\n"
        "from gecko_jax.cli import embed_command\n"
        f"def index(options):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        "embed_command.index = index\n"
        "sys.argv = ['gecko', 'index', 'vectors', '--output=there']\n"
        "__main__.run()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_ctrl_c_in_a_callback_still_interrupts():
    # JAX registers such a callback; it runs at each garbage collection.
    process = _run_process(
        """
        def lose(phase, info):
            gc.callbacks.remove(lose)
            raise KeyboardInterrupt
        gc.callbacks.append(lose)
        gc.collect()
        time.sleep(60)
        """
    )
    assert process.returncode == 130
    assert "Traceback" not in process.stderr
    assert process.stderr.strip() == (
        "gecko index: interrupted; run the same command to resume"
    )


@pytest.mark.parametrize("module", ["argparse", "gecko_jax.cli", "jaxlib"])
def test_ctrl_c_during_an_import_ends_at_once(module):
    code = f"""
import os, signal, sys
from gecko_jax import __main__
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["gecko", "search", "--model=nowhere", "--index=nowhere", "query"]
__main__.run()
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert process.returncode == 130
    assert process.stderr.strip() == "gecko: interrupted"


def test_an_interrupted_process_does_not_wait_for_threads_to_crash():
    process = _run_process("atexit.register(os.abort); raise KeyboardInterrupt")
    assert process.returncode == 130


def test_an_error_output_that_is_closed_stays_silent(tmp_path, tiny_folder):
    path = samples.write(tmp_path / "corpus.jsonl", '{"_id": "p1", "text": "lizard"}\n')
    command = [sys.executable, "-m", "gecko_jax", "embed", str(path)]

    def run(*arguments):
        shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command, *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            shell, capture_output=True, text=True, env=environment, check=False
        )

    done = run(f"--model={tiny_folder}", f"--output={tmp_path / 'vectors'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 vector of 16 dims" in done.stdout
    done = run()  # The error, a missing option, cannot be printed.
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_standard_streams_are_ready_before_anything_is_opened():
    code = """
import os, sys
from gecko_jax import __main__
__main__._prepare_streams()
print(os.open(os.devnull, os.O_RDONLY), os.fsdecode(b"\\xff"))
print("an error", file=sys.stderr)
"""
    for closing in ("2>&-", "2>&- <&-"):
        shell = ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, "-c", code]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(shell, capture_output=True, env=environment, check=True)
        number, name = done.stdout.splitlines()[0].split()
        assert int(number) > 2
        assert name == b"\xff"
        assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            MemoryError("Unable to allocate 5.8 GiB"),
            "out of memory (Unable to allocate",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nmore"),
            "out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes);",
        ),
    ],
)
def test_out_of_memory_is_one_line(gecko, monkeypatch, error, message):
    def fail(_):
        raise error

    monkeypatch.setattr(entry, "_set_up_logging", fail)
    status, out, err = gecko("data", "show", "--config=x")
    assert (status, out) == (1, "")
    assert err.startswith(f"gecko data show: error: {message}")
    assert err.count("\n") == 1


def test_writers_of_a_failed_save_are_silent(capsys):
    """Waiting for the save raises the error."""
    closed = RuntimeError("Event loop is closed")
    lost = types.SimpleNamespace(exc_type=RuntimeError, exc_value=closed)
    entry._handle_unraisable(lost)
    assert capsys.readouterr().err == ""
    handler = entry._LogHandler()

    def is_shown(path, level):
        return handler.filter(logging.LogRecord("x", level, path, 1, "", (), None))

    assert not is_shown("/site-packages/orbax/checkpoint/futures.py", logging.ERROR)
    assert is_shown("/site-packages/orbax/checkpoint/futures.py", logging.WARNING)
    assert is_shown("/site-packages/jax/x.py", logging.ERROR)
    assert not is_shown("/site-packages/jax/x.py", logging.INFO)


def test_the_folder_of_prepared_data_has_one_default():
    from gecko_jax.cli import parsing
    from gecko_jax.data import mixtures

    parser = parsing.Parser()
    parsing.add_prepared_dir(parser)
    assert parser.parse_args([]).prepared_dir == mixtures.PREPARED
