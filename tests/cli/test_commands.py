"""Complete verbs, from the command line to their output files."""

import json
import pathlib
import re
import shutil

import pytest

from gecko_jax.cli import entry
from gecko_jax.formats import hub


def test_an_export_loads_and_is_the_same_model(gecko, tiny_folder, tmp_path):
    import gecko_jax

    output = str(tmp_path / "export")
    status, out, _ = gecko("export", tiny_folder, f"--output={output}")
    assert status == 0
    assert f"gecko_jax.load({output!r})" in out
    expected = gecko_jax.load(tiny_folder).encode_queries(["lizard"])
    assert (gecko_jax.load(output).encode_queries(["lizard"]) == expected).all()


def test_an_export_in_half_precision_is_smaller(gecko, tiny_folder, tmp_path):
    output = tmp_path / "half"
    arguments = ("export", tiny_folder, f"--output={output}", "--dtype=float16")
    assert gecko(*arguments)[0] == 0
    sizes = [
        (pathlib.Path(folder) / "model.safetensors").stat().st_size
        for folder in (output, tiny_folder)
    ]
    assert sizes[0] < 0.6 * sizes[1]
    status, _, err = gecko(*arguments, "--to=t5x")
    assert status == 1
    assert "--dtype=float16: the format t5x is always written in float32" in err


def test_an_export_is_written_in_every_format(gecko, tiny_folder, tmp_path):
    for to, file in (
        ("sentence-transformers", "modules.json"),
        ("t5x", "gecko/gecko.json"),
        ("onnx", "model.onnx"),
    ):
        output = tmp_path / to
        status, out, _ = gecko(
            "export", tiny_folder, f"--output={output}", f"--to={to}"
        )
        assert status == 0
        assert "Load it with" in out
        assert (output / file).exists()
        assert ("model = ModelMeta(" in out) == (to == "sentence-transformers")
        if to != "t5x":
            config = json.loads((output / "config.json").read_text())
            assert config["matryoshka_dimensions"] == [4, 8, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dim=8"], "gecko stores the full embedding"),
        (["--to=onnx", "--dim=9"], "dim=9: the model was not trained.*4, 8, 16"),
        (["--to=t5x", "--results=r.json"], "t5x has no model card"),
        (["--to=sentence-transformers", "--results=r.json"], "r.json: no such file"),
        (["--push=gecko"], "OWNER/NAME"),
    ],
)
def test_an_invalid_export_writes_nothing(
    gecko, tiny_folder, tmp_path, arguments, message
):
    output = tmp_path / "out"
    status, _, err = gecko("export", tiny_folder, f"--output={output}", *arguments)
    assert status == 1
    assert re.search(message, err)
    assert len(err.splitlines()) == 1
    assert not output.exists()


def test_a_complete_export_is_pushed(gecko, tiny_folder, tmp_path, monkeypatch):
    pushed = []

    def push(folder, repo_id):
        pushed.append((sorted(path.name for path in folder.iterdir()), repo_id))
        return "https://hub/a/b"

    monkeypatch.setattr(hub, "check_upload", lambda repo_id: None)
    monkeypatch.setattr(hub, "upload", push)
    status, out, _ = gecko(
        "export", tiny_folder, f"--output={tmp_path / 'm'}", "--push=a/b"
    )
    assert status == 0
    assert out.splitlines()[-1] == "https://hub/a/b"
    ((names, repo_id),) = pushed
    assert "gecko.json" in names
    assert repo_id == "a/b"


def test_an_average_prints_its_inputs(gecko, tiny_folder, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(tiny_folder, tmp_path / name)
    models = [str(tmp_path / name) for name in ("a", "b")]
    output = f"--output={tmp_path / 'soup'}"
    status, out, _ = gecko("average", *models, output, "--weights=3,1")
    assert status == 0
    assert f"0.750  {models[0]}" in out
    assert "cosine 1.0000 to the previous" in out
    assert (tmp_path / "soup" / "model.safetensors").is_file()
    status, _, err = gecko("average", *models, output, "--weights=much")
    assert (status, "comma-separated list of numbers" in err) == (2, True)
    status, _, err = gecko("average", *models, output, "--steps=2")
    assert (status, "leave it out" in err) == (1, True)


def test_a_teacher_is_made_by_a_model_or_from_vectors(gecko, tiny_folder, tmp_path):
    pairs, texts, folder = (str(tmp_path / n) for n in ("p.jsonl", "t.jsonl", "taught"))
    lines = [
        {"task": "docs", "query": f"list {i}", "positive": f"a list of {i}"}
        for i in range(4)
    ]
    pathlib.Path(pairs).write_text("\n".join(map(json.dumps, lines)))
    teach = ("data", "teach", pairs)
    status, out, _ = gecko(
        *teach, f"--model={tiny_folder}", f"--output={folder}", "--dim=4"
    )
    assert status == 0
    assert "8 vectors of 4 dims" in out
    assert "--config.data.teacher_dim=4" in out
    status, out, _ = gecko(*teach, f"--texts={texts}")
    assert (status, "8 texts" in out) == (0, True)
    listed = [json.loads(line) for line in pathlib.Path(texts).read_text().splitlines()]
    vectors = [
        json.dumps({"_id": line["_id"], "vector": [1.0, float(row), 0.5]})
        for row, line in enumerate(listed)
    ]
    pathlib.Path(texts).write_text("\n".join(vectors))
    status, out, err = gecko(*teach, f"--vectors={texts}", f"--output={folder}")
    assert (status, "8 vectors of 3 dims" in out, err) == (0, True, "")
    for wrong, message in (
        ((), "exactly one of --model, --vectors and --texts"),
        ((f"--texts={texts}", f"--vectors={texts}"), "exactly one of"),
        ((f"--vectors={texts}",), "need --output"),
        ((f"--texts={texts}", f"--output={folder}"), "--texts takes none"),
    ):
        status, _, err = gecko(*teach, *wrong)
        assert (status, message in err) == (2, True)


def test_int8_works_from_embed_to_search(gecko, tiny_folder, tmp_path):
    (tmp_path / "t.txt").write_text("one passage\nanother thing\nthree\n")
    status, out, _ = gecko(
        "embed",
        str(tmp_path / "t.txt"),
        f"--model={tiny_folder}",
        f"--output={tmp_path / 'v'}",
        "--precision=int8",
    )
    assert status == 0
    assert "int8, 16 bytes each" in out
    arguments = [str(tmp_path / "v"), f"--output={tmp_path / 'i'}"]
    status, out, _ = gecko("index", *arguments)
    assert "int8, 16 bytes each" in out
    status, out, _ = gecko(
        "search",
        f"--model={tiny_folder}",
        f"--index={tmp_path / 'i'}",
        "--json",
        "one passage",
    )
    assert status == 0
    assert len(json.loads(out)["hits"]) == 3


def test_hard_negatives_and_a_vocabulary_are_made_from_pairs(gecko, tmp_path):
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
    status, out, _ = gecko(
        "data", "prepare", str(pairs), f"--output={triples}", "--negatives=2"
    )
    assert status == 0
    assert f"--config.data.files={triples}" in out
    for line in triples.read_text().splitlines():
        record = json.loads(line)
        assert len(record["negatives"]) == 2
        assert record["positive"] not in record["negatives"]

    harder = tmp_path / "harder.jsonl"
    status, out, _ = gecko(
        *("data", "prepare", str(pairs), f"--output={harder}", "--negatives=9"),
        "--model=mini",
    )
    assert status == 0
    assert "4 of them have fewer than 9: their task has no other passage\n" in out
    for line in harder.read_text().splitlines():
        record = json.loads(line)
        assert len(record["negatives"]) == 3
        assert record["positive"] not in record["negatives"]
    status, _, err = gecko("data", "prepare", "snli", "--model=mini")
    assert status == 1
    assert "--model=mini: applies to files, and snli is a data set" in err

    output = tmp_path / "pairs.model"
    status, out, _ = gecko(
        *("data", "vocabulary", str(pairs), f"--output={output}", "--size=280"),
    )
    assert status == 0
    assert output.exists()
    assert "280 pieces" in out


def test_import_makes_a_model_of_a_t5x_checkpoint(capsys, tmp_path):
    data = pathlib.Path(__file__).parents[1] / "testdata"
    source = str(data / "t5x_tiny" / "legacy_f32")
    arguments = ["import", source, f"--output={tmp_path / 'out'}"]
    assert entry.main(arguments) == 1
    assert "holds no vocabulary" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    arguments.append(f"--vocabulary={data / 'model_v1' / 'vocabulary.model'}")
    arguments.append("--extra-ids=2")
    assert entry.main([*arguments, "--mrl-dims=4,9"]) == 1
    assert "--mrl-dims=4,9:" in (told := capsys.readouterr().err)
    assert "has 8 dims" in told
    assert entry.main([*arguments, "--query-length=9", "--mrl-dims=2,4"]) == 0
    assert "2 layers, 8 dims, revision " in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "gecko.json").read_text())
    assert (settings["extra_ids"], settings["query_length"]) == (2, 9)
    assert settings["mrl_dims"] == [2, 4, 8]
    arguments[1] = str(tmp_path / "out")
    assert entry.main([*arguments[:3], "--mrl-dims=4"]) == 1
    assert "leave --mrl-dims out" in capsys.readouterr().err
    arguments[1] = source
    assert settings["provenance"]["imported"]["format"] == "T5X"
    assert entry.main([*arguments, "--passage-length=1"]) == 2
    assert "must be a whole number, at least 2" in capsys.readouterr().err
