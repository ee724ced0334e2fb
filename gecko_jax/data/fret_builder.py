"""The triples of `gecko fret run` as a TFDS data set.

    builder = fret_builder.build("runs/fret/export", "~/tensorflow_datasets")
    builder.as_dataset(split="train")          tfds.load("gecko_fret") reads it, too

The features are the fields of the exported lines, with "" or [] for missing ones. The
description is the export's card, with generator, prompts, counts and licences.
"""

import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from gecko_jax.data import jsonl
from gecko_jax.io import reading

# File names of `gecko fret run`.
TRIPLES, CARD = "fret.jsonl", "README.md"

_LISTS = (
    *("negatives", "negative_titles"),
    *("negative_sources", "negative_source_ids", "negative_licences"),
)
_TEXTS = (
    *("task", "query", "positive", "title", "task_description", "generator", "prompt"),
    *("source", "source_id", "licence"),
    *("seed_source", "seed_source_id", "seed_licence"),
)
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
    for name in (TRIPLES, CARD):
        if not (export / name).is_file():
            raise ValueError(
                f"{export}: it has no {name}; give the folder `export` of a finished "
                "`gecko fret run`"
            )
    digest = reading.sha256(export / TRIPLES)
    data_dir = str(pathlib.Path(data_dir).expanduser())
    builder = _builder_class()(export=str(export), data_dir=data_dir)
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

        def __init__(self, *, export: str = "", **options: Any):
            self._export = pathlib.Path(export)
            super().__init__(**options)

        def _info(self) -> Any:
            text = tfds.features.Text()
            features = {
                **dict.fromkeys(_TEXTS, text),
                **{name: tfds.features.Sequence(text) for name in _LISTS},
                "seed": tfds.features.Scalar(np.int64),
            }
            digest = reading.sha256(self._export / TRIPLES)
            return self.dataset_info_from_configs(
                description=(self._export / CARD).read_text(encoding="utf-8"),
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("query", "positive"),
                citation=_CITATION,
                metadata=tfds.core.MetadataDict(sha256=digest),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {"train": self._generate_examples(self._export / TRIPLES)}

        def _generate_examples(
            self, path: pathlib.Path
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            for number, (_, record, _) in enumerate(jsonl.read_lines(path)):
                texts = {name: str(record.get(name, "")) for name in _TEXTS}
                lists = {name: list(record.get(name, ())) for name in _LISTS}
                seed = int(record.get("seed", -1))
                yield number, {**texts, **lists, "seed": seed}

    return GeckoFret
