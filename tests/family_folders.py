"""Small random folders of the newer families, written by their own libraries."""

import json_tokenizers

from gecko_jax.text import text_formats

VOCAB_SIZE = 960
WEB = "Given a web search query, retrieve relevant passages that answer the query"
GEMMA_PROMPTS = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
    "Clustering": "task: clustering | query: ",
    "Retrieval-document": "title: none | text: ",
    "STS": "task: sentence similarity | query: ",
}
QWEN_PROMPTS = {"query": f"Instruct: {WEB}\nQuery:", "document": ""}
# One is longer than the local windows, and than the longest text; one is not clean.
TEXTS = [
    "what do geckos eat",
    "Arrays of any built-in type can be created: 漢字, café, 🦎. " * 8,
    "  def f(x):\n\treturn x**2  # <square> ",
    "a",
]
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
LOCAL = {"num_hidden_layers": 3, "sliding_window": 8, "sliding_window_pattern": 3}
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def write_tokenizer(folder, family):
    """Writes a tokenizer like Gemma's or Qwen's, trained on the bundled corpus."""
    json_tokenizers.write(folder, "qwen" if family == "qwen3" else "gemma")


def build(family):
    """Returns a random model of transformers, in evaluation mode."""
    import torch
    import transformers

    torch.manual_seed(0)
    gemma = {**SIZES, **LOCAL, "query_pre_attn_scalar": 16}
    if family == "gemma":
        model = transformers.Gemma3TextModel(
            transformers.Gemma3TextConfig(**gemma, use_bidirectional_attention=True)
        )
    elif family == "t5gemma2":
        text = gemma | {"rope_parameters": LINEAR}
        vision = {
            "model_type": "siglip_vision_model",
            **dict.fromkeys(("hidden_size", "intermediate_size"), 8),
            **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1),
            **{"image_size": 28, "patch_size": 14, "vision_use_head": False},
        }
        encoder = {"text_config": text, "vision_config": vision}
        encoder |= {"mm_tokens_per_image": 4}
        model = transformers.T5Gemma2ForConditionalGeneration(
            transformers.T5Gemma2Config(
                encoder=encoder,
                decoder=text,
                image_token_index=VOCAB_SIZE - 2,
                eoi_token_index=VOCAB_SIZE - 1,
            )
        )
    elif family == "embeddinggemma2":
        model = transformers.EmbeddingGemma2TextModel(
            transformers.EmbeddingGemma2TextConfig(
                **SIZES | LOCAL | {"sliding_window": 5},
                global_head_dim=24,
                num_global_key_value_heads=1,
                hidden_size_per_layer_input=12,
                embedding_dim=24,
            )
        )
    else:
        config = transformers.Qwen3Config(**SIZES, num_hidden_layers=2)
        model = transformers.Qwen3Model(config)
    # The initial weights make nearly a bag of words.
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim == 2 and "embed_tokens" not in name:
                weights.normal_(0, 1.5 * weights.shape[1] ** -0.5)
            elif "norm" in name:
                weights.add_(torch.randn_like(weights) * 0.2)
    return model.eval()


def write_hugging_face(folder, family, **settings):
    """Writes a Hugging Face folder: weights and tokenizer."""
    model = build(family)
    model.save_pretrained(folder, **settings)
    write_tokenizer(folder, family)
    return model


def write_sentence_transformers(folder, family, **settings):
    """Writes a folder as the published ones, and returns the opened model."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(1)
    plain = folder.parent / f"{folder.name}-plain"
    write_hugging_face(plain, family)
    width = 24 if family == "embeddinggemma2" else SIZES["hidden_size"]
    pooling = "lasttoken" if family == "qwen3" else "mean"
    identity = {"bias": False, "activation_function": torch.nn.Identity()}
    two = [Dense(width, 64, **identity), Dense(64, 28, **identity)]
    model = SentenceTransformer(
        modules=[
            Transformer(str(plain), max_seq_length=64),
            Pooling(width, pooling_mode=pooling),
            *(two if family == "gemma" else []),
            Normalize(),
        ],
        prompts=QWEN_PROMPTS if family == "qwen3" else GEMMA_PROMPTS,
        device="cpu",
        **settings,
    )
    model.save_pretrained(str(folder))
    return model


TASKS = {
    "query": text_formats.DEFAULT_TASK,
    "Clustering": "Clustering",
    "STS": "STS",
}
