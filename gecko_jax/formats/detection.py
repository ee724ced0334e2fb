"""Detects the format of a model source, and opens it.

    open_model("gs://bucket/t5x/checkpoint_1000", vocabulary="t5.model", extra_ids=100)
    open_model("google/flan-t5-base")
    open_model("runs/finetune")

A source is a training workdir or model folder, the name of a bundled model
(`pretrained`), a T5X checkpoint (its folder, or the `model_dir` that holds several), a
Hugging Face or sentence-transformers folder, or the name of one of these on the hub.
`docs/checkpoints.md` shows a command for each.
"""

import dataclasses
import enum
import pathlib
from collections.abc import Sequence

import jax

from gecko_jax.formats import (
    from_hugging_face,
    from_sentence_transformers,
    from_t5x,
    hub,
    imported_models,
    kvstores,
    model_folder,
    parameters,
    pretrained,
    safetensors_files,
)
from gecko_jax.models import dual_encoder
from gecko_jax.text import vocabularies


class Format(enum.Enum):
    """Format of a source; the value is its name in messages."""

    GECKO = "gecko_jax"
    T5X = "T5X"
    HUGGING_FACE = "Hugging Face"
    SENTENCE_TRANSFORMERS = "sentence-transformers"


def open_model(
    source: str | pathlib.Path,
    *,
    vocabulary: str | pathlib.Path | None = None,
    extra_ids: int = 0,
    query_length: int | None = None,
    passage_length: int | None = None,
    mrl_dims: Sequence[int] = (),
    relpos_max_distance: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> model_folder.ModelFiles:
    """Opens a model of any format; its parameters are read later, one at a time.

    Reading a parameter that is not finite raises a ValueError that names it. Also
    raises one for an unknown format, damage, and parts that do not fit together.

    Args:
        source: A path, a URL or a hub name.
        vocabulary: SentencePiece file, for a source that has none.
        extra_ids: Number of sentinels after its pieces (T5: 100).
        query_length: Longest query in tokens; None takes the source's, or 512.
        passage_length: Longest passage in tokens; None takes the source's, or 512.
        mrl_dims: Prefixes that the model was trained for, in addition to those that
            the source names.
        relpos_max_distance: Distance in tokens from which the relative bias is
            constant, which T5X does not store; None takes T5's 128.
        mesh: Mesh for the parameters of a training workdir.
    """
    source = str(source)
    source_format, place = find_format(source)
    is_gecko = source_format is Format.GECKO
    if relpos_max_distance is not None and source_format is not Format.T5X:
        raise ValueError(
            f"--relpos-max-distance={relpos_max_distance}: {source} is a "
            f"{source_format.value} model, which holds the distance; leave it out"
        )
    for flag, value in (("vocabulary", vocabulary), ("mrl-dims", mrl_dims)):
        if is_gecko and value:
            raise ValueError(f"{source}: a Gecko model has its own; leave --{flag} out")
    vocab = None if vocabulary is None else _load_vocabulary(vocabulary, extra_ids)
    if is_gecko:
        opened = model_folder.open_model(place, mesh)
    elif source_format is Format.T5X:
        opened = imported_models.open_t5x(place, vocab, extra_ids, relpos_max_distance)
    else:
        opened = imported_models.open_hugging_face(
            pathlib.Path(place),
            vocab,
            has_modules=source_format is Format.SENTENCE_TRANSFORMERS,
            is_length_given=bool(query_length and passage_length),
        )
    lengths = {"query_length": query_length, "passage_length": passage_length}
    opened = dataclasses.replace(
        opened, **{key: value for key, value in lengths.items() if value}
    )
    if is_gecko:
        return opened
    largest = opened.mrl_dims[-1]
    if any(dim > largest for dim in mrl_dims):
        raise ValueError(
            f"--mrl-dims={','.join(map(str, mrl_dims))}: {source} has {largest} dims; "
            "name smaller ones"
        )
    dims = tuple(sorted({*opened.mrl_dims, *mrl_dims}))
    _check_relative_bias(opened.encoder_config, source)
    parameters.check(
        opened.params,
        opened.encoder_config,
        source=source,
        remedy="the files are damaged, or do not belong together",
    )
    imported = {"source": source, "format": source_format.value}
    return dataclasses.replace(
        opened,
        params=model_folder.require_finite(opened.params),
        mrl_dims=dims,
        provenance={**opened.provenance, "imported": imported},
    )


def _load_vocabulary(
    path: str | pathlib.Path, extra_ids: int
) -> vocabularies.Vocabulary:
    if not kvstores.is_remote(str(path)):
        return vocabularies.load(path, extra_ids)
    folder, _, name = str(path).rpartition("/")
    proto = kvstores.Folder(folder).read(name)
    if proto is None:
        raise ValueError(f"{path}: no such vocabulary; check the address")
    return vocabularies.build(proto, extra_ids)


def _check_relative_bias(config: dual_encoder.EncoderConfig, source: str) -> None:
    buckets, distance = config.relpos_num_buckets, config.relpos_max_distance
    if buckets % 2 or buckets < 4 or distance <= buckets // 4:
        raise ValueError(
            f"{source}: a relative bias of {buckets} buckets up to a distance of "
            f"{distance}; the number of buckets must be even, at least 4, and less "
            "than four times the distance (T5: 32 and 128)"
        )


def find_format(source: str) -> tuple[Format, str]:
    """Returns the format of a source and the folder to open (the newest of several)."""
    if kvstores.is_remote(source):
        return Format.T5X, _find_remote(source)
    path = pathlib.Path(pretrained.find(source))
    pretrained.check_imported(path)
    if source.startswith("hf://") or not path.exists():
        path = hub.download(source)
    if path.is_file() and _is_bare_t5x(str(path)):
        return Format.T5X, str(path)
    if path.is_file():
        path = _folder_of(path)
    if (path / from_sentence_transformers.MODULES).exists():
        return Format.SENTENCE_TRANSFORMERS, str(path)
    if (path / model_folder.MODEL_JSON).exists():
        return Format.GECKO, str(path)
    if from_t5x.is_checkpoint(kvstores.Folder(str(path))):
        return Format.T5X, str(path)
    if (path / "config.json").exists():
        return Format.HUGGING_FACE, str(path)
    newest = from_t5x.newest({child.name for child in path.iterdir()})
    if newest is not None:
        return find_format(str(path / newest))
    _refuse_unreadable(path)
    remedy = "check the path"
    if source in pretrained.names():
        remedy = (
            f"this folder hides the bundled model {source!r}: rename it, or run the "
            "command in another folder"
        )
    raise ValueError(
        f"{source}: not a model. Looked for gecko.json (gecko_jax), checkpoint or "
        "state/_METADATA (T5X), config.json (Hugging Face), modules.json "
        f"(sentence-transformers); {remedy}"
    )


def _find_remote(source: str) -> str:
    folder = kvstores.Folder(source)
    if from_t5x.is_checkpoint(folder) or _is_bare_t5x(source):
        return source
    remedy = "check the address"
    if not source.startswith("gs://"):
        remedy = "name the checkpoint_N folder itself, because web servers do not list"
    else:
        newest = from_t5x.newest({key.partition("/")[0] for key in folder.list()})
        if newest is not None:
            return f"{folder.path}/{newest}"
    raise ValueError(f"{source}: no T5X checkpoint here; {remedy}")


def _is_bare_t5x(place: str) -> bool:
    """Whether a path is a legacy checkpoint in one file, as t5x reads it."""
    path = kvstores.Folder(place)
    if path.name == "checkpoint" or not path.name.startswith("checkpoint"):
        return False
    first = path.parent.read(path.name, 1)
    # The first byte of a small msgpack map.
    return bool(first) and 0x81 <= first[0] <= 0x8F


def _folder_of(path: pathlib.Path) -> pathlib.Path:
    if path.name in ("checkpoint", "config.json", from_sentence_transformers.MODULES):
        return path.parent
    if path.suffix == safetensors_files.SUFFIX:
        raise ValueError(
            f"{path}: weights without a config; name the folder that holds both"
        )
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        from_hugging_face.refuse_pickle(path.parent)
    raise ValueError(f"{path}: a file; name the folder of a model")


def _refuse_unreadable(path: pathlib.Path) -> None:
    """Names the format of a folder that cannot be read."""
    from_hugging_face.refuse_adapter(path)
    if any(path.glob("*.index")) or any(path.glob("*.data-?????-of-?????")):
        raise from_t5x.tensorflow_error(str(path))
    from_hugging_face.refuse_pickle(path)
