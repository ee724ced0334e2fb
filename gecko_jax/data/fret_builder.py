"""The triples of `gecko fret run` or `relabel` as a TFDS data set.

    builder = fret_builder.build("runs/fret/export", "~/tensorflow_datasets")
    builder.as_dataset(split="train")          tfds.load("gecko_fret") reads it, too

The features are the fields of the exported lines. Missing ones are "", [], NaN (scores)
or -1 (`seed`, `moved`). The description is the export's card, with generator, prompts,
counts and licences.
"""

import functools
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gecko_jax.data import jsonl
from gecko_jax.io import reading

# File names of `gecko fret run`; the triples may be compressed.
TRIPLES, CARD = ("fret.jsonl", "fret.jsonl.gz"), "README.md"

_LISTS = (
    *("negatives", "negative_titles"),
    *("negative_sources", "negative_source_ids", "negative_licences"),
)
_TEXTS = (
    *("task", "query", "positive", "title", "task_description", "generator", "prompt"),
    *("source", "source_id", "licence"),
    *("seed_source", "seed_source_id", "seed_licence", "judge"),
)
_NUMBERS = ("seed", "moved")
# Of every candidate, with `export.candidates`.
_CANDIDATE_TEXTS = ("title", "text", "source", "source_id", "licence", "part")
_CANDIDATE_SCORES = ("ql", "rc", "rrf")
_CITATION = """@article{lee2024gecko,
  title={Gecko: Versatile Text Embeddings Distilled from Large Language Models},
  author={Lee, Jinhyuk and others},
  journal={arXiv:2403.20327},
  year={2024}
}"""


def build(export: str | os.PathLike, data_dir: str | os.PathLike) -> Any:
    """Writes the data set, unless it exists; returns its TFDS builder.

    `export` is the folder WORKDIR/export of `gecko fret run`, `data_dir` that of TFDS's
    sets. Raises ValueError if the folder is not a finished export, a line is invalid,
    or `data_dir` has the triples of another export.
    """
    export = pathlib.Path(export)
    triples = next((export / n for n in TRIPLES if (export / n).is_file()), None)
    if triples is None or not (export / CARD).is_file():
        missing = CARD if triples else TRIPLES[0]
        raise ValueError(
            f"{export}: it has no {missing}; give the folder `export` of a finished "
            "`gecko fret run`"
        )
    digest = reading.sha256(triples)
    data_dir = str(pathlib.Path(data_dir).expanduser())
    builder = _builder_class()(triples=str(triples), data_dir=data_dir)
    builder.download_and_prepare()
    stored = builder.info.metadata["sha256"]
    if stored != digest:
        raise ValueError(
            f"{builder.data_dir}: holds other triples (sha256 {stored[:12]}, not "
            f"{digest[:12]}); remove it, or choose another data_dir"
        )
    return builder


@functools.cache
def _builder_class() -> Any:
    """Returns the builder class; `tfds.load` does not need it to read the set."""
    import tensorflow_datasets as tfds

    class GeckoFret(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Triples distilled from a language model (section 3.2)."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, *, triples: str = "", **options: Any):
            self._triples = pathlib.Path(triples)
            super().__init__(**options)

        def _info(self) -> Any:
            text, score = tfds.features.Text(), tfds.features.Scalar(np.float32)
            candidate = dict.fromkeys(_CANDIDATE_TEXTS, text)
            candidate |= dict.fromkeys(_CANDIDATE_SCORES, score)
            return self.dataset_info_from_configs(
                description=(self._triples.parent / CARD).read_text(encoding="utf-8"),
                features=tfds.features.FeaturesDict(
                    {
                        **dict.fromkeys(_TEXTS, text),
                        **{name: tfds.features.Sequence(text) for name in _LISTS},
                        **dict.fromkeys(_NUMBERS, tfds.features.Scalar(np.int64)),
                        "scores": tfds.features.Sequence(score),
                        "candidates": tfds.features.Sequence(candidate),
                    }
                ),
                supervised_keys=("query", "positive"),
                citation=_CITATION,
                metadata=tfds.core.MetadataDict(sha256=reading.sha256(self._triples)),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {"train": self._generate_examples(self._triples)}

        def _generate_examples(
            self, path: pathlib.Path
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            for number, (_, record, _) in enumerate(jsonl.read_lines(path)):
                example: dict[str, Any] = _texts_of(record, _TEXTS)
                example |= {name: list(record.get(name, ())) for name in _LISTS}
                example |= {name: int(record.get(name, -1)) for name in _NUMBERS}
                example["scores"] = [
                    math.nan if score is None else score
                    for score in record.get("scores", ())
                ]
                example["candidates"] = [
                    {
                        **_texts_of(candidate, _CANDIDATE_TEXTS),
                        **{n: candidate.get(n, math.nan) for n in _CANDIDATE_SCORES},
                    }
                    for candidate in record.get("candidates", ())
                ]
                yield number, example

    return GeckoFret


def _texts_of(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    return {name: str(record.get(name, "")) for name in names}
