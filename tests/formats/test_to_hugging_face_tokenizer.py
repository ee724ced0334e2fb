"""The exported Hugging Face tokenizer gives the ids of our vocabulary."""

import itertools
import json
import pathlib
import unicodedata

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies

from gecko_jax.formats import to_hugging_face_tokenizer
from gecko_jax.text import text_formats, vocabularies

QUICKSTART = pathlib.Path(__file__).parents[2] / "gecko_jax" / "quickstart"

# What SentencePiece, Unicode and the usual converters disagree about.
HARD = [
    "a",
    " \t two  spaces\n and a line ",
    "\x1c\u2028\u3000wide\u00a0space",
    "</s><pad><unk> <0x41>",
    "<extra_id_0> x<extra_id_1> <extra_id_99>",
    "e\u0301 \u1100\u1161\u11a8 か\u3099",
    "½\u0301 ﬁ\u0301 ㎍ ①②",
    "👨‍👩‍👧 🇫🇷 漢字かな",
    "▁▁a▁ b▁",
    "\u200b\u200d\ufeff\u00adx",
    "\x00\x01\x7f",
    "\u0301",
    "a < b <c> 1 <2",
    "\u0600a \u0e33",
]

WORDS = [*HARD, "task: search result | query: ", "title: none | text: ", " ", "é", "<"]


@pytest.fixture(scope="module", params=[0, 100])
def pair(request):
    vocab = vocabularies.load(QUICKSTART / "vocabulary.model", request.param)
    contents = to_hugging_face_tokenizer.build_tokenizer(vocab)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(contents))
    tokenizer.encode_special_tokens = True  # `split_special_tokens`
    return vocab, tokenizer


def _assert_equal_ids(pair, texts):
    vocab, tokenizer = pair
    expected = vocab.encode([text_formats.clean(t) for t in texts])
    found = tokenizer.encode_batch(list(texts))
    for t, want, got in zip(texts, expected, found, strict=True):
        assert got.ids == want, ascii(t)


def test_ids_are_equal_on_every_text_of_the_corpus(pair):
    texts = []
    for name in ("corpus", "queries", "train"):
        for line in (QUICKSTART / f"{name}.jsonl").read_text().splitlines():
            record = json.loads(line)
            texts += [record[key] for key in ("text", "positive") if key in record]
    assert len(texts) > 5_000
    _assert_equal_ids(pair, texts)


def test_ids_are_equal_on_hard_texts(pair):
    _assert_equal_ids(pair, HARD)
    _assert_equal_ids(pair, [f"title: none | text: {t}" for t in HARD])


def _is_known_to_differ(t):
    """The known differences: letter and accent, new accents, a sentinel with ▁."""
    cleaned = text_formats.clean(t)
    return "▁<extra_id" in cleaned or any(
        unicodedata.combining(second)
        and (unicodedata.normalize("NFKC", a) != a or unicodedata.combining(a))
        for a, second in itertools.pairwise(cleaned)
    )


@hypothesis.given(
    strategies.lists(
        strategies.one_of(strategies.sampled_from(WORDS), strategies.text(max_size=6)),
        min_size=1,
        max_size=8,
    ).map("".join)
)
@hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
def test_ids_are_equal_on_any_text(pair, t):
    hypothesis.assume(t.strip() and not _is_known_to_differ(t))
    _assert_equal_ids(pair, [t])


def test_the_difference_that_is_left_is_the_one_documented(pair):
    vocab, tokenizer = pair
    fullwidth_a_with_accent = "\uff41\u0301"
    assert (
        tokenizer.encode(fullwidth_a_with_accent).ids
        != (vocab.encode([fullwidth_a_with_accent])[0])
    )


def test_nothing_but_spaces_is_nothing(pair):
    _, tokenizer = pair
    assert tokenizer.encode(" \n").ids == [vocabularies.EOS_ID]


def test_ids_become_text_again(pair):
    vocab, tokenizer = pair
    (ids,) = vocab.encode(["a < b 漢 </s>"])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a < b 漢 </s>"


@pytest.mark.torch
def test_hugging_face_opens_it_and_closes_texts_when_it_cuts(pair, tmp_path):
    import transformers

    vocab, _ = pair
    to_hugging_face_tokenizer.write_tokenizer(tmp_path, vocab, 6)
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(opened) == vocab.size
    assert (opened.pad_token_id, opened.eos_token_id) == (0, 1)
    assert opened.model_max_length == 6
    texts = ["one two three four five six seven", "</s> a", *HARD]
    found = opened(texts, truncation=True).input_ids
    assert found == vocab.encode([text_formats.clean(t) for t in texts], 6)
    opened.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(texts, truncation=True).input_ids == found


def test_another_kind_of_model_is_refused():
    from sentencepiece import sentencepiece_model_pb2

    model_class = vars(sentencepiece_model_pb2)["ModelProto"]
    proto = model_class.FromString((QUICKSTART / "vocabulary.model").read_bytes())
    proto.trainer_spec.model_type = 2  # byte-pair encoding
    vocab = vocabularies.Vocabulary(proto.SerializeToString())
    with pytest.raises(ValueError, match=r"not a unigram model.*--to=t5x"):
        to_hugging_face_tokenizer.build_tokenizer(vocab)
