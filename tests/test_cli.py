"""The command line: its help teaches, its errors name the thing and the remedy."""

import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import ml_collections
import pytest

from gecko_jax import cli, flags
from gecko_jax.commands import convert
from gecko_jax.convert import to_hub

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


def test_help_needs_no_jax():
    code = (
        "import sys\n"
        "from gecko_jax import cli\n"
        "try: cli.main(['--help'])\n"
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
        cli.main([*verb, "--help"])
    text = capsys.readouterr().out
    assert "example" in text
    assert f"\n  gecko {' '.join(verb)} " in text
    assert max(map(len, text.splitlines())) <= 88


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
        (["export", "run", "--output="], "--output: the path is empty"),
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

    monkeypatch.setattr(convert, "export", fail)
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


def _run_process(body):
    """Runs `gecko index` with another body, in a process of its own."""
    code = (
        "import atexit, gc, os, sys, time\n"
        "from gecko_jax import cli\n"
        "from gecko_jax.commands import embed\n"
        f"def index(options):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        "embed.index = index\n"
        "sys.argv = ['gecko', 'index', 'vectors', '--output=there']\n"
        "cli.run()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_ctrl_c_in_a_callback_still_interrupts():
    # As in JAX's own, which runs at each garbage collection.
    found = _run_process(
        """
        def lose(phase, info):
            gc.callbacks.remove(lose)
            raise KeyboardInterrupt
        gc.callbacks.append(lose)
        gc.collect()
        time.sleep(5)
        """
    )
    assert found.returncode == 130
    assert "Traceback" not in found.stderr
    assert found.stderr.strip() == (
        "gecko index: interrupted; the same command goes on from what is saved"
    )


def test_an_interrupted_process_does_not_wait_for_threads_to_crash():
    found = _run_process("atexit.register(os.abort); raise KeyboardInterrupt")
    assert found.returncode == 130


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


# --- Whole verbs --------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tiny_files, tmp_path_factory):
    from gecko_jax import model_folder

    folder = tmp_path_factory.mktemp("model") / "tiny"
    model_folder.save_model(folder, tiny_files)
    return str(folder)


@pytest.fixture(scope="module")
def index_folder(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    corpus = folder / "corpus.jsonl"
    corpus.write_text(
        '{"_id": "a", "title": "Geckos", "text": "Small lizards that climb walls."}\n'
        '{"_id": "b", "title": "", "text": "Arrays of any built-in type."}\n'
        '{"_id": "c", "title": "", "text": "The shortest path in a graph."}\n'
    )
    vectors, index = str(folder / "vectors"), str(folder / "index")
    arguments = ["embed", str(corpus), f"--model={model_folder}", "--dim=8"]
    assert cli.main([*arguments, f"--output={vectors}"]) == 0
    assert cli.main(["index", vectors, f"--output={index}"]) == 0
    return index


def test_search_answers_every_query_in_order(capsys, model_folder, index_folder):
    status, out, _ = _run(
        capsys,
        *("search", f"--model={model_folder}", f"--index={index_folder}"),
        *("--count=2", "--json", "Small lizards that climb walls.", "a graph"),
    )
    assert status == 0
    first, second = map(json.loads, out.splitlines())
    assert first["query"] == "Small lizards that climb walls."
    assert second["query"] == "a graph"
    for answer in (first, second):
        scores = [hit["score"] for hit in answer["hits"]]
        assert len(scores) == 2
        assert scores == sorted(scores, reverse=True)


def test_search_shows_titles_and_texts(capsys, model_folder, index_folder):
    status, out, _ = _run(
        capsys,
        *("search", f"--model={model_folder}", f"--index={index_folder}", "lizard"),
    )
    assert status == 0
    assert "Geckos: Small lizards that climb walls." in out
    assert out.splitlines()[1] == "lizard"


def test_search_reads_queries_from_standard_input(
    capsys, monkeypatch, model_folder, index_folder
):
    lines = io.BytesIO(b"lizard\n\n   \n\xff\na graph\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines, "utf-8"))
    status, out, err = _run(
        capsys, "search", f"--model={model_folder}", f"--index={index_folder}", "--json"
    )
    assert status == 0
    assert [json.loads(line)["query"] for line in out.splitlines()] == [
        "lizard",
        "a graph",
    ]
    assert err.strip().endswith("which is no character; write it as UTF-8")
    assert "error" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["   "], "is empty: a query or passage needs"),
        (["x", "--index=nowhere"], "nowhere: no index.json here"),
        (["x", "--model=nowhere"], "nowhere: no such folder, and not the name"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(
    capsys, model_folder, index_folder, arguments, message
):
    start = ["search", f"--model={model_folder}", f"--index={index_folder}"]
    status, out, err = _run(capsys, *start, *arguments)
    assert (status, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_an_export_loads_and_is_the_same_model(capsys, model_folder, tmp_path):
    import gecko_jax

    output = str(tmp_path / "export")
    status, out, _ = _run(capsys, "export", model_folder, f"--output={output}")
    assert status == 0
    assert f"gecko_jax.load({output!r})" in out
    expected = gecko_jax.load(model_folder).encode_queries(["lizard"])
    assert (gecko_jax.load(output).encode_queries(["lizard"]) == expected).all()


def test_an_export_in_half_precision_loads(capsys, model_folder, tmp_path):
    output = tmp_path / "half"
    arguments = ("export", model_folder, f"--output={output}", "--dtype=float16")
    assert _run(capsys, *arguments)[0] == 0
    assert (output / "model.safetensors").stat().st_size < 0.6 * (
        pathlib.Path(model_folder) / "model.safetensors"
    ).stat().st_size
    status, _, err = _run(capsys, *arguments, "--to=t5x")
    assert status == 1
    assert "--dtype=float16: the format t5x is written in float32" in err


def test_an_export_is_written_in_every_format(capsys, model_folder, tmp_path):
    for to, file in (
        ("sentence-transformers", "modules.json"),
        ("t5x", "gecko/gecko.json"),
        ("onnx", "model.onnx"),
    ):
        output = tmp_path / to
        status, out, _ = _run(
            capsys, "export", model_folder, f"--output={output}", f"--to={to}"
        )
        assert status == 0
        assert "Load it with" in out
        assert (output / file).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dim=8"], "gecko holds the whole embedding"),
        (["--to=onnx", "--dim=9"], "dim=9 is not one.*4, 8, 16"),
        (["--to=t5x", "--results=r.json"], "t5x has no model card"),
        (["--to=sentence-transformers", "--results=r.json"], "r.json: no such file"),
        (["--push=gecko"], "OWNER/NAME"),
    ],
)
def test_an_export_that_cannot_be_writes_nothing(
    capsys, model_folder, tmp_path, arguments, message
):
    output = tmp_path / "out"
    status, _, err = _run(
        capsys, "export", model_folder, f"--output={output}", *arguments
    )
    assert status == 1
    assert re.search(message, err)
    assert len(err.splitlines()) == 1
    assert not output.exists()


def test_an_export_is_pushed_when_it_is_whole(
    capsys, model_folder, tmp_path, monkeypatch
):
    pushed = []

    def push(folder, repo_id):
        pushed.append((sorted(path.name for path in folder.iterdir()), repo_id))
        return "https://hub/a/b"

    monkeypatch.setattr(to_hub, "check", lambda repo_id: None)
    monkeypatch.setattr(to_hub, "push", push)
    status, out, _ = _run(
        capsys, "export", model_folder, f"--output={tmp_path / 'm'}", "--push=a/b"
    )
    assert status == 0
    assert out.splitlines()[-1] == "https://hub/a/b"
    ((names, repo_id),) = pushed
    assert "gecko.json" in names
    assert repo_id == "a/b"


def test_an_average_says_what_went_in(capsys, model_folder, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(model_folder, tmp_path / name)
    models = [str(tmp_path / name) for name in ("a", "b")]
    output = f"--output={tmp_path / 'soup'}"
    status, out, _ = _run(capsys, "average", *models, output, "--weights=3,1")
    assert status == 0
    assert f"0.750  {models[0]}" in out
    assert "cosine 1.0000 with the one before" in out
    assert (tmp_path / "soup" / "model.safetensors").is_file()
    status, _, err = _run(capsys, "average", *models, output, "--weights=much")
    assert (status, "numbers with commas" in err) == (2, True)
    status, _, err = _run(capsys, "average", *models, output, "--steps=2")
    assert (status, "leave it out" in err) == (1, True)


def test_a_teacher_is_made_by_a_model_or_from_vectors(capsys, model_folder, tmp_path):
    pairs, texts, folder = (str(tmp_path / n) for n in ("p.jsonl", "t.jsonl", "taught"))
    lines = [
        {"task": "docs", "query": f"list {i}", "positive": f"a list of {i}"}
        for i in range(4)
    ]
    pathlib.Path(pairs).write_text("\n".join(map(json.dumps, lines)))
    teach = ("data", "teach", pairs)
    status, out, _ = _run(
        capsys, *teach, f"--model={model_folder}", f"--output={folder}", "--dim=4"
    )
    assert status == 0
    assert "8 vectors of 4 dims" in out
    assert "--config.data.teacher_dim=4" in out
    status, out, _ = _run(capsys, *teach, f"--texts={texts}")
    assert (status, "8 texts" in out) == (0, True)
    listed = [json.loads(line) for line in pathlib.Path(texts).read_text().splitlines()]
    vectors = [
        json.dumps({"_id": line["_id"], "vector": [1.0, float(row), 0.5]})
        for row, line in enumerate(listed)
    ]
    pathlib.Path(texts).write_text("\n".join(vectors))
    status, out, err = _run(capsys, *teach, f"--vectors={texts}", f"--output={folder}")
    assert (status, "8 vectors of 3 dims" in out, err) == (0, True, "")
    for wrong, message in (
        ((), "needs one of --model, --vectors, --texts"),
        ((f"--texts={texts}", f"--vectors={texts}"), "needs one of"),
        ((f"--vectors={texts}",), "need --output"),
        ((f"--texts={texts}", f"--output={folder}"), "is an output itself"),
    ):
        status, _, err = _run(capsys, *teach, *wrong)
        assert (status, message in err) == (2, True)


def test_fewer_bits_go_from_embed_to_search(capsys, model_folder, tmp_path):
    (tmp_path / "t.txt").write_text("one passage\nanother thing\nthree\n")
    status, out, _ = _run(
        capsys,
        "embed",
        str(tmp_path / "t.txt"),
        f"--model={model_folder}",
        f"--output={tmp_path / 'v'}",
        "--precision=int8",
    )
    assert status == 0
    assert "int8, 16 bytes each" in out
    arguments = [str(tmp_path / "v"), f"--output={tmp_path / 'i'}"]
    status, out, _ = _run(capsys, "index", *arguments)
    assert "int8, 16 bytes each" in out
    status, out, _ = _run(
        capsys,
        "search",
        f"--model={model_folder}",
        f"--index={tmp_path / 'i'}",
        "--json",
        "one passage",
    )
    assert status == 0
    assert len(json.loads(out)["hits"]) == 3


def test_hard_negatives_and_a_vocabulary_are_made_from_pairs(capsys, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps(
                {
                    "task": "t",
                    "query": f"what is number {word}",
                    "positive": f"the number {word} comes after another number",
                }
            )
            + "\n"
            for word in ("one", "two", "three", "four")
        )
    )
    triples = tmp_path / "triples.jsonl"
    status, out, _ = _run(
        capsys, "data", "prepare", str(pairs), f"--output={triples}", "--negatives=2"
    )
    assert status == 0
    assert f"--config.data.files={triples}" in out
    for line in triples.read_text().splitlines():
        record = json.loads(line)
        assert len(record["negatives"]) == 2
        assert record["positive"] not in record["negatives"]

    output = tmp_path / "pairs.model"
    status, out, _ = _run(
        capsys,
        *("data", "vocabulary", str(pairs), f"--output={output}", "--size=280"),
    )
    assert status == 0
    assert output.exists()
    assert "280 pieces" in out


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
def test_a_fault_of_the_config_file_is_one_error(tmp_path, code, message):
    path = tmp_path / "own.py"
    path.write_text(code + "\n")
    with pytest.raises(ValueError, match=rf"--config=.*own\.py:x: .*{message}"):
        flags.load(f"{path}:x")


def test_import_makes_a_model_of_a_t5x_checkpoint(capsys, tmp_path):
    data = pathlib.Path(__file__).parent / "data"
    source = str(data / "t5x_tiny" / "legacy_f32")
    arguments = ["import", source, f"--output={tmp_path / 'out'}"]
    assert cli.main(arguments) == 1
    assert "holds no vocabulary" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    arguments.append(f"--vocabulary={data / 'model_v1' / 'vocabulary.model'}")
    assert cli.main([*arguments, "--extra-ids=2", "--query-length=9"]) == 0
    assert "2 layers, 8 dims, revision " in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "gecko.json").read_text())
    assert (settings["extra_ids"], settings["query_length"]) == (2, 9)
    assert settings["provenance"]["imported"]["format"] == "T5X"
    assert cli.main([*arguments, "--passage-length=1"]) == 2
    assert "must be a whole number, at least 2" in capsys.readouterr().err
