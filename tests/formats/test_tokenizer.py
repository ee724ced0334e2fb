"""Vocabularies of Hugging Face folders give the ids of transformers."""

import json
import pathlib
import shutil

import pytest
import unigram_json
from sentencepiece import sentencepiece_model_pb2

import gecko_jax
from gecko_jax.formats import tokenizer
from gecko_jax.text import text_formats, vocabularies

QUICKSTART = pathlib.Path(gecko_jax.__file__).parent / "quickstart" / "vocabulary.model"
TEXTS = [
    "how do I store a list of values in a table column?",
    "  ＡＢＣ  ﬁne\tcafé naïve ½ x² — “quoted” ",
    "日本語のテキスト ☃ 🦎 \u200b zero width",
    "def f(x):\n    return x**2  # square",
    "MiXeD caSe and numbers 3.14159 1,000,000",
]


@pytest.mark.parametrize("extra_ids", [0, 7])
def test_the_model_is_rebuilt_from_json(tmp_path, extra_ids):
    proto = QUICKSTART.read_bytes()
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(unigram_json.contents(proto, extra_ids)))
    found = tokenizer.read(tmp_path)
    assert found.extra_ids == extra_ids
    assert not found.added_tokens
    ours = found
    original = vocabularies.Vocabulary(proto, extra_ids)
    assert ours.size == original.size
    assert ours.encode(TEXTS) == original.encode(TEXTS)
    assert ours.decode(ours.encode(TEXTS)[0]) == TEXTS[0]


def _proto_without_bytes():
    """A model without byte fallback, as T5's."""
    model = sentencepiece_model_pb2.ModelProto.FromString(QUICKSTART.read_bytes())
    model.trainer_spec.byte_fallback = False
    for piece in model.pieces:
        if piece.type == piece.BYTE:
            piece.type = piece.UNUSED
    return model.SerializeToString()


@pytest.mark.torch
@pytest.mark.parametrize("kept", ["tokenizer.json", "spiece.model"])
def test_tokens_are_those_of_transformers(tmp_path, kept):
    import transformers

    (tmp_path / "spiece.model").write_bytes(_proto_without_bytes())
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=5)
    theirs.save_pretrained(tmp_path)
    if kept == "tokenizer.json":
        (tmp_path / "spiece.model").unlink()
    found = tokenizer.read(tmp_path)
    assert found.extra_ids == 5
    ours = found
    assert ours.encode(TEXTS) == theirs(TEXTS).input_ids


ADDED_TEXTS = [
    *TEXTS,
    "[QRY] what is a gecko",
    "a [DOC] b",
    "a[DOC]b [DOC][QRY]",
    "foobarbaz word, foobarbazzes and afoobarbaz",
    "[qry] [ＱＲＹ] the other theme",
    "[QRY]",
    " [QRY]  ",
    "<special> x<special>y",
]


@pytest.mark.torch
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    "added",
    [
        ["[QRY]", "[DOC]", "foobarbaz"],
        [{"content": "[QRY]", "normalized": False}],
        [{"content": "foobarbaz", "single_word": True}],
        [{"content": "[DOC]", "lstrip": True, "rstrip": True}],
        [{"content": "<special>", "special": True}],
        # The longer of two with a common prefix, and one that is a piece.
        ["[QRY", "[QRY]", "the"],
    ],
)
def test_added_tokens_are_those_of_transformers(tmp_path, added, beside):
    import transformers

    (tmp_path / "spiece.model").write_bytes(_proto_without_bytes())
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=5)
    tokens = [
        transformers.AddedToken(**token) if isinstance(token, dict) else token
        for token in added
    ]
    theirs.add_tokens(tokens)
    theirs.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if not beside:
        (tmp_path / "spiece.model").unlink()
    found = tokenizer.read(tmp_path)
    assert len(found.added_tokens) == len(added)
    ours = found
    assert ours.size == len(theirs)
    texts = [text_formats.clean(t) for t in ADDED_TEXTS]
    assert ours.encode(texts) == theirs(texts).input_ids
    assert (
        ours.encode(texts[5:6], 4)
        == theirs(texts[5:6], max_length=4, truncation=True).input_ids
    )


@pytest.mark.torch
@pytest.mark.parametrize("prompt", ["</s> ", "a <unk>: ", "<extra_id_3>b", "<pad>"])
def test_a_prompt_that_spells_a_reserved_token_is_read_as_there(tmp_path, prompt):
    import transformers

    (tmp_path / "spiece.model").write_bytes(_proto_without_bytes())
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=5)
    theirs.save_pretrained(tmp_path)
    texts = [prompt + "a </s> gecko <extra_id_0> x<extra_id_1>y"]
    assert tokenizer.read(tmp_path, [prompt]).encode(texts) == (theirs(texts).input_ids)
    # Other models read the same characters as text.
    assert not tokenizer.read(tmp_path, ["query: "]).added_tokens
    edit(tmp_path / "tokenizer_config.json", split_special_tokens=True)
    assert not tokenizer.read(tmp_path, [prompt]).added_tokens


def edit(path, **values):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


REFUSED = {
    "tokenizer.json": [
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer has a step Lowercase"),
        (
            {
                "normalizer": {
                    "type": "Replace",
                    "pattern": {"String": "cat"},
                    "content": "dog",
                }
            },
            "step Replace .*'cat'.*'dog'",
        ),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFD"}]}},
            "step NFD",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Digits", "individual_digits": True},
                        unigram_json.WORDS,
                    ],
                }
            },
            "pre_tokenizer is Digits and Metaspace",
        ),
        ({"pre_tokenizer": None}, "pre_tokenizer is none"),
        (
            {"pre_tokenizer": unigram_json.WORDS | {"prepend_scheme": "never"}},
            "pre_tokenizer is Metaspace .*'never'",
        ),
        ({"post_processor": None}, "post_processor writes nothing"),
        (
            {
                "post_processor": unigram_json.CLOSED
                | {"single": [{"SpecialToken": {"id": "<unk>", "type_id": 0}}]}
            },
            "post_processor writes <unk>",
        ),
        (
            {"truncation": {"direction": "Left", "max_length": 9}},
            "truncation cuts at the left",
        ),
        ({"normalizer": 5}, "not the settings of a tokenizer"),
        ({"added_tokens": [5]}, "not the settings of a tokenizer"),
        (
            {"added_tokens": [unigram_json.added(8_007, "[QRY]")]},
            "the added tokens have the ids 8007; they must follow the 8,000 pieces",
        ),
        (
            {"added_tokens": [unigram_json.added(7, "</s>")]},
            "token '</s>' has the id 7, and is piece 1",
        ),
        (
            {
                "added_tokens": [unigram_json.added(8_000, "[QRY]")],
                "pre_tokenizer": unigram_json.WORDS,
            },
            r"added tokens \('\[QRY\]'\) and the pre_tokenizer Metaspace",
        ),
    ],
    "added_tokens.json": [
        ({"[QRY]": 9_000}, "the added tokens have the ids 9000"),
        ({"[QRY]": "x"}, "id must be a whole number from 0"),
    ],
    "special_tokens_map.json": [
        ({"eos_token": "<eos>"}, "eos_token is '<eos>'"),
        (
            {"additional_special_tokens": ["[SEP]"]},
            r"names the special token '\[SEP\]', which has an id in no file",
        ),
    ],
    "tokenizer_config.json": [
        ({"cls_token": "[CLS]"}, r"'\[CLS\]', which has an id"),
        ({"eos_token": {"content": "x"}}, "eos_token is 'x'"),
        (
            {"truncation_side": "left"},
            'truncation_side must be one of right or null, not "left"',
        ),
        (
            {"tokenizer_class": "AlbertTokenizer"},
            'tokenizer_class must be the class of a T5 tokenizer or null, not "Albert',
        ),
        ({"tokenizer_class": 5}, "the class of a T5 tokenizer or null, not 5"),
        (
            {"added_tokens_decoder": {"8000": {"content": "  "}}},
            "needs a visible character",
        ),
    ],
}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("name", "values", "message"),
    [(name, *case) for name, cases in REFUSED.items() for case in cases],
)
def test_what_sentencepiece_does_not_is_refused(
    tmp_path, name, values, message, beside
):
    """With or without a `spiece.model`."""
    proto = QUICKSTART.read_bytes()
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram_json.contents(proto)))
    edit(tmp_path / "tokenizer_config.json", model_max_length=512)
    assert tokenizer.read(tmp_path).added_tokens == ()
    if beside:
        (tmp_path / "spiece.model").write_bytes(proto)
    edit(tmp_path / name, **values)
    with pytest.raises(ValueError, match=message) as error:
        tokenizer.read(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_two_vocabularies_side_by_side_are_refused(tmp_path):
    proto = QUICKSTART.read_bytes()
    values = unigram_json.contents(proto)
    values["model"]["vocab"][500][0] = "▁other"
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    (tmp_path / "spiece.model").write_bytes(proto)
    with pytest.raises(ValueError, match=r"piece 500 is '▁other'.*do not belong toget"):
        tokenizer.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(unigram_json.contents(proto, normalizer={"type": "Strip"}))
    )
    with pytest.raises(ValueError, match="not the pieces and the normalizer of spiece"):
        tokenizer.read(tmp_path)


def test_files_that_give_a_token_two_ids_are_refused(tmp_path):
    shutil.copy(QUICKSTART, tmp_path / "spiece.model")
    (tmp_path / "added_tokens.json").write_text('{"[QRY]": 8000}')
    found = tokenizer.read(tmp_path)
    assert found.added_tokens == (vocabularies.AddedToken("[QRY]", 8_000, False, True),)
    decoder = {"8001": {"content": "[QRY]"}}
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=decoder)
    with pytest.raises(ValueError, match=r"id 8000, and 8001 in tokenizer_config"):
        tokenizer.read(tmp_path)


def test_ids_are_compared_with_those_of_the_tokenizers_library(tmp_path, monkeypatch):
    """Ids may differ even if all steps are supported."""
    proto = QUICKSTART.read_bytes()
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram_json.contents(proto)))
    monkeypatch.setattr(
        vocabularies.Vocabulary, "encode", lambda self, texts: [[5]] * 99
    )
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=r"cuts 'a' into \[.*\], and its Sentence"):
        tokenizer.read(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 0),
        ({"tokenizer_config.json": {"model_max_length": 512}}, 100),
        ({"tokenizer_config.json": {"extra_ids": 12}}, 12),
        (
            {
                "tokenizer_config.json": {
                    "added_tokens_decoder": {
                        "0": {"content": "<pad>"},
                        "8000": {"content": "<extra_id_0>"},
                    }
                }
            },
            1,
        ),
        (
            {
                "tokenizer.json": {
                    "added_tokens": [unigram_json.added(8_000, "<extra_id_0>")]
                }
            },
            1,
        ),
    ],
)
def test_sentinels_are_counted(tmp_path, files, expected):
    shutil.copy(QUICKSTART, tmp_path / "spiece.model")
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    found = tokenizer.read(tmp_path)
    assert found == vocabularies.Vocabulary(QUICKSTART.read_bytes(), expected)


def test_pieces_that_are_sentinels_are_not_counted_twice(tmp_path):
    """mT5's SentencePiece model has its own."""
    proto = vocabularies.Vocabulary(QUICKSTART.read_bytes(), 100).full_proto
    (tmp_path / "spiece.model").write_bytes(proto)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer.read(tmp_path).extra_ids == 0


def test_other_tokenizers_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    values = unigram_json.contents(QUICKSTART.read_bytes())
    path.write_text(json.dumps({**values, "model": {"type": "BPE", "vocab": {"a": 1}}}))
    with pytest.raises(ValueError, match="a BPE tokenizer; a T5 encoder needs Unigram"):
        tokenizer.read(tmp_path)
    values = unigram_json.contents(
        QUICKSTART.read_bytes(), normalizer={"type": "Lowercase"}
    )
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="its normalizer has a step Lowercase"):
        tokenizer.read(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json:"):
        tokenizer.read(tmp_path)
