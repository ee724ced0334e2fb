"""The same model in sentence-transformers: T5 encoder, mean, Dense, Normalize."""

import pathlib

import torch
import transformers
from sentence_transformers import SentenceTransformer, models

from gecko_jax.models import dual_encoder


def build(
    config: dual_encoder.EncoderConfig,
    vocabulary: pathlib.Path,
    length: int,
    folder: str,
) -> SentenceTransformer:
    """Returns a fresh model of these sizes with the same vocabulary.

    Args:
        config: Sizes of the encoder.
        vocabulary: SentencePiece model.
        length: Largest number of tokens of a text.
        folder: Folder to which the modules are written for sentence-transformers.
    """
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.model_dim,
            d_kv=config.head_dim,
            d_ff=config.mlp_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=config.dropout_rate,
        )
    )
    t5.save_pretrained(folder)
    tokenizer = transformers.T5Tokenizer.from_pretrained(
        _tokenizer_folder(vocabulary, folder), extra_ids=0
    )
    tokenizer.save_pretrained(folder)
    return SentenceTransformer(
        modules=[
            models.Transformer(folder, max_seq_length=length),
            models.Pooling(config.model_dim, pooling_mode="mean"),
            models.Dense(
                config.model_dim,
                config.embedding_dim,
                bias=False,
                activation_function=torch.nn.Identity(),
            ),
            models.Normalize(),
        ],
        device="cpu",
    )


def _tokenizer_folder(vocabulary: pathlib.Path, folder: str) -> str:
    target = pathlib.Path(folder) / "spiece.model"
    target.write_bytes(vocabulary.read_bytes())
    return folder
