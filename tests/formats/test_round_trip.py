"""Imports and exports: round trips in every format are exact."""

import dataclasses
import json
import pathlib
import re
import shutil
import weakref

import jax
import numpy as np
import pytest
import safetensors.numpy
import samples
import tensorstore
import tiny_encoders
from flax import serialization

import gecko_jax
from gecko_jax.cli import entry
from gecko_jax.formats import (
    detection,
    model_folder,
    names,
    parameters,
    tensors,
    to_onnx,
    to_sentence_transformers,
    to_t5x,
)
from gecko_jax.inference import embedding
from gecko_jax.models import dual_encoder
from gecko_jax.text import text_formats

QUICKSTART = pathlib.Path(gecko_jax.__file__).parent / "quickstart"
VOCABULARY = QUICKSTART / "vocabulary.model"  # 8,000 pieces
DATA = pathlib.Path(__file__).parents[1] / "testdata"
T5X = DATA / "t5x_tiny" / "legacy_f32"
LEGACY = T5X / "checkpoint_1000"

# Published kinds of encoders: activation, gate, shared relative bias.
KINDS = {
    "t5_1_0": {"mlp_activations": ("relu",)},
    "t5_1_1": {"mlp_activations": ("gelu", "linear")},
    "umt5": {"mlp_activations": ("gelu", "linear"), "shared_relative_bias": False},
    "gtr": {
        "mlp_activations": ("relu",),
        "projection": True,
        "embedding_dim": 12,
        "l2_epsilon": 1e-6,
    },
}
# Encoders of other families, small, with every switch of their family.
FAMILIES = {
    "gemma": tiny_encoders.GEMMA,
    "t5gemma2": dataclasses.replace(
        tiny_encoders.GEMMA, local_window=(3, 4), rope_factor=8.0, query_scale=0.5
    ),
    "embeddinggemma2": tiny_encoders.EMBEDDINGGEMMA2,
    "qwen3": tiny_encoders.QWEN3,
}
TEXTS = ["what do geckos eat", "Most geckos eat  insects.", "long words " * 60, "é 漢"]


def make_files(kind):
    """A plain encoder of one kind, with parameters of ordinary size."""
    if kind in FAMILIES:
        config = dataclasses.replace(FAMILIES[kind], vocab_size=8_064)
    else:
        config = dual_encoder.EncoderConfig(
            vocab_size=8_064,
            model_dim=16,
            num_layers=2,
            num_heads=3,
            head_dim=8,
            mlp_dim=24,
            **{"embedding_dim": 16, "projection": False, **KINDS[kind]},
        )
    rng = np.random.default_rng(0)
    flat = {
        name: rng.standard_normal(leaf.shape, np.float32) / leaf.shape[0] ** 0.5
        for name, leaf in parameters.flatten(
            dual_encoder.abstract_params(config)[0]
        ).items()
    }
    # Some bit patterns are NaN or infinite.
    flat["encoder/encoder_norm/scale"][:3] = (-0.0, 1e-42, np.float32(3.4e38))
    return model_folder.ModelFiles(
        params=parameters.unflatten(flat),
        encoder_config=config,
        text_format=text_formats.PLAIN,
        vocabulary_proto=VOCABULARY.read_bytes(),
        extra_ids=64,
        mrl_dims=(config.embedding_dim,),
        query_length=40,
        passage_length=40,
        step=7,
        revision="",
    )


def run(*arguments):
    assert entry.main([str(argument) for argument in arguments]) == 0


def bits(flat):
    return {name: (leaf.shape, leaf.tobytes()) for name, leaf in flat.items()}


def read_bits(source, **settings):
    opened = model_folder.read_params(detection.open_model(source, **settings))
    return bits(parameters.flatten(opened.params))


def read_t5x_bits(checkpoint):
    """Reads all arrays of a legacy checkpoint as t5x does, by the specs in the map."""
    tree = serialization.msgpack_restore((checkpoint / "checkpoint").read_bytes())
    found = {}

    def visit(node, name):
        if "driver" in node:
            spec = {"driver": "zarr", "kvstore": dict(node["kvstore"])}
            spec["kvstore"]["path"] = f"{checkpoint}/{spec['kvstore']['path']}"
            found[name] = tensorstore.open(spec).result().read().result()
            return
        for key, child in node.items():
            visit(child, f"{name}/{key}" if name else key)

    visit(tree["optimizer"]["target"], "")
    return bits(found)


def read_folder_files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write_hugging_face(folder, files):
    """Writes an encoder as transformers does, under its names."""
    folder.mkdir()
    flat = parameters.flatten(files.params)
    there = names.hugging_face_names(files.encoder_config)
    weights = {
        name.name: np.ascontiguousarray(flat[ours].T if name.transposed else flat[ours])
        for ours, name in there.items()
    }
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    config = to_sentence_transformers.build_config(files, 40)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "spiece.model").write_bytes(files.vocabulary_proto)
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 64}))
    return bits(weights)


def write_gtr(folder, files):
    """Writes a dual encoder as sentence-transformers 2 wrote GTR's."""
    encoder = write_hugging_face(folder, files)
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    modules = [
        {
            "idx": n,
            "name": str(n),
            "path": f"{n}_{kind}" if n else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for n, kind in enumerate(kinds)
    ]
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    dense = {
        "in_features": 16,
        "out_features": 12,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    (folder / "modules.json").write_text(json.dumps(modules))
    for name, values in (("1_Pooling", pooling), ("2_Dense", dense)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(values))
    (folder / "3_Normalize").mkdir()
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    kernel = parameters.flatten(files.params)[names.PROJECTION]
    weights = {names.DENSE_WEIGHT: np.ascontiguousarray(kernel.T)}
    safetensors.numpy.save_file(weights, folder / "2_Dense" / "model.safetensors")
    return encoder, bits(weights)


@pytest.mark.parametrize("kind", KINDS)
def test_t5x_comes_back_bit_for_bit(kind, tmp_path):
    files = make_files(kind)
    want = bits(parameters.flatten(files.params))
    to_t5x.save(tmp_path / "first", files)
    (tmp_path / "first" / "gecko").rename(
        tmp_path / "settings"
    )  # Like a checkpoint of t5x.
    vocabulary = [f"--vocabulary={VOCABULARY}", "--extra-ids=64"]
    run("import", tmp_path / "first", "--output", tmp_path / "gecko", *vocabulary)
    run("export", tmp_path / "gecko", "--output", tmp_path / "second", "--to=t5x")
    for name in ("first", "second"):
        assert read_t5x_bits(tmp_path / name / "checkpoint_7") == want
    assert read_folder_files(tmp_path / "first" / "checkpoint_7") == (
        read_folder_files(tmp_path / "second" / "checkpoint_7")
    )


def test_what_t5x_itself_wrote_comes_back_bit_for_bit(tmp_path):
    vocabulary = DATA / "model_v1" / "vocabulary.model"
    run("import", T5X, f"--vocabulary={vocabulary}", f"--output={tmp_path / 'gecko'}")
    run("export", tmp_path / "gecko", "--to=t5x", f"--output={tmp_path / 'out'}")
    found = tmp_path / "out" / "checkpoint_1000"
    assert read_t5x_bits(found) == read_t5x_bits(LEGACY)
    # The files of the arrays, too: chunks and compression are t5x's.
    ours, theirs = read_folder_files(found), read_folder_files(LEGACY)
    del ours["checkpoint"], theirs["checkpoint"]
    chunks = {name for name in theirs if not name.endswith(".zarray")}
    assert ours.keys() == theirs.keys()
    assert {name for name in chunks if ours[name] != theirs[name]} == set()


@pytest.mark.parametrize("kind", ["t5_1_0", "t5_1_1", "umt5"])
def test_hugging_face_comes_back_bit_for_bit(kind, tmp_path):
    weights = write_hugging_face(tmp_path / "hf", make_files(kind))
    gecko, st = tmp_path / "gecko", tmp_path / "st"
    run("import", tmp_path / "hf", "--output", gecko)
    run("export", gecko, "--to=sentence-transformers", "--output", st)
    found = safetensors.numpy.load_file(st / "model.safetensors")
    assert bits(found) == weights
    assert (st / "spiece.model").read_bytes() == VOCABULARY.read_bytes()
    was, now = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path / "hf", st)
    )
    assert was == now


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        # FLAN-T5 and T5 1.1 have another table for the decoder's logits.
        (
            {
                "architectures": ["T5ForConditionalGeneration"],
                "is_encoder_decoder": True,
                "tie_word_embeddings": False,
            },
            "t5_1_1",
        ),
        ({"model_type": "mt5", "tie_word_embeddings": False}, "t5_1_1"),
        ({"architectures": ["T5Model"], "tie_word_embeddings": True}, "t5_1_0"),
    ],
)
def test_an_encoder_comes_back_from_an_encoder_decoder(written, kind, tmp_path):
    folder = tmp_path / "hf"
    weights = write_hugging_face(folder, make_files(kind))
    config = json.loads((folder / "config.json").read_text()) | written
    (folder / "config.json").write_text(json.dumps(config))
    held = safetensors.numpy.load_file(folder / "model.safetensors")
    held["decoder.block.0.layer.0.SelfAttention.q.weight"] = np.ones((24, 16), "f4")
    if not written["tie_word_embeddings"]:
        held["lm_head.weight"] = np.ones((8_064, 16), np.float32)
    safetensors.numpy.save_file(held, folder / "model.safetensors")
    run("import", folder, "--output", tmp_path / "gecko")
    st = tmp_path / "st"
    run("export", tmp_path / "gecko", "--to=sentence-transformers", "--output", st)
    assert bits(safetensors.numpy.load_file(st / "model.safetensors")) == weights


def test_a_folder_like_that_of_gtr_comes_back_bit_for_bit(tmp_path):
    files = make_files("gtr")
    encoder, dense = write_gtr(tmp_path / "gtr", files)
    run("import", tmp_path / "gtr", "--output", tmp_path / "gecko")
    st = tmp_path / "st"
    run("export", tmp_path / "gecko", "--to=sentence-transformers", "--output", st)
    assert bits(safetensors.numpy.load_file(st / "model.safetensors")) == encoder
    found = safetensors.numpy.load_file(st / "2_Dense" / "model.safetensors")
    assert bits(found) == dense
    # The settings are preserved, too.
    first, again = detection.open_model(tmp_path / "gecko"), detection.open_model(st)
    for field in dataclasses.fields(first):
        if field.name not in ("params", "provenance"):
            assert getattr(again, field.name) == getattr(first, field.name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_through_every_form_changes_nothing(kind, tmp_path):
    """T5X, gecko, sentence-transformers, gecko, T5X."""
    files = make_files(kind)
    want = bits(parameters.flatten(files.params))
    to_t5x.save(tmp_path / "a", dataclasses.replace(files, revision="first"))
    run("import", tmp_path / "a", "--output", tmp_path / "b")
    run(
        *("export", tmp_path / "b", "--output", tmp_path / "c"),
        "--to=sentence-transformers",
    )
    run("import", tmp_path / "c", "--output", tmp_path / "d")
    run("export", tmp_path / "d", "--output", tmp_path / "e", "--to=t5x")
    for place in "abcde":
        assert read_bits(tmp_path / place) == want, place
    assert read_t5x_bits(tmp_path / "e" / "checkpoint_7") == want
    one, other = (detection.open_model(tmp_path / place) for place in "ae")
    for field in dataclasses.fields(one):
        if field.name not in ("params", "provenance"):
            assert getattr(one, field.name) == getattr(other, field.name)


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_each_end_of_the_chain_gives_the_vectors_of_the_other_loader(kind, tmp_path):
    from sentence_transformers import SentenceTransformer

    files = make_files(kind)
    flat = parameters.flatten(files.params)
    # Usual scales, so that the other terms matter.
    flat["encoder/encoder_norm/scale"] = np.ones(16, np.float32)
    files = dataclasses.replace(files, params=parameters.unflatten(flat))
    if kind == "gtr":
        write_gtr(tmp_path / "source", files)
        theirs = SentenceTransformer(str(tmp_path / "source"), device="cpu")
    else:
        write_hugging_face(tmp_path / "source", files)
        theirs = None
    run("import", tmp_path / "source", "--output", tmp_path / "a", "--query-length=40")
    run("export", tmp_path / "a", "--output", tmp_path / "b", "--to=t5x")
    run("import", tmp_path / "b", "--output", tmp_path / "c")
    st = tmp_path / "d"
    run("export", tmp_path / "c", "--output", st, "--to=sentence-transformers")
    ours = gecko_jax.load(tmp_path / "c").encode_queries(TEXTS)
    opened = SentenceTransformer(str(st), device="cpu")
    opened.max_seq_length = 40
    found = embedding.cut(opened.encode(TEXTS), ours.shape[1])
    assert np.sum(ours * found, axis=1).min() >= 0.99999
    if theirs is not None:
        # Their tokenizer, made from `spiece.model` alone, has no byte pieces.
        found = embedding.cut(theirs.encode(TEXTS[:-1]), ours.shape[1])
        assert np.sum(ours[:-1] * found, axis=1).min() >= 0.99999


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        *((form, "gtr") for form in ("gecko", "sentence-transformers", "t5x", "onnx")),
        ("sentence-transformers", "t5gemma2"),
        ("sentence-transformers", "embeddinggemma2"),
    ],
)
def test_one_tensor_is_in_memory_at_a_time(form, kind, tmp_path, monkeypatch):
    files = make_files(kind)
    alive, most, num_reads = 0, 0, 0

    def release():
        nonlocal alive
        alive -= 1

    def watched(array):
        def read():
            nonlocal alive, most, num_reads
            copy = np.array(array)
            weakref.finalize(copy, release)
            alive += 1
            num_reads += 1
            most = max(most, alive)
            return copy

        return tensors.Tensor(array.shape, read)

    lazy = dataclasses.replace(
        files, params=jax.tree.map(watched, files.params), revision="lazy"
    )
    monkeypatch.setattr(to_onnx, "_INLINE_BYTES", 0)
    save = {
        "gecko": model_folder.save_model,
        "sentence-transformers": to_sentence_transformers.save,
        "t5x": to_t5x.save,
        "onnx": to_onnx.save,
    }[form]
    save(tmp_path / "out", lazy)
    assert num_reads == len(parameters.flatten(files.params))
    assert (most, alive) == (1, 0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_comes_back_bit_for_bit(kind, tmp_path):
    """As an export, with and without our settings, and through a model folder."""
    files = make_files(kind)
    want = bits(parameters.flatten(files.params))
    st = tmp_path / "st"
    to_sentence_transformers.save(st, dataclasses.replace(files, revision="first"))
    assert read_bits(st) == want
    for name in ("gecko.json", "vocabulary.model"):
        (st / name).unlink()
    assert read_bits(st, vocabulary=VOCABULARY, extra_ids=64) == want
    vocabulary = [f"--vocabulary={VOCABULARY}", "--extra-ids=64"]
    run("import", st, "--output", tmp_path / "gecko", *vocabulary)
    assert read_bits(tmp_path / "gecko") == want
    again = tmp_path / "again"
    run("export", tmp_path / "gecko", "--to=sentence-transformers", "--output", again)
    for name, content in read_folder_files(st).items():
        if name.endswith(".safetensors"):
            first, last = (safetensors.numpy.load_file(f / name) for f in (st, again))
            assert bits(first) == bits(last)
        elif name not in ("README.md", "config_sentence_transformers.json"):
            assert (again / name).read_bytes() == content, name
    config = detection.open_model(again).encoder_config
    assert config == files.encoder_config
    card = (again / "README.md").read_text()
    assert f"- {config.family}\n---" in card
    pooling = {"mean": "the mean of its hid", "last": "the hidden state of the last"}
    assert pooling[config.pooling] in card


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            "t5x",
            "t5x has no encoder of the family 'gemma', only T5; export with --to=s",
        ),
        ("onnx", r"not the family 'gemma'; export with.*optimum-cli export onnx"),
    ],
)
def test_formats_of_t5_alone_refuse_other_families(form, message, tmp_path, capsys):
    files = dataclasses.replace(make_files("gemma"), revision="x")
    model_folder.save_model(tmp_path / "gecko", files)
    output = f"--output={tmp_path / 'out'}"
    assert entry.main(["export", str(tmp_path / "gecko"), output, f"--to={form}"]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_the_command_leaves_the_parameters_of_a_workdir_on_disk(workdir, tmp_path):
    opened = model_folder.open_model(workdir)
    flat = parameters.flatten(opened.params)
    assert all(isinstance(leaf, tensors.Tensor) for leaf in flat.values())
    run("export", workdir, "--output", tmp_path / "t5x", "--to=t5x")
    want = bits(parameters.flatten(samples.load_model(workdir).params))
    assert read_t5x_bits(tmp_path / "t5x" / "checkpoint_4") == want
    assert bits({name: leaf.read() for name, leaf in flat.items()}) == want


def test_a_copy_of_an_export_is_an_export(tmp_path):
    """An export does not depend on its path."""
    to_t5x.save(tmp_path / "a", dataclasses.replace(make_files("gtr"), revision="r"))
    want = read_bits(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    assert read_bits(tmp_path / "b") == want
