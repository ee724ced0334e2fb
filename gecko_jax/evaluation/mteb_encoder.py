"""Encoder: a Gecko as `mteb` asks for it (its `EncoderProtocol`).

mteb hands over the texts of a task in a torch DataLoader and takes vectors back. All
texts of a call are encoded together, so that they are packed by length and shared over
the mesh, and go through a `store.Store`: the same task at another dim encodes nothing.
Neither mteb nor torch is imported here before mteb itself asks for the model's card.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from gecko_jax.evaluation import instructions, vector_store
from gecko_jax.inference import embedding, ranking
from gecko_jax.text import text_formats

# Column of our local tasks: the task of each query, or of each passage when it is
# written as a query.
TASK_COLUMN = "gecko_task"

# Calls with fewer new texts show no progress.
_SHOW_PROGRESS = 2_000


class Encoder:
    """One model at one dim.

    Attributes:
        dim: Entries of the vectors.
        name: Of the model and the dim, as mteb's tables show it.
    """

    def __init__(
        self,
        gecko: embedding.Gecko,
        vectors: vector_store.Store,
        *,
        dim: int,
        name: str,
        query_length: int,
        passage_length: int,
    ):
        """Takes the parts; encodes nothing.

        Args:
            gecko: The model.
            vectors: Of the model; the encoders of its dims share it.
            dim: One that was trained.
            name: "organization/model", a name of its own for each dim.
            query_length: Tokens that queries of asymmetric tasks are cut to.
            passage_length: Tokens that all other texts are cut to.
        """
        self.dim = gecko.check_dim(dim)
        self.name = name
        self._gecko = gecko
        self._vectors = vectors
        self._query_length = query_length
        self._passage_length = passage_length

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

        Args:
            inputs: Batches with the column `text`, and `title` and `body` for passages.
            task_metadata: mteb's facts about the task; says the instruction.
            hf_split: Split of the data; shown.
            hf_subset: Subset of the data, often a language; shown.
            prompt_type: "query", "document", or None where there are no sides.
            **kwargs: mteb's batch size and progress bar, which are not used.
        """
        columns = _gather(inputs)
        instruction = instructions.find(
            task_metadata.name, task_metadata.type, task_metadata.adapted_from or ()
        )
        own_tasks = columns.get(TASK_COLUMN)
        is_passage = getattr(prompt_type, "value", prompt_type) == "document"
        if is_passage and not instruction.symmetric and not own_tasks:
            return self._encode_passages(columns, task_metadata.name, hf_subset)
        is_short = not is_passage and not instruction.symmetric
        texts = [self._mend(content) for content in columns.get("text", ())]
        tasks = np.array(own_tasks or [instruction.task] * len(texts))
        vectors = np.empty((len(texts), self.dim), np.float32)
        for task in np.unique(tasks).tolist():
            members = np.flatnonzero(tasks == task)
            full = self._vectors.encode(
                [texts[m] for m in members],
                side="query",
                task=task,
                max_length=self._query_length if is_short else self._passage_length,
                description=_describe(task_metadata.name, hf_subset, len(members)),
            )
            vectors[members] = embedding.cut(full, self.dim)
        return vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosine of every first with every second vector.

        Equal second vectors get equal cosines, so that mteb sees the tie.
        """
        second = np.asarray(embeddings2)
        first, number_of = ranking.distinct_rows(second)
        if len(first) == len(second):
            return np.asarray(embeddings1) @ second.T
        return (np.asarray(embeddings1) @ second[first].T)[:, number_of]

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosine of each first vector with the second in its place."""
        return np.sum(np.asarray(embeddings1) * np.asarray(embeddings2), axis=-1)

    @functools.cached_property
    def mteb_model_meta(self) -> Any:
        """The model's card, as mteb stores it beside the results."""
        from mteb.models import model_meta

        leaves = jax.tree.leaves(self._gecko.files.params)
        sizes = self._gecko.files.encoder_config
        return model_meta.ModelMeta(
            loader=None,
            name=self.name,
            revision=self._gecko.revision,
            release_date=None,
            languages=None,
            n_parameters=sum(leaf.size for leaf in leaves),
            n_embedding_parameters=sizes.vocab_size * sizes.model_dim,
            memory_usage_mb=sum(leaf.nbytes for leaf in leaves) / 2**20,
            max_tokens=self._passage_length,
            embed_dim=self.dim,
            license=None,  # That of the weights is known to who trained them.
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
        if titles:  # A passage with nothing but a title is its title.
            texts = [
                content if content.strip() else title
                for content, title in zip(texts, titles, strict=True)
            ]
        full = self._vectors.encode(
            [self._mend(content) for content in texts],
            side="passage",
            titles=[t[: text_formats.MAX_CHARACTERS // 2] for t in titles]
            if titles
            else None,
            max_length=self._passage_length,
            description=_describe(name, subset, len(texts)),
        )
        return embedding.cut(full, self.dim)

    def _mend(self, content: str) -> str:
        """Fills in an empty text, which some data sets have, and cuts an endless one.

        Gecko refuses both, but here nobody can mend the data. The text format of an
        imported model may have no word for a missing title.
        """
        if not content.strip():
            no_title = self._gecko.files.text_format.no_title
            return no_title if no_title.strip() else text_formats.TextFormat.no_title
        # Half: NFC may make a text longer.
        return content[: text_formats.MAX_CHARACTERS // 2]


def _gather(inputs: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Joins the columns of all batches."""
    columns: dict[str, list[str]] = {}
    for batch in inputs:
        for name in ("text", "title", "body", TASK_COLUMN):
            if name in batch:
                columns.setdefault(name, []).extend(batch[name])
    return columns


def _describe(name: str, subset: str, count: int) -> str | None:
    if count < _SHOW_PROGRESS:
        return None
    return f"Encoding {name}" + (f" {subset}" if subset != "default" else "")
