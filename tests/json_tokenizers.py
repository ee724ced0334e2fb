"""Small `tokenizer.json` files of the kinds of Gemma and Qwen, for tests."""

import functools
import json
import pathlib

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

import gecko_jax

QUICKSTART = pathlib.Path(gecko_jax.__file__).parent / "quickstart"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Texts on which tokenizers differ.
TEXTS = (
    "",
    " ",
    "a",
    "what is a Gecko? It's a LIZARD!",
    "  leading and trailing  ",
    "tabs\tand\n\nlines\r\nof text",
    "🦎 👩‍👩‍👧 日本語のテキスト 한국어 עברית",
    "cafe\u0301 caf\u00e9 ﬁne ½ \u00a0\u3000x",
    "▁under▁score <0x0A>",
    "the <eos> of <bos> a <pad> text<unk>",
    "a <|endoftext|> <|im_start|>user<|im_end|> <think> <image_soft_token>",
    "1,234,567.89 def f(x):\n    return x**2",
)


def added(number, content, *, special=True):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": special}


def template(opening=(), closing=()):
    """Writes the post-processor for (name, id) pairs around a text."""

    def parts(pairs):
        return [{"SpecialToken": {"id": name, "type_id": 0}} for name, _ in pairs]

    single = [
        *parts(opening),
        {"Sequence": {"id": "A", "type_id": 0}},
        *parts(closing),
    ]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            name: {"id": name, "ids": [number], "tokens": [name]}
            for name, number in (*opening, *closing)
        },
    }


def _trained(normalizer, words, alphabet=()):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = words
    lines = (QUICKSTART / "corpus.jsonl").read_text("utf-8").splitlines()[:400]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=list(alphabet),
        limit_alphabet=300,
    )
    tokenizer.train_from_iterator([json.loads(line)["text"] for line in lines], trainer)
    return json.loads(tokenizer.to_str())


@functools.cache
def _gemma():
    values = _trained(
        normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")
    )
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*first, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in values["model"]["vocab"] if piece not in pieces]
    values["model"] |= {
        "vocab": {piece: number for number, piece in enumerate(pieces)},
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
    }
    values["added_tokens"] = [added(n, name) for n, name in enumerate(first)]
    # As in Gemma 3: an id after the rows of a text encoder's embedding table.
    values["added_tokens"].append(added(len(pieces), "<image_soft_token>"))
    values["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    return json.dumps(values, ensure_ascii=False)


@functools.cache
def _qwen():
    values = _trained(
        normalizers.NFC(),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        pre_tokenizers.ByteLevel.alphabet(),
    )
    # "!" has the id 0, and padding another id, as in Qwen.
    assert values["model"]["vocab"]["!"] == 0
    size = len(values["model"]["vocab"])
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    values["added_tokens"] = [added(size + n, name) for n, name in enumerate(special)]
    values["added_tokens"].append(added(size + 3, "<think>", special=False))
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    level["trim_offsets"] = False
    values |= {"decoder": level, "post_processor": level}
    return json.dumps(values, ensure_ascii=False)


CONFIGS = {
    "gemma": {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    },
    "qwen": {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 64,
    },
}


def base(kind):
    """Returns the contents of a base model's file, which does not end texts."""
    values = json.loads({"gemma": _gemma, "qwen": _qwen}[kind]())
    if kind == "gemma":
        values["post_processor"] = template([("<bos>", 2)])
    return values


def closed(kind):
    """Returns the contents of an embedding model's file, which ends texts."""
    values = base(kind)
    if kind == "gemma":
        values["post_processor"] = template([("<bos>", 2)], [("<eos>", 1)])
    else:
        end = values["added_tokens"][0]
        steps = [values["post_processor"], template((), [(end["content"], end["id"])])]
        values["post_processor"] = {"type": "Sequence", "processors": steps}
    return values


def to_bytes(values):
    return json.dumps(values, ensure_ascii=False).encode()


def write(folder, kind, values=None):
    """Writes the files of a tokenizer; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(to_bytes(values or closed(kind)))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIGS[kind]))
    return folder
