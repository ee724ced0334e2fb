"""`tokenizer.json` files for tests, as transformers' converter writes them."""

import base64

from sentencepiece import sentencepiece_model_pb2

WORDS = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
CLOSED = {
    "type": "TemplateProcessing",
    "single": [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
    "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
}


def added(number, content, **options):
    defaults = {"single_word": False, "lstrip": False, "rstrip": False}
    defaults |= {"normalized": True, "special": False}
    return {"id": number, "content": content, **defaults, **options}


def contents(proto, extra_ids=0, *, normalizer=None):
    """Writes the output of transformers' converter."""
    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    vocab = [[piece.piece, piece.score] for piece in model.pieces]
    vocab += [[f"<extra_id_{n}>", 0.0] for n in reversed(range(extra_ids))]
    charsmap = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    return {
        "added_tokens": [
            added(number, name, normalized=False, special=True)
            for number, name in enumerate(["<pad>", "</s>", "<unk>"])
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, WORDS],
        },
        "post_processor": CLOSED,
        "normalizer": normalizer
        or {
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": charsmap},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            ],
        },
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "vocab": vocab,
            "byte_fallback": model.trainer_spec.byte_fallback,
        },
    }
