"""sentence-transformers folders: the same embeddings, or an error with the name."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import gecko_jax
from gecko_jax.formats import (
    detection,
    model_folder,
    names,
    parameters,
    to_sentence_transformers,
)
from gecko_jax.inference import embedding
from gecko_jax.text import text_formats

DATA = pathlib.Path(__file__).parents[1] / "testdata"
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
    """The tiny T5X dual encoder in the format of GTR."""
    copy = shutil.copytree(HF, tmp_path / "st")
    shutil.copy(VOCABULARY, copy / "spiece.model")
    write_modules(copy, "Transformer", "Pooling", "Dense", "Normalize")
    write(copy / "1_Pooling" / "config.json", OLD_POOLING)
    write(copy / "sentence_bert_config.json", {"max_seq_length": 40})
    return copy


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_encoder_and_projection_are_those_of_t5x(folder):
    read = model_folder.read_params(detection.open_model(folder))
    flat = parameters.flatten(read.params)
    with np.load(DATA / "t5x_tiny" / "params.npz") as stored:
        assert flat.keys() == set(stored)
        for name, leaf in flat.items():
            np.testing.assert_array_equal(leaf, stored[name], err_msg=name)
    assert flat[names.PROJECTION].shape == (16, 8)
    assert (read.encoder_config.embedding_dim, read.mrl_dims) == (8, (8,))
    assert (read.query_length, read.passage_length) == (40, 40)
    assert read.text_format == text_formats.PLAIN


def test_a_folder_without_dense_has_no_projection(folder, caplog):
    write_modules(folder, "Transformer", "Pooling")
    opened = detection.open_model(folder)
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
        # `encode_document` always finds a prompt "document", which may be empty.
        ({"prompts": {"query": "q ", "passage": "p "}}, "q a", "q a", "b"),
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
            "a",
            "Find: a",
            "b",
        ),
        (
            {"prompts": {"query": "{title}</s>{text}: ", "document": "{x} {text} "}},
            "{title}</s>{text}: a",
            "{title}</s>{text}: a",
            "{x} {text} b",
        ),
        ({"prompts": {"query": None}}, "a", "a", "b"),
        ({"prompts": None}, "a", "a", "b"),
        ({"prompts": {}}, "a", "a", "b"),
    ],
)
def test_prompts_become_the_text_format(folder, config, query, named, passage):
    write(folder / "config_sentence_transformers.json", config)
    text_format = detection.open_model(folder).text_format
    assert text_format.format_query("a", embedding.DEFAULT_TASK) == query
    assert text_format.format_query("a", "docs") == named
    assert text_format.format_passage("b", None) == passage


def test_the_dim_it_is_cut_to_stays_the_default(folder, tmp_path):
    write(folder / "config_sentence_transformers.json", {"truncate_dim": 4})
    opened = detection.open_model(folder)
    assert opened.mrl_dims == (4,)
    to_sentence_transformers.save(tmp_path / "out", opened)
    settings = json.loads(
        (tmp_path / "out" / "config_sentence_transformers.json").read_text()
    )
    assert settings["truncate_dim"] == 4


def test_leading_whitespace_keeps_a_prompt_and_a_text_apart(folder):
    prompts = {"prompts": {"query": "query:", "document": "text: "}}
    write(folder / "config_sentence_transformers.json", prompts)
    text_format = detection.open_model(folder).text_format
    for lead in (" ", "\n", "\u00a0", "\u3000"):
        assert text_format.format_query(f"{lead}a  b", "x") == "query: a b"
    assert text_format.format_query("a b", "x") == "query:a b"
    assert text_format.format_passage(" a", None).split() == ["text:", "a"]


def test_an_export_of_ours_keeps_its_settings(folder, tiny_files):
    plain = detection.open_model(folder)
    settings = model_folder.ModelFiles(
        params={},
        encoder_config=plain.encoder_config,
        text_format=text_formats.TextFormat(
            task_descriptions={"docs": "search result"}
        ),
        vocabulary_proto=VOCABULARY.read_bytes(),
        extra_ids=2,
        mrl_dims=(4, 8),
        query_length=11,
        passage_length=22,
        step=33,
        revision="ours-33",
    )
    model_folder.write_model_json(folder, settings)
    # Prompts that differ from the settings.
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


def _write_theirs(folder, config, added=()):
    """Writes a sentence-transformers model whose tokenizer has added tokens."""
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer, models

    torch.manual_seed(0)
    sizes = {"vocab_size": 8_200, "d_model": 16, "d_kv": 8, "d_ff": 32}
    config_t5 = transformers.T5Config(**sizes, num_layers=2, num_heads=2)
    t5 = transformers.T5EncoderModel(config_t5)
    with torch.no_grad():
        for weights in t5.parameters():
            weights.mul_(3.0)
    plain = folder / "t5"
    t5.save_pretrained(plain)
    shutil.copy(QUICKSTART / "vocabulary.model", plain / "spiece.model")
    tokenizer = transformers.T5Tokenizer.from_pretrained(plain, extra_ids=20)
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(plain)
    (plain / "spiece.model").unlink()
    theirs = SentenceTransformer(
        modules=[
            models.Transformer(str(plain), max_seq_length=64),
            models.Pooling(16, pooling_mode="mean"),
            models.Normalize(),
        ],
        device="cpu",
    )
    theirs.save_pretrained(str(folder / "st"))
    write(folder / "st" / "config_sentence_transformers.json", config)
    return SentenceTransformer(str(folder / "st"), device="cpu")


def _assert_same_vectors(ours, theirs, tasks):
    texts = ["a cat", "what do geckos eat [QRY] x", "a[QRY] {title} {text}"]
    pairs = [
        (ours.encode_queries(texts), theirs.encode_query(texts)),
        (ours.encode_passages(texts), theirs.encode_document(texts)),
    ]
    pairs += [
        (ours.encode_queries(texts, task=t), theirs.encode(texts, prompt_name=t))
        for t in tasks
    ]
    # A task without a prompt gets the prompt of queries.
    pairs += [
        (ours.encode_queries(texts, task=t), theirs.encode_query(texts))
        for t in ("semantic similarity", "qa")
    ]
    for found, expected in pairs:
        assert np.sum(found * expected, axis=1).min() > 0.99999


@pytest.mark.torch
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prompts": {"query": "query: "}},
        {"prompts": {"document": "passage: "}},
        {"prompts": {"query": "q: ", "passage": "p: ", "corpus": "c: "}},
        {"prompts": {"sts": "Represent: "}, "default_prompt_name": "sts"},
        {
            "prompts": {"query": "q: ", "document": "d: ", "sts": "Represent: "},
            "default_prompt_name": "sts",
        },
        {
            "prompts": {"query": "{title} </s>{text}: ", "document": "{a} <unk>b: "},
            "default_prompt_name": "query",
        },
        {"prompts": {"query": "[QRY] ", "document": "[QRY]", "sts": "<extra_id_1>"}},
        {"prompts": {"search result": "S: ", "query": "q: "}},
    ],
)
def test_every_prompt_gives_the_vectors_of_sentence_transformers(tmp_path, config):
    """In the folder, after an import, and after an export back."""
    from sentence_transformers import SentenceTransformer

    from gecko_jax.formats import to_sentence_transformers

    theirs = _write_theirs(tmp_path, config, ["[QRY]"])
    tasks = [name for name in config.get("prompts", {}) if name != "search result"]
    imported = detection.open_model(tmp_path / "st")
    _assert_same_vectors(gecko_jax.load(tmp_path / "st"), theirs, tasks)
    model_folder.save_model(tmp_path / "ours", imported)
    ours = gecko_jax.load(tmp_path / "ours")
    assert ours.files.text_format == imported.text_format
    _assert_same_vectors(ours, theirs, tasks)
    to_sentence_transformers.save(tmp_path / "back", imported)
    back = SentenceTransformer(str(tmp_path / "back"), device="cpu")
    _assert_same_vectors(ours, back, tasks)
    _assert_same_vectors(gecko_jax.load(tmp_path / "back"), theirs, tasks)


# What Gecko does not compute.


REFUSED = {
    "1_Pooling/config.json": [
        (
            {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True},
            "pools by cls; Gecko pools by the mean",
        ),
        ({"pooling_mode_max_tokens": True}, "pools by mean and max"),
        ({"pooling_mode": "lasttoken"}, "a T5 encoder that pools by"),
        (
            {"include_prompt": False},
            "include_prompt must be one of True or null, not false",
        ),
        ({"pooling_mode": 5}, "pools by 5"),
        (
            {"include_prompt": "no"},
            'include_prompt must be one of True or null, not "no"',
        ),
    ],
    "2_Dense/config.json": [
        ({"bias": True}, "bias must be one of False, not true"),
        (
            {"activation_function": "torch.nn.modules.activation.Tanh"},
            'must be torch.nn.modules.linear.Identity, not "torch.nn.modules.act',
        ),
        (
            {"module_input_name": "token_embeddings"},
            "module_input_name must be one of sentence_embedding or null",
        ),
        ({"use_residual": True}, "use_residual must be one of False or null, not true"),
        (
            {"activation_function": 3},
            "activation_function must be torch.nn.modules.linear.Identity, not 3",
        ),
        (  # sentence-transformers computes Tanh in place of custom code.
            {"activation_function": "mine.Identity"},
            'torch.nn.modules.linear.Identity, not "mine.Identity"',
        ),
    ],
    "sentence_bert_config.json": [
        (
            {"do_lower_case": True},
            "do_lower_case must be one of False or null, not true",
        ),
        ({"max_seq_length": "64"}, "a whole number from 8 "),
        (
            {"max_seq_length": 3},
            "must be a whole number from 8 to 1,048,576 or null, not 3",
        ),
        ({"max_seq_length": [64]}, "or null, not a list"),
        (
            {"query_expansion": {"strategy": "fixed", "length": 32}},
            "query_expansion must be one of {} or null, not an object",
        ),
        (
            {"processing_kwargs": {"text": {"truncation": False}}},
            "processing_kwargs must be one of {} or null, not an object",
        ),
        (
            {"tokenizer_args": {"do_lower_case": True}},
            "tokenizer_args: unknown field 'do_lower_case'; .*, or remove it if it",
        ),
        ({"model_args": 3}, "model_args must be an object .*, not 3"),
    ],
    "config.json": [({"model_type": "mpnet"}, "model_type 'mpnet' has no enc")],
    "3_Normalize/config.json": [
        (
            {"module_input_name": "token_embeddings"},
            "3_Normalize/config.json: module_input_name must be one of",
        )
    ],
    "config_sentence_transformers.json": [
        (
            {"truncate_dim": "8"},
            'truncate_dim must be a whole number from 1 or null, not "8"',
        ),
        (
            {"prompts": ["a"]},
            "prompts must be an object of text or null or null, not a list",
        ),
        ({"default_prompt_name": 1}, "default_prompt_name must be text or null, not 1"),
    ],
    "tokenizer_config.json": [
        (
            {"truncation_side": "left"},
            'truncation_side must be one of right or null, not "left"',
        )
    ],
}


@pytest.mark.parametrize(
    ("path", "values", "message"),
    [(name, *case) for name, cases in REFUSED.items() for case in cases],
)
def test_what_gecko_does_not_compute_is_refused(folder, path, values, message):
    if not (folder / path).exists():
        write(folder / path, {})
    edit(folder / path, **values)
    with pytest.raises(ValueError, match=message):
        detection.open_model(folder)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"a"', "{", "[[[", "\xff"])
@pytest.mark.parametrize(
    "path",
    [
        "modules.json",
        "config.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer.json",
    ],
)
def test_a_file_of_another_kind_is_one_error(folder, path, content):
    (folder / path).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=path.replace(".", r"\.")):
        detection.open_model(folder)


@pytest.mark.parametrize(
    ("files", "lengths"),
    [
        ({"sentence_bert_config.json": {"max_seq_length": 40}}, (40, 40)),
        ({"sentence_roberta_config.json": {"max_seq_length": 50}}, (50, 50)),
        ({"sentence_xlnet_config.json": {"max_seq_length": 50}}, (50, 50)),
        (
            {
                "sentence_bert_config.json": {"max_seq_length": 40},
                "sentence_roberta_config.json": {"max_seq_length": 50},
            },
            (40, 40),
        ),
        (
            {
                "sentence_bert_config.json": {"max_seq_length": None},
                "tokenizer_config.json": {"model_max_length": 77},
            },
            (77, 77),
        ),
        (
            {
                "sentence_bert_config.json": {"max_seq_length": 99},
                "tokenizer_config.json": {"model_max_length": 77},
            },
            (99, 99),
        ),
        (
            {
                "sentence_bert_config.json": {"query_length": 16},
                "tokenizer_config.json": {"model_max_length": 77},
            },
            (16, 77),
        ),
        ({"tokenizer_config.json": {"model_max_length": 10**30}}, None),
        ({"tokenizer_config.json": {"model_max_length": 1e30}}, None),
        ({}, None),
    ],
)
def test_texts_are_cut_where_sentence_transformers_cuts_them(
    folder, files, lengths, caplog
):
    (folder / "sentence_bert_config.json").unlink()
    for name, values in files.items():
        write(folder / name, values | {"extra_ids": 0})
    opened = detection.open_model(folder)
    assert (opened.query_length, opened.passage_length) == (lengths or (512, 512))
    # The default limit is logged.
    assert ("cuts them at 512 tokens" in caplog.text) is (lengths is None)


def test_a_file_without_settings_is_passed_over(folder):
    write(folder / "sentence_bert_config.json", {})
    write(folder / "sentence_distilbert_config.json", {"max_seq_length": 50})
    assert detection.open_model(folder).query_length == 50


def test_a_limit_of_the_config_counts_where_no_other_is_set(folder, caplog):
    write(folder / "sentence_bert_config.json", {})
    edit(folder / "config.json", max_position_embeddings=30)
    assert detection.open_model(folder).query_length == 30
    write(folder / "sentence_bert_config.json", {"max_seq_length": 40})
    assert detection.open_model(folder).query_length == 40
    assert "512" not in caplog.text


def test_modules_with_code_of_their_own_are_refused(folder):
    path = folder / "modules.json"
    path.write_text(path.read_text().replace("sentence_transformers.models.P", "my.P"))
    with pytest.raises(ValueError, match=r"my\.Pooling is a module with its own code"):
        detection.open_model(folder)


def test_other_modules_are_refused_by_name(folder):
    write_modules(folder, "Transformer", "Pooling", "Dense", "Dense", "LayerNorm")
    with pytest.raises(ValueError, match="Dense, Dense, LayerNorm; Gecko computes"):
        detection.open_model(folder)
    (folder / "modules.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"modules\.json: not a list of modules"):
        detection.open_model(folder)


def test_a_module_outside_the_folder_is_refused(folder):
    path = folder / "modules.json"
    path.write_text(path.read_text().replace("2_Dense", "../2_Dense"))
    with pytest.raises(ValueError, match=r"\.\./2_Dense: leads out of its folder"):
        detection.open_model(folder)


def test_a_projection_in_a_pickle_is_refused(folder):
    (folder / "2_Dense" / "model.safetensors").rename(
        folder / "2_Dense" / "pytorch_model.bin"
    )
    with pytest.raises(ValueError, match=r"2_Dense/pytorch_model\.bin: a pickle"):
        detection.open_model(folder)


def test_prompts_must_be_texts(folder):
    path = folder / "config_sentence_transformers.json"
    write(path, {"prompts": {"query": 3}})
    with pytest.raises(
        ValueError, match=r"prompts: \[\"query\"\] must be text or null"
    ):
        detection.open_model(folder)
    write(path, {"prompts": {"a": "b"}, "default_prompt_name": "c"})
    with pytest.raises(ValueError, match="default_prompt_name='c', which is none of"):
        detection.open_model(folder)
