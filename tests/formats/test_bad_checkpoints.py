"""Damaged checkpoints on the command line: one error, and no partial output."""

import json
import os
import pathlib
import pickle
import shutil

import msgpack
import pytest
import safetensors.numpy
import samples

from gecko_jax.cli import entry
from gecko_jax.formats import model_folder

DATA = pathlib.Path(__file__).parents[1] / "testdata"
VOCABULARY = DATA / "model_v1" / "vocabulary.model"


def _halve(path):
    os.truncate(path, path.stat().st_size // 2)


def _edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _hugging_face(folder):
    shutil.copytree(DATA / "t5x_tiny" / "hf", folder)
    shutil.rmtree(folder / "2_Dense")
    shutil.copy(VOCABULARY, folder / "spiece.model")
    return folder


def _t5x(folder):
    shutil.copytree(DATA / "t5x_tiny" / "legacy_f32" / "checkpoint_1000", folder)
    return folder


def _truncated_weights(folder):
    _halve(_hugging_face(folder) / "model.safetensors")


def _empty_weights(folder):
    (_hugging_face(folder) / "model.safetensors").write_bytes(b"")


def _missing_tensor(folder):
    path = _hugging_face(folder) / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    del weights["encoder.final_layer_norm.weight"]
    weights["shared.weight"] = weights["shared.weight"][:, :8].copy()
    safetensors.numpy.save_file(weights, path)


def _other_size(folder):
    _edit(_hugging_face(folder) / "config.json", d_model=24, num_layers=3)


def _decoder_only(folder):
    _edit(_hugging_face(folder) / "config.json", model_type="llama")


def _other_tokenizer(folder):
    _hugging_face(folder)
    (folder / "tokenizer_config.json").write_text('{"extra_ids": 200}')


def _cut_config(folder):
    _halve(_hugging_face(folder) / "config.json")


def _pickle(folder):
    (_hugging_face(folder) / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def _missing_chunk(folder):
    (_t5x(folder) / "target.encoder.layers_1.mlp.wo.kernel" / "0.0").unlink()


def _truncated_chunk(folder):
    _halve(_t5x(folder) / "target.encoder.layers_1.mlp.wo.kernel" / "0.0")


def _truncated_map(folder):
    _halve(_t5x(folder) / "checkpoint")


def _t5x_decoder_only(folder):
    path = _t5x(folder) / "checkpoint"
    tree = msgpack.unpackb(path.read_bytes(), strict_map_key=False)
    target = tree["optimizer"]["target"]
    target["decoder"] = target.pop("encoder")
    path.write_bytes(msgpack.packb(tree))


def _truncated_orbax(folder):
    shutil.copytree(DATA / "t5x_tiny" / "orbax_f32" / "checkpoint_1000", folder)
    for path in (folder / "state" / "d").iterdir():
        _halve(path)


BAD = [
    (_truncated_weights, r"model.safetensors: not a whole safetensors file"),
    (_empty_weights, r"model.safetensors: not a whole safetensors file"),
    (_missing_tensor, "missing encoder/encoder_norm/scale (16,)"),
    (_other_size, "encoder/layers_2/attention/query/kernel"),
    (_decoder_only, "model_type 'llama' has no encoder"),
    (_other_tokenizer, "table 64 rows"),
    (_cut_config, "config.json: not JSON"),
    (_pickle, "pytorch_model.bin: a pickle"),
    (_missing_chunk, "wo.kernel: this array cannot be read"),
    (_truncated_chunk, "wo.kernel: this array cannot be read"),
    (_truncated_map, "checkpoint: not a whole msgpack file"),
    (_t5x_decoder_only, "a decoder-only model; Gecko needs an encoder"),
    (_truncated_orbax, "cannot be read"),
]


def _fail(capsys, *arguments):
    """Runs a command that must fail; returns its error."""
    assert entry.main([str(argument) for argument in arguments]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    lines = [line for line in output.err.splitlines() if ": error: " in line]
    assert len(lines) == 1
    return output.err


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m.__name__ for m, _ in BAD])
def test_a_bad_checkpoint_is_one_error(make, message, tmp_path, capsys):
    make(tmp_path / "bad")
    is_t5x = not (tmp_path / "bad" / "config.json").exists()
    vocabulary = [f"--vocabulary={VOCABULARY}"] if is_t5x else []
    output = tmp_path / "out"
    assert message in _fail(
        capsys, "import", tmp_path / "bad", f"--output={output}", *vocabulary
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
    # The output of an earlier import is unchanged.
    good = _hugging_face(tmp_path / "good")
    assert entry.main(["import", str(good), f"--output={output}"]) == 0
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    _fail(capsys, "import", tmp_path / "bad", f"--output={output}", *vocabulary)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good", "out"]


@pytest.mark.parametrize("form", ["gecko", "sentence-transformers", "t5x", "onnx"])
@pytest.mark.parametrize("kind", ["folder", "workdir"])
def test_a_damaged_model_is_not_exported(
    form, kind, small_files, workdir, tmp_path, capsys
):
    if kind == "folder":
        model_folder.save_model(tmp_path / "model", small_files)
        _halve(tmp_path / "model" / "model.safetensors")
        source, message = tmp_path / "model", "model.safetensors: damaged"
    else:
        for path in (workdir / "checkpoints" / "4" / "params").rglob("d/*"):
            _halve(path)
        source, message = workdir, "this checkpoint is damaged"
    before = sorted(tmp_path.iterdir())
    output = tmp_path / "out"
    assert message in _fail(
        capsys, "export", source, f"--output={output}", f"--to={form}"
    )
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["import", "google/no-such-model", "--output=out"],
        ["evaluate", "pairs.tsv", "--model=google/no-such-model"],
        ["embed", "texts.txt", "--model=google/no-such-model", "--output=out"],
    ],
)
def test_a_hub_name_without_network_is_one_error(
    arguments, tmp_path, capsys, monkeypatch
):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("Name or service not known\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.tsv").write_text("a b\tc d\t1\n")
    (tmp_path / "texts.txt").write_text("a b\n")
    before = sorted(tmp_path.iterdir())
    message = _fail(capsys, *arguments)
    assert (
        "cannot be downloaded from the hub (Name or service not known); check"
        in message
    )
    assert "more lines" not in message
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_is_not_exported_over_its_checkpoints(workdir, tmp_path, capsys):
    for form in ("gecko", "sentence-transformers", "t5x", "onnx"):
        message = _fail(
            capsys, "export", workdir, f"--output={workdir}", f"--to={form}"
        )
        assert "not empty, and not an earlier export" in message
    assert (workdir / "checkpoints" / "4").is_dir()
    assert samples.load_model(workdir).step == 4
