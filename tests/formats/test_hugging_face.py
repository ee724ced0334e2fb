"""Hugging Face folders: the hidden states of the encoder, or one clear error."""

import dataclasses
import functools
import json
import os
import pathlib
import pickle
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import samples

import gecko_jax
from gecko_jax.formats import (
    detection,
    hub,
    model_folder,
    names,
    parameters,
    safetensors_files,
    tensors,
)
from gecko_jax.models import dual_encoder

DATA = pathlib.Path(__file__).parents[1] / "testdata"
HF = DATA / "t5x_tiny" / "hf"
VOCABULARY = DATA / "model_v1" / "vocabulary.model"
ATOL = 2e-5


def load_params(source, vocabulary=VOCABULARY):
    opened = detection.open_model(source, vocabulary=vocabulary)
    return parameters.flatten(model_folder.read_params(opened).params)


def reference_params():
    with np.load(DATA / "t5x_tiny" / "params.npz") as stored:
        return {name: stored[name] for name in stored if name != names.PROJECTION}


def assert_same(flat, want):
    assert flat.keys() == want.keys()
    for name, leaf in flat.items():
        np.testing.assert_array_equal(leaf, want[name], err_msg=name)


@pytest.fixture
def folder(tmp_path):
    """A folder with its vocabulary."""
    copy = shutil.copytree(HF, tmp_path / "hf")
    shutil.copy(VOCABULARY, copy / "spiece.model")
    return copy


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder, change):
    path = folder / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    path.unlink()
    safetensors.numpy.save_file(change(weights), path)


def test_the_parameters_are_those_of_t5x_bit_for_bit(folder):
    opened = detection.open_model(folder)
    assert_same(load_params(HF), reference_params())
    assert_same(load_params(folder, None), reference_params())
    assert opened.encoder_config == dual_encoder.EncoderConfig(
        vocab_size=64,
        model_dim=16,
        num_layers=2,
        num_heads=3,
        head_dim=4,
        mlp_dim=24,
        embedding_dim=16,
        projection=False,
    )
    assert opened.vocabulary_proto == VOCABULARY.read_bytes()
    assert opened.text_format.format_query("a", "any task") == "a"
    assert opened.text_format.format_passage("a", "Title") == "Title a"


def test_an_import_writes_what_it_read(folder, tmp_path):
    """Imports a Hugging Face folder; returns its bytes under Hugging Face's names."""
    model_folder.save_model(tmp_path / "out", detection.open_model(folder))
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    config = model_folder.load_settings(tmp_path / "out").encoder_config
    there = safetensors.numpy.load_file(HF / "model.safetensors")
    for ours, (name, is_transposed) in names.hugging_face_names(config).items():
        leaf = stored[ours].T if is_transposed else stored[ours]
        assert np.ascontiguousarray(leaf).tobytes() == there[name].tobytes()


def test_a_decoder_is_left_where_it_is(folder):
    """An encoder-decoder, with the embedding table under its second name."""

    def change(weights):
        table = weights.pop("shared.weight")
        return weights | {
            "encoder.embed_tokens.weight": table,
            "decoder.block.0.layer.0.layer_norm.weight": np.ones(16, np.float32),
            "lm_head.weight": table + 1,
        }

    rewrite(folder, change)
    edit(folder / "config.json", is_encoder_decoder=True)
    assert_same(load_params(folder, None), reference_params())
    both = safetensors.numpy.load_file(HF / "model.safetensors")
    rewrite(folder, lambda w: w | {"shared.weight": both["shared.weight"]})
    assert_same(load_params(folder, None), reference_params())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(folder, dtype):
    rewrite(folder, lambda weights: {k: v.astype(dtype) for k, v in weights.items()})
    want = {
        name: leaf.astype(dtype).astype(np.float32)
        for name, leaf in reference_params().items()
    }
    flat = load_params(folder)
    assert_same(flat, want)
    assert all(leaf.dtype == np.float32 for leaf in flat.values())


def test_shards_are_read_by_their_index(folder):
    path = folder / "model.safetensors"
    opened = safetensors_files.read(folder)
    path.rename(folder / "whole.safetensors")
    weights = safetensors.numpy.load_file(folder / "whole.safetensors")
    safetensors_files.write(
        folder,
        {name: tensors.as_tensor(leaf) for name, leaf in weights.items()},
        shard_bytes=3_000,
    )
    (folder / "whole.safetensors").unlink()
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert safetensors_files.read(folder).keys() == opened.keys()
    assert_same(load_params(folder), reference_params())


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["t5_1_0", "t5_1_1", "mt5", "umt5", "encoder_decoder"])
def test_hidden_states_are_those_of_transformers(tmp_path, kind):
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "d_model": 16,
        "d_kv": 5,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 3,
        "feed_forward_proj": "relu" if kind == "t5_1_0" else "gated-gelu",
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 20,
    }
    if kind == "umt5":
        theirs = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes))
    elif kind == "mt5":
        theirs = transformers.MT5EncoderModel(transformers.MT5Config(**sizes))
    elif kind == "encoder_decoder":
        theirs = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, tie_word_embeddings=False)
        )
    else:
        theirs = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    with torch.no_grad():
        for weights in theirs.parameters():
            weights.copy_(0.4 * torch.randn_like(weights))
    # Shards, as for large models on the hub.
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    opened = model_folder.read_params(
        detection.open_model(tmp_path, vocabulary=VOCABULARY)
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 64, size=(4, 40)).astype(np.int32)
    tokens[1, 9:] = tokens[2, 25:] = 0
    real = tokens > 0
    with torch.no_grad():
        expected = (
            theirs.eval()
            .get_encoder()(
                input_ids=torch.tensor(tokens).long(),
                attention_mask=torch.tensor(real.astype(np.int64)),
            )
            .last_hidden_state.numpy()
        )
    encoder = dual_encoder.DualEncoder(opened.encoder_config)

    @jax.jit
    def compute(params, tokens, segments):
        variables = {"params": params}
        return encoder.apply(variables, tokens, segments, method="hidden_states")

    found = np.asarray(compute(opened.params, tokens, real.astype(np.int32)))
    np.testing.assert_allclose(found[real], expected[real], atol=ATOL)


@pytest.mark.parametrize(
    ("tables", "used"),
    [
        ({"shared": 0, "encoder.embed_tokens": 0}, 0),
        ({"shared": 0, "encoder.embed_tokens": 1, "decoder.embed_tokens": 2}, 1),
        ({"encoder.embed_tokens": 1, "decoder.embed_tokens": 2}, 1),
        ({"shared": 3, "decoder.embed_tokens": 2}, 3),
        ({"decoder.embed_tokens": 2}, 2),
    ],
)
def test_the_table_is_the_one_that_transformers_takes(folder, tables, used):
    """The encoder's own table is read, whatever other tables the file has."""
    table = reference_params()["token_embedder/embedding"]

    def change(weights):
        weights.pop("shared.weight")
        return weights | {f"{name}.weight": table + n for name, n in tables.items()}

    rewrite(folder, change)
    found = load_params(folder, None)
    want = reference_params() | {"token_embedder/embedding": table + used}
    assert_same(found, want)


@pytest.mark.torch
@pytest.mark.parametrize("cls", ["T5", "MT5", "UMT5"])
def test_transformers_takes_the_table_of_the_encoder(tmp_path, cls):
    import safetensors.torch
    import transformers

    config = getattr(transformers, f"{cls}Config")(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2
    )
    encoder = getattr(transformers, f"{cls}EncoderModel")
    encoder(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"] + 1
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    theirs = encoder.from_pretrained(tmp_path).encoder.embed_tokens.weight
    ours = load_params(tmp_path)["token_embedder/embedding"]
    np.testing.assert_array_equal(ours, theirs.detach().numpy())


def test_a_model_with_a_head_keeps_its_encoder_under_a_prefix(folder):
    rewrite(folder, lambda weights: {f"transformer.{k}": v for k, v in weights.items()})
    assert_same(load_params(folder, None), reference_params())


def test_sizes_may_have_their_second_names(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["hidden_size"] = values.pop("d_model")
    values["head_dim"] = values.pop("d_kv")
    path.write_text(json.dumps(values))
    assert_same(load_params(folder, None), reference_params())


@pytest.mark.torch
@pytest.mark.parametrize(
    "values",
    [
        {"dense_act_fn": "silu"},
        {"dense_act_fn": "swish"},
        {"dense_act_fn": "relu"},
        {"dense_act_fn": "gelu_fast"},
        {"dense_act_fn": "gelu_pytorch_tanh"},
        {"dense_act_fn": "gelu_accurate"},
        {"feed_forward_proj": "gated-silu", "dense_act_fn": "gelu_new"},
        {"feed_forward_proj": "gated-relu"},
        {"feed_forward_proj": "relu", "is_gated_act": True},
        {"feed_forward_proj": "gated-gelu", "is_gated_act": False},
        {"tie_word_embeddings": False, "scale_decoder_outputs": False},
        {"relative_attention_max_distance": 20, "relative_attention_num_buckets": 8},
        {"dropout_rate": 0.5, "num_decoder_layers": 7, "pad_token_id": 5},
        {},
    ],
)
def test_every_config_gives_the_numbers_of_transformers(tmp_path, values):
    """All supported combinations of the keys that transformers saves or users edit."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 5, "d_ff": 24, "num_layers": 2}
    config = transformers.T5Config(**sizes, num_heads=3, **values)
    theirs = transformers.T5EncoderModel(config)
    with torch.no_grad():
        for weights in theirs.parameters():
            weights.copy_(0.4 * torch.randn_like(weights))
    theirs.save_pretrained(tmp_path)
    # Without the values that transformers adds when it saves.
    path = tmp_path / "config.json"
    kept = {
        key: value
        for key, value in json.loads(path.read_text()).items()
        if key not in ("dense_act_fn", "is_gated_act", "feed_forward_proj")
    }
    path.write_text(json.dumps(kept | values))
    theirs = transformers.T5EncoderModel.from_pretrained(tmp_path).eval()
    ours = model_folder.read_params(
        detection.open_model(tmp_path, vocabulary=VOCABULARY)
    )
    tokens = np.arange(2, 42)[None]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).last_hidden_state.numpy()
    encoder = dual_encoder.DualEncoder(ours.encoder_config)
    apply = jax.jit(functools.partial(encoder.apply, method="hidden_states"))
    segments = np.ones((1, 40), np.int32)
    found = apply({"params": ours.params}, tokens.astype(np.int32), segments)
    np.testing.assert_allclose(np.asarray(found), expected, atol=ATOL)


# What cannot be read.


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("is_alone", [True, False])
def test_an_adapter_is_refused_with_the_lines_that_merge_it(folder, name, is_alone):
    if is_alone:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").unlink()
    content = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "mine/base"})
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}: an adapter \(PEFT.*merge_and_un"):
        detection.open_model(folder)
    if name.endswith(".json"):
        with pytest.raises(ValueError, match=r"from_pretrained\('mine/base'\)"):
            detection.open_model(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(folder, tmp_path, bad, gecko):
    def change(weights):
        table = weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"].copy()
        table[3, 2] = bad
        return weights | {"encoder.block.1.layer.1.DenseReluDense.wo.weight": table}

    good = tmp_path / "good"
    model_folder.save_model(good, detection.open_model(folder))
    rewrite(folder, change)
    message = r"encoder/layers_1/mlp/wo/kernel .*: 1 of 384 weights are NaN or infinite"
    with pytest.raises(ValueError, match=message):
        gecko_jax.load(folder)
    with pytest.raises(ValueError, match=message):
        model_folder.save_model(tmp_path / "out", detection.open_model(folder))
    assert not (tmp_path / "out").exists()
    # A model folder is refused, too.
    samples.forget_checksums(good / "gecko.json")
    path = good / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    weights["encoder/layers_1/mlp/wo/kernel"][2, 3] = bad
    safetensors.numpy.save_file(weights, path)
    with pytest.raises(ValueError, match=message):
        gecko_jax.load(good)
    for kind in ("gecko", "sentence-transformers", "t5x", "onnx"):
        status, _, errors = gecko(
            "export", good, f"--output={tmp_path / kind}", f"--to={kind}"
        )
        assert status, kind
        assert "weights are NaN or infinite" in errors, kind
        assert not (tmp_path / kind).exists()


def test_truncated_weights_are_named(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(ValueError, match=r"not a whole safetensors file.*copy it"):
        detection.open_model(folder)


def test_sizes_of_another_checkpoint_are_listed_together(folder):
    edit(folder / "config.json", d_ff=48, num_layers=3)
    with pytest.raises(ValueError, match="the files are damaged, or do not") as error:
        detection.open_model(folder)
    message = str(error.value)
    assert "missing encoder/layers_2/mlp/wo/kernel (48, 16)" in message
    assert "wrong shape encoder/layers_0/mlp/wo/kernel: (24, 16)" in message
    edit(folder / "config.json", num_layers=10_000_000)
    with pytest.raises(ValueError, match=r"num_layers must .*1,000, not 10000000"):
        detection.open_model(folder)
    edit(folder / "config.json", d_ff=24, num_layers=1)
    with pytest.raises(ValueError, match=r"unexpected encoder\.block\.1\.layer"):
        detection.open_model(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            r"decoder-only model \(model_type 'llama'\); Gecko needs an encoder",
        ),
        ({"is_decoder": True, "is_encoder_decoder": False}, "a decoder-only model"),
        ({"model_type": "bert"}, "model_type 'bert' has no encoder of Gecko's"),
        ({"is_decoder": True}, "a decoder-only model"),
        (
            {"matryoshka_dimensions": [8, 99]},
            r"matryoshka_dimensions=\[8, 99\] has more",
        ),
        ({"model_type": ["t5"]}, r"model_type \['t5'\] has no encoder"),
        ({"quantization_config": {"bits": 8}}, "quantization_config is set"),
        ({"feed_forward_proj": "gated-x-y"}, "feed_forward_proj must be .*gated-x-y"),
        ({"feed_forward_proj": ["relu"]}, "feed_forward_proj must be .*, not a list"),
        ({"dense_act_fn": "gelu"}, 'dense_act_fn must be one of relu.*, not "gelu"'),
        ({"dense_act_fn": None}, "dense_act_fn must be .*, not null"),
        ({"is_gated_act": "yes"}, "is_gated_act must be true or false"),
        (
            {"layer_norm_epsilon": 1e-5},
            "layer_norm_epsilon must .*, not 1e-05",
        ),
        ({"layer_norm_epsilon": "1e-6"}, 'layer_norm_epsilon must be .*, not "1e-6"'),
        (
            {"d_kv": None, "d_ff": 0},
            "d_kv must .*, not null; d_ff must .*, not 0",
        ),
        ({"num_layers": True}, "num_layers must be a whole number .*, not true"),
        ({"hidden_size": 17}, "d_model=16 and hidden_size=17"),
        (
            {"relative_attention_num_buckets": 32.0},
            "relative_attention_num_buckets must be a whole number",
        ),
        (
            {"relative_attention_max_distance": 8},
            "32 buckets up to a distance of 8; the number of buckets must be even",
        ),
    ],
)
def test_another_model_is_refused(folder, values, message):
    edit(folder / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        detection.open_model(folder)


class _Bomb:
    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-2.bin"])
def test_a_pickle_is_refused_and_never_opened(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ValueError, match=rf"{name}: a pickle.*safetensors.*weights_o"):
        detection.open_model(folder)
    with pytest.raises(ValueError, match="a pickle"):
        detection.open_model(folder / name)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="a pickle"):
        detection.open_model(folder)
    assert not (folder / "unpickled").exists()


def test_quantized_weights_are_refused(folder):
    rewrite(folder, lambda w: w | {"shared.weight": np.ones((64, 16), np.int8)})
    with pytest.raises(ValueError, match=r"shared\.weight is I8.*not quantized"):
        detection.open_model(folder)


def test_an_index_that_leads_outside_is_refused(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"shared.weight": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"file name, not .\.\./other/model"):
        detection.open_model(folder)
    index = {"weight_map": {"shared.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"00001-of-00002\.safetensors: missing"):
        detection.open_model(folder)


def test_a_vocabulary_larger_than_the_table_is_refused(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 30}))
    with pytest.raises(ValueError, match=r"70 ids \(30 of them sent.*table 64 rows"):
        detection.open_model(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "spiece.model").unlink()
    with pytest.raises(ValueError, match=r"no vocabulary here .*--vocabulary"):
        detection.open_model(folder)


def test_a_hub_name_without_network_is_one_error(monkeypatch):
    import huggingface_hub

    def fail(name, revision, **kwargs):
        assert (name, revision) == ("google/t5-v1_1-small", "main")
        assert "*.bin" not in kwargs["allow_patterns"]
        raise OSError("Name or service not known\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        ValueError, match=r"cannot be downloaded from the hub \(Name or"
    ) as e:
        gecko_jax.load("google/t5-v1_1-small@main")
    assert "\n" not in str(e.value)


def test_a_hub_name_is_downloaded(folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kwargs: str(folder)
    )
    assert detection.open_model("hf://google/t5").encoder_config.num_layers == 2
    shutil.rmtree(folder / "2_Dense")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"no safetensors on the hub.*never downloaded"
    ):
        detection.open_model("google/t5")


@pytest.mark.parametrize("source", ["no/such/folder", "nothing", "a b/c"])
def test_what_is_neither_folder_nor_hub_name_is_refused(source):
    with pytest.raises(ValueError, match="no such folder, and not the name of a model"):
        hub.download(source)


def test_a_typo_in_a_path_sends_no_request_to_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs" / "finetune").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="runs/fintune: no such folder"):
        gecko_jax.load("runs/fintune")


def test_a_folder_of_something_else_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"not a model\. Looked for gecko\.json"):
        detection.open_model(tmp_path)
    (tmp_path / "model.ckpt-10.index").write_text("x")
    with pytest.raises(ValueError, match=r"a TensorFlow checkpoint.*gs://t5-data"):
        detection.open_model(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-10"\n')
    with pytest.raises(ValueError, match="a TensorFlow checkpoint"):
        detection.open_model(tmp_path)
    (tmp_path / "x.safetensors").write_text("")
    with pytest.raises(ValueError, match="name the folder that holds both"):
        detection.open_model(tmp_path / "x.safetensors")


def test_a_model_of_ours_keeps_its_own_vocabulary(tiny_files, tmp_path):
    model_folder.save_model(tmp_path / "m", tiny_files)
    opened = detection.open_model(tmp_path / "m", query_length=9)
    assert opened.revision == tiny_files.revision
    assert dataclasses.replace(opened, params={}, query_length=64) == (
        dataclasses.replace(tiny_files, params={})
    )
    with pytest.raises(ValueError, match="leave --vocabulary out"):
        detection.open_model(tmp_path / "m", vocabulary=VOCABULARY)
