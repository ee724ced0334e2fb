"""The pretrained sentence-transformers model of `quality.py`: baseline and teacher."""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

# Dims of the teacher's vectors, as many as the ablated encoder has.
DIM = 256
# In the teacher's tokens, for training only: the student reads no more of a text.
LENGTH = 128
_BLOCK = 2_048


def encode(
    name: str, texts: Sequence[str], titles: Sequence[str] = (), length: int = 0
) -> Iterator[Float[np.ndarray, "_ T"]]:
    """Yields the vectors of texts in blocks, with their titles if there are any.

    Args:
        name: Name of the model.
        texts: Texts to encode.
        titles: Titles of the texts, or None.
        length: Largest number of tokens of a text; 0 for the model's own limit.
    """
    from sentence_transformers import SentenceTransformer

    from gecko_jax.io import progress

    model = SentenceTransformer(name)
    model.max_seq_length = length or model.max_seq_length
    titles = titles or [""] * len(texts)
    passages = [f"{t} {x}".strip() for t, x in zip(titles, texts, strict=True)]
    starts = range(0, len(passages), _BLOCK)
    for start in progress.track(starts, f"Encoding by {pathlib.Path(name).name}"):
        yield np.asarray(
            model.encode(passages[start : start + _BLOCK], show_progress_bar=False)
        )


def teach(name: str, path: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the vectors of all texts of a JSONL file, for embedding matching."""
    from gecko_jax.data import teacher_vectors

    texts = list(teacher_vectors.list_texts([path]))
    texts_, titles = [text.text for text in texts], [text.title for text in texts]
    blocks = encode(name, texts_, titles, LENGTH)
    keys = [text.key for text in texts]
    teacher_vectors.write(folder, keys, blocks, made_by=name, dim=DIM)
