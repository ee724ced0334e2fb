"""sentence-transformers folders: the same vectors, or a refusal by name."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import gecko_jax
from gecko_jax import embedding, model_folder, parameters, text
from gecko_jax.convert import formats, names

DATA = pathlib.Path(__file__).parent / "data"
HF = DATA / "t5x_tiny" / "hf"
VOCABULARY = DATA / "model_v1" / "vocabulary.model"
QUICKSTART = pathlib.Path(gecko_jax.__file__).parent / "quickstart"

# As sentence-transformers 2 wrote GTR's and Sentence-T5's.
OLD_POOLING = {
    "word_embedding_dimension": 16,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": True,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
}


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def write_modules(folder, *kinds):
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": "" if kind == "Transformer" else f"{number}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    write(folder / "modules.json", modules)


@pytest.fixture
def folder(tmp_path):
    """The tiny dual encoder of T5X in the form of GTR."""
    copy = shutil.copytree(HF, tmp_path / "st")
    shutil.copy(VOCABULARY, copy / "spiece.model")
    write_modules(copy, "Transformer", "Pooling", "Dense", "Normalize")
    write(copy / "1_Pooling" / "config.json", OLD_POOLING)
    write(copy / "sentence_bert_config.json", {"max_seq_length": 40})
    return copy


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_encoder_and_projection_are_those_of_t5x(folder):
    read = model_folder.read_params(formats.open_model(folder))
    flat = parameters.flatten(read.params)
    with np.load(DATA / "t5x_tiny" / "params.npz") as stored:
        assert flat.keys() == set(stored)
        for name, leaf in flat.items():
            np.testing.assert_array_equal(leaf, stored[name], err_msg=name)
    assert flat[names.PROJECTION].shape == (16, 8)
    assert (read.encoder_config.embedding_dim, read.mrl_dims) == (8, (8,))
    assert (read.query_length, read.passage_length) == (40, 40)
    assert read.text_format == formats.PLAIN_FORMAT


def test_a_folder_without_dense_has_no_projection(folder, caplog):
    write_modules(folder, "Transformer", "Pooling")
    opened = formats.open_model(folder)
    assert not opened.encoder_config.projection
    assert opened.encoder_config.embedding_dim == 16
    assert "has no Normalize module" in caplog.text


@pytest.mark.parametrize(
    ("config", "query", "named", "passage"),
    [
        (
            {"prompts": {"query": "query: ", "document": ""}},
            "query: a",
            "query: a",
            "b",
        ),
        ({"prompts": {"query": "q ", "passage": "p "}}, "q a", "q a", "p b"),
        (
            {
                "prompts": {"query": "Q: ", "document": "D: ", "docs": "Find docs: "},
                "default_prompt_name": "docs",
            },
            "Q: a",
            "Find docs: a",
            "D: b",
        ),
        (
            {"prompts": {"docs": "Find: "}, "default_prompt_name": "docs"},
            "Find: a",
            "Find: a",
            "Find: b",
        ),
        ({"prompts": {}}, "a", "a", "b"),
    ],
)
def test_prompts_become_the_text_format(folder, config, query, named, passage):
    write(folder / "config_sentence_transformers.json", config)
    text_format = formats.open_model(folder).text_format
    assert text_format.format_query("a", embedding.DEFAULT_TASK) == query
    assert text_format.format_query("a", "docs") == named
    assert text_format.format_passage("b", None) == passage


def test_the_dim_it_is_cut_to_counts_as_trained(folder):
    write(folder / "config_sentence_transformers.json", {"truncate_dim": 4})
    assert formats.open_model(folder).mrl_dims == (4, 8)


def test_an_export_of_ours_keeps_its_settings(folder, tiny_files):
    plain = formats.open_model(folder)
    settings = model_folder.ModelFiles(
        params={},
        encoder_config=plain.encoder_config,
        text_format=text.TextFormat(task_descriptions={"docs": "search result"}),
        vocabulary_proto=VOCABULARY.read_bytes(),
        extra_ids=2,
        mrl_dims=(4, 8),
        query_length=11,
        passage_length=22,
        step=33,
        revision="ours-33",
    )
    model_folder.write_model_json(folder, settings)
    # Prompts that cannot say what the settings say.
    write(folder / "config_sentence_transformers.json", {"prompts": {"docs": "x"}})
    loaded = gecko_jax.load(folder)
    for field in ("text_format", "extra_ids", "mrl_dims", "query_length", "step"):
        assert getattr(loaded.files, field) == getattr(settings, field)
    assert loaded.revision == "ours-33"
    assert loaded.files.provenance["imported"]["format"] == "sentence-transformers"


@pytest.mark.torch
@pytest.mark.parametrize("activation", ["gated-gelu", "relu"])
def test_vectors_are_those_of_sentence_transformers(tmp_path, activation):
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer, models

    torch.manual_seed(0)
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=8_100,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj=activation,
        )
    )
    with torch.no_grad():
        for weights in t5.parameters():
            weights.mul_(3.0)
    t5.save_pretrained(tmp_path / "t5")
    spiece = tmp_path / "t5" / "spiece.model"
    shutil.copy(QUICKSTART / "vocabulary.model", spiece)
    tokenizer = transformers.T5Tokenizer.from_pretrained(tmp_path / "t5", extra_ids=20)
    tokenizer.save_pretrained(tmp_path / "t5")
    spiece.unlink()
    theirs = SentenceTransformer(
        modules=[
            models.Transformer(str(tmp_path / "t5"), max_seq_length=24),
            models.Pooling(16, pooling_mode="mean"),
            models.Dense(16, 12, bias=False, activation_function=torch.nn.Identity()),
            models.Normalize(),
        ],
        prompts={"query": "query: ", "document": "passage: ", "sts": "same as: "},
        device="cpu",
    )
    theirs.save_pretrained(str(tmp_path / "st"))
    ours = gecko_jax.load(tmp_path / "st")
    assert ours.files.extra_ids == 20
    texts = [
        "how to store a list in a table",
        "Arrays of any built-in type can be created. " * 8,  # longer than 24 tokens
        "  ＡＢＣ  ﬁne\tcafé naïve ½ x² — “quoted” 日本語 ",
        "a",
    ]
    for found, expected in (
        (ours.encode_passages(texts), theirs.encode_document(texts)),
        (ours.encode_queries(texts), theirs.encode_query(texts)),
        (
            ours.encode_queries(texts, task="sts"),
            theirs.encode(texts, prompt_name="sts"),
        ),
    ):
        np.testing.assert_allclose(found, expected, atol=2e-6)


# What Gecko does not compute.


@pytest.mark.parametrize(
    ("path", "values", "message"),
    [
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True},
            "pools by cls; Gecko pools by the mean",
        ),
        (
            "1_Pooling/config.json",
            {"pooling_mode_max_tokens": True},
            "pools by mean and max",
        ),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pools by lasttoken"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt is false"),
        ("2_Dense/config.json", {"bias": True}, "activation Identity, bias True"),
        (
            "2_Dense/config.json",
            {"activation_function": "torch.nn.modules.activation.Tanh"},
            "activation Tanh, bias False",
        ),
        (
            "2_Dense/config.json",
            {"module_input_name": "token_embeddings"},
            "module_input_name is 'token_embeddings'",
        ),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case is true"),
        ("config.json", {"model_type": "mpnet"}, "model_type 'mpnet' has no T5"),
    ],
)
def test_what_gecko_does_not_compute_is_refused(folder, path, values, message):
    edit(folder / path, **values)
    with pytest.raises(ValueError, match=message):
        formats.open_model(folder)


def test_other_modules_are_refused_by_name(folder):
    write_modules(folder, "Transformer", "Pooling", "Dense", "Dense", "LayerNorm")
    with pytest.raises(ValueError, match="Dense, Dense, LayerNorm; Gecko computes"):
        formats.open_model(folder)
    (folder / "modules.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"modules\.json: not a list of modules"):
        formats.open_model(folder)


def test_a_module_outside_the_folder_is_refused(folder):
    path = folder / "modules.json"
    path.write_text(path.read_text().replace("2_Dense", "../2_Dense"))
    with pytest.raises(ValueError, match=r"names the folder '\.\./2_Dense', outside"):
        formats.open_model(folder)


def test_a_projection_in_a_pickle_is_refused(folder):
    (folder / "2_Dense" / "model.safetensors").rename(
        folder / "2_Dense" / "pytorch_model.bin"
    )
    with pytest.raises(ValueError, match=r"2_Dense/pytorch_model\.bin: a pickle"):
        formats.open_model(folder)


def test_prompts_must_be_texts(folder):
    path = folder / "config_sentence_transformers.json"
    write(path, {"prompts": {"query": 3}})
    with pytest.raises(ValueError, match="prompts must be texts by name"):
        formats.open_model(folder)
    write(path, {"prompts": {"query": "{text} "}})
    with pytest.raises(ValueError, match=r"must hold \{text\} once"):
        formats.open_model(folder)
