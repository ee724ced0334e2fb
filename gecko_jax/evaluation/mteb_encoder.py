"""A Gecko model as an encoder for `mteb` (its `EncoderProtocol`).

All texts of a call are encoded together, so that they are packed by length and shared
over the mesh. The vectors go through a `vector_store.Store`, so the same task at
another dim encodes nothing.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from gecko_jax.evaluation import instructions, vector_store
from gecko_jax.inference import embedding, ranking
from gecko_jax.text import text_formats

# Column of local tasks: task of each query, and of each passage of a symmetric task.
TASK_COLUMN = "gecko_task"


@dataclasses.dataclass(eq=False)
class Encoder:
    """One model at one dim."""

    gecko: embedding.Gecko  # the model
    vectors: vector_store.Store  # store that the encoders of all dims share
    _: dataclasses.KW_ONLY
    dim: int  # width of the vectors
    name: str  # name of the model and dim in mteb's tables ("organization/model")
    query_length: int  # most tokens of a query of an asymmetric task
    passage_length: int  # most tokens of any other text

    def __post_init__(self):
        self.dim = self.gecko.check_dim(self.dim)

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> Float[np.ndarray, "N E"]:
        """Returns one normalized vector per text, in order.

        The batches have the column `text`, and `title` and `body` for passages.
        `prompt_type` is "query", "document", or None for tasks without sides.
        """
        columns = _gather(inputs)
        made_from = task_metadata.adapted_from or ()
        name, kind = task_metadata.name, task_metadata.type
        instruction = instructions.find(name, kind, made_from)
        own_tasks = columns.get(TASK_COLUMN)
        is_passage = getattr(prompt_type, "value", prompt_type) == "document"
        if is_passage and not instruction.symmetric and not own_tasks:
            return self._encode_passages(columns, name, hf_subset)
        is_short = not is_passage and not instruction.symmetric
        texts = [self._mend(content) for content in columns.get("text", ())]
        full = self.vectors.encode(
            texts,
            side="query",
            task=own_tasks or instruction.task,
            max_length=self.query_length if is_short else self.passage_length,
            description=_describe(name, hf_subset, len(texts)),
        )
        return embedding.cut(full, self.dim)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosine of each pair of a first and a second vector.

        Equal second vectors get equal cosines, so that mteb recognizes ties. Either
        side may be a single vector.
        """
        first, second = np.asarray(embeddings1), np.asarray(embeddings2)
        if second.ndim == 1:
            return first @ second
        distinct, number_of = ranking.distinct_rows(second)
        if len(distinct) == len(second):
            return first @ second.T
        return (first @ second[distinct].T)[..., number_of]

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosine of each first vector with the second in the same row."""
        return np.sum(np.asarray(embeddings1) * np.asarray(embeddings2), axis=-1)

    @functools.cached_property
    def mteb_model_meta(self) -> Any:
        """Model card that mteb stores next to the results."""
        from mteb.models import model_meta

        leaves = jax.tree.leaves(self.gecko.files.params)
        sizes = self.gecko.files.encoder_config
        return model_meta.ModelMeta(
            loader=None,
            name=self.name,
            revision=self.gecko.revision,
            release_date=None,
            languages=None,
            n_parameters=sum(leaf.size for leaf in leaves),
            n_embedding_parameters=sizes.vocab_size * sizes.model_dim,
            memory_usage_mb=sum(leaf.nbytes for leaf in leaves) / 2**20,
            max_tokens=self.passage_length,
            embed_dim=self.dim,
            license=None,  # Unknown: it depends on the weights.
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["JAX"],
            similarity_fn_name=model_meta.ScoringFunction.COSINE,
            use_instructions=True,
            training_datasets=None,
        )

    def _encode_passages(
        self, columns: Mapping[str, list[str]], name: str, subset: str
    ) -> Float[np.ndarray, "N E"]:
        titles = columns.get("title")
        texts = columns.get("body") or columns.get("text") or []
        if titles:  # The title replaces an empty text.
            pairs = zip(texts, titles, strict=True)
            texts = [content if content.strip() else title for content, title in pairs]
            titles = [title[: text_formats.MAX_CHARACTERS // 2] for title in titles]
        full = self.vectors.encode(
            [self._mend(content) for content in texts],
            side="passage",
            titles=titles,
            max_length=self.passage_length,
            description=_describe(name, subset, len(texts)),
        )
        return embedding.cut(full, self.dim)

    def _mend(self, content: str) -> str:
        """Replaces an empty text, and cuts one that is too long.

        `Gecko.encode` rejects both, but the data sets of mteb contain them. The format
        of an imported model may have an empty text for a missing title.
        """
        if not content.strip():
            no_title = self.gecko.files.text_format.no_title
            return no_title if no_title.strip() else text_formats.TextFormat.no_title
        # Half of the limit, because NFC may lengthen a text.
        return content[: text_formats.MAX_CHARACTERS // 2]


def _gather(inputs: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Concatenates the columns of all batches."""
    columns: dict[str, list[str]] = {}
    for batch in inputs:
        for name in ("text", "title", "body", TASK_COLUMN):
            if name in batch:
                columns.setdefault(name, []).extend(batch[name])
    return columns


def _describe(name: str, subset: str, count: int) -> str | None:
    if count < 2_000:  # Too few for a progress bar.
        return None
    return f"Encoding {name}" + (f" {subset}" if subset != "default" else "")
