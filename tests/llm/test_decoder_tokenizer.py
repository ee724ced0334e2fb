import json

import pytest

from gecko_jax.llm import decoder_tokenizer
from tests import tiny_decoder

TEXTS = [
    "the cat",
    " the  cat\n\n",
    "2026 cats",
    "naïve 日本語 🦎",
    "it's <|im_end|> x",
]


def _setting(header):
    def setting(key, default=None):
        return header.get(key.removeprefix("tokenizer.ggml."), default)

    return setting


@pytest.fixture(name="bpe")
def _bpe():
    pieces, merges = tiny_decoder.pieces()
    header = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": pieces,
        "token_type": [3, 3] + [1] * (len(pieces) - 2),
        "merges": merges,
        "eos_token_id": 1,
        "add_bos_token": False,
    }
    return header


def _sentencepiece_header():
    words = ["▁the", "▁cat", "▁", "th", "he", "▁t", "the", "ca", "cat", "▁ca"]
    words += sorted(set("thecats2"))
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_end|>", "  ", "\n"]
    kinds = [3, 3, 3, 3, 3, 4, 4]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*pieces, *byte_pieces, *words]
    return {
        "model": "llama",
        "tokens": tokens,
        "token_type": kinds + [6] * 256 + [1] * len(words),
        "scores": [0.0] * 263 + [-float(n) for n in range(len(words))],
        "add_space_prefix": False,
        "add_bos_token": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_from_its_tokens(text, bpe):
    for header in (bpe, _sentencepiece_header()):
        tokenizer = decoder_tokenizer.from_gguf(_setting(header), "x")
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        # What looks like a control token is plain text.
        assert not set(tokens) & tokenizer.end_ids


def test_bpe_merges_words_and_cuts_every_digit(bpe):
    tokenizer = decoder_tokenizer.from_gguf(_setting(bpe), "x")
    pieces = bpe["tokens"]
    found = [pieces[token] for token in tokenizer.encode("cat the 20")]
    assert found == ["cat", "Ġthe", "Ġ", "2", "0"]


def test_sentencepiece_keeps_runs_of_spaces_as_their_own_piece():
    header = _sentencepiece_header()
    tokenizer = decoder_tokenizer.from_gguf(_setting(header), "x")
    found = [header["tokens"][token] for token in tokenizer.encode("cat  the")]
    assert found == ["cat", "  ", "the"]


def test_only_prompts_begin_with_the_begin_token(bpe):
    tokenizer = decoder_tokenizer.from_gguf(_setting(_sentencepiece_header()), "x")
    assert tokenizer.encode("cat", begin=True) == [2, *tokenizer.encode("cat")]
    without = decoder_tokenizer.from_gguf(_setting(bpe), "x")
    assert without.encode("cat", begin=True) == without.encode("cat")


def test_a_control_token_ends_the_text(bpe):
    tokenizer = decoder_tokenizer.from_gguf(_setting(bpe), "x")
    tokens = tokenizer.encode("cat")
    assert tokenizer.decode([*tokens, 1, *tokens]) == "cat"


def test_unknown_kinds_are_refused(bpe):
    with pytest.raises(ValueError, match=r"'llama-bpe'.*smollm.*tokenizer\.json"):
        decoder_tokenizer.from_gguf(_setting(bpe | {"pre": "llama-bpe"}), "x")
    with pytest.raises(ValueError, match="model 'bert'"):
        decoder_tokenizer.from_gguf(_setting(bpe | {"model": "bert"}), "x")


def test_half_a_surrogate_pair_is_refused(bpe):
    tokenizer = decoder_tokenizer.from_gguf(_setting(bpe), "x")
    with pytest.raises(ValueError, match=r"not Unicode .* at character 2"):
        tokenizer.encode("ca\ud800t")


def test_a_folder_s_tokenizer_says_itself_what_a_prompt_begins_with(tmp_path, bpe):
    import tokenizers

    vocab = {piece: number for number, piece in enumerate(bpe["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in bpe["merges"]]
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    built.save(str(tmp_path / "tokenizer.json"))
    tokenizer = decoder_tokenizer.from_folder(tmp_path)
    assert tokenizer.end_ids == {0, 1}
    assert tokenizer.encode("cat", begin=True) == [0, vocab["cat"]]
    text = "the <|im_end|> cat"
    assert not set(tokenizer.encode(text)) & {0, 1}
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_damaged_tokenizer_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        decoder_tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        decoder_tokenizer.from_folder(tmp_path)


@pytest.mark.torch
@pytest.mark.parametrize("text", [*TEXTS, "I'M x²  \r\n\t 't12.5!?\n\n z", "e\u0301"])
def test_qwen_s_words_are_those_of_transformers(text, bpe):
    import transformers

    vocab = {piece: number for number, piece in enumerate(bpe["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in bpe["merges"]]
    original = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer = decoder_tokenizer.from_gguf(_setting(bpe | {"pre": "qwen2"}), "x")
    expected = original.encode(text, split_special_tokens=True)
    assert tokenizer.encode(text) == expected
