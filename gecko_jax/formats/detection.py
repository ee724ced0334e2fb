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
import tempfile
from collections.abc import Mapping

import jax
from absl import logging

from gecko_jax.formats import (
    from_hugging_face,
    from_sentence_transformers,
    from_t5x,
    hub,
    kvstores,
    model_folder,
    parameters,
    pretrained,
    safetensors_files,
    tensors,
    tokenizer,
)
from gecko_jax.models import dual_encoder
from gecko_jax.text import text_formats, vocabularies

# T5 was pre-trained on texts of this many tokens.
_PRETRAINED_LENGTH = 512

# Buckets of T5's relative bias, which end at a distance of 128 tokens.
_T5_BUCKETS = 32

# Folder next to `checkpoint_N` where `gecko export --to t5x` writes the settings that
# T5X does not store.
_T5X_SETTINGS = "gecko"

# Format of a plain encoder, which reads texts as they are.
PLAIN_FORMAT = text_formats.TextFormat(query="{text}", passage="{text}", no_title="")


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
    relpos_max_distance: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> model_folder.ModelFiles:
    """Opens a model of any format; its parameters are read later, one at a time.

    Reading a parameter that is not finite raises a ValueError that names it.

    Args:
        source: A path, a URL or a hub name.
        vocabulary: SentencePiece file, for a source that has none.
        extra_ids: Number of sentinels after its pieces (T5: 100).
        query_length: Longest query in tokens; None takes the source's, or 512.
        passage_length: Longest passage in tokens; None takes the source's, or 512.
        relpos_max_distance: Distance in tokens from which the relative bias is
            constant, which T5X does not store; None takes T5's 128.
        mesh: Mesh for the parameters of a training workdir.

    Raises:
        ValueError: The source has no known format, is damaged, or its parts do not fit
            together.
    """
    source = str(source)
    source_format, place = find_format(source)
    if relpos_max_distance is not None and source_format is not Format.T5X:
        raise ValueError(
            f"--relpos-max-distance={relpos_max_distance}: {source} is a "
            f"{source_format.value} model, which holds the distance; leave it out"
        )
    if source_format is Format.GECKO:
        opened = model_folder.open_model(place, mesh)
        if vocabulary is not None:
            raise ValueError(
                f"{source}: has its own vocabulary; leave --vocabulary out"
            )
    elif source_format is Format.T5X:
        opened = _open_t5x(place, vocabulary, extra_ids, relpos_max_distance)
    else:
        opened = _open_hugging_face(
            pathlib.Path(place),
            vocabulary,
            extra_ids,
            has_modules=source_format is Format.SENTENCE_TRANSFORMERS,
            is_length_given=bool(query_length and passage_length),
        )
    lengths = {"query_length": query_length, "passage_length": passage_length}
    opened = dataclasses.replace(
        opened, **{key: value for key, value in lengths.items() if value}
    )
    if source_format is Format.GECKO:
        return opened
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
        provenance={**opened.provenance, "imported": imported},
    )


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
    if _is_t5x(kvstores.Folder(str(path))):
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
    if _is_t5x(folder) or _is_bare_t5x(source):
        return source
    remedy = "check the address"
    if not source.startswith("gs://"):
        remedy = "name the checkpoint_N folder itself, because web servers do not list"
    else:
        newest = from_t5x.newest({key.partition("/")[0] for key in folder.list()})
        if newest is not None:
            return f"{folder.path}/{newest}"
    raise ValueError(f"{source}: no T5X checkpoint here; {remedy}")


def _is_t5x(folder: kvstores.Folder) -> bool:
    index = folder.read("checkpoint", 1_000)
    if index is not None and index.lstrip().startswith(b"model_checkpoint_path"):
        raise _tensorflow_error(folder.path)
    # Early Orbax wrote `state/checkpoint`; `from_t5x` refuses it by name.
    files = ("state/_METADATA", "_METADATA", "state/checkpoint")
    return index is not None or any(map(folder.has, files))


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
        raise _tensorflow_error(str(path))
    from_hugging_face.refuse_pickle(path)


def _tensorflow_error(path: str) -> ValueError:
    return ValueError(
        f"{path}: a TensorFlow checkpoint (Mesh TensorFlow T5); take the same model "
        "from gs://t5-data/pretrained_models/t5x/ or from Hugging Face"
    )


def _open_t5x(
    place: str,
    vocabulary: str | pathlib.Path | None,
    extra_ids: int,
    relpos_max_distance: int | None,
) -> model_folder.ModelFiles:
    folder, file = kvstores.Folder(place), "checkpoint"
    model_dir = folder.parent
    if not _is_t5x(folder):  # A bare file.
        folder, file = model_dir, folder.name
    settings = _read_t5x_settings(model_dir)
    vocab = None
    if vocabulary is not None:
        vocab = _load_vocabulary(vocabulary, extra_ids)
    elif settings is None:
        raise ValueError(
            f"{place}: a T5X checkpoint holds no vocabulary; name the "
            "SentencePiece file with --vocabulary (vocabulary=), and its sentinels "
            "with --extra-ids (extra_ids=). T5's is "
            "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model with 100"
        )
    opened = from_t5x.open_checkpoint(folder, file)
    if settings is not None:
        place = f"{model_dir.path}/{_T5X_SETTINGS}"
        if relpos_max_distance is not None:
            raise ValueError(
                f"--relpos-max-distance={relpos_max_distance}: {place} holds the "
                "distance; leave it out"
            )
        is_same = vocab is None or vocab.model_proto == settings.vocabulary_proto
        if not is_same or extra_ids not in (0, settings.extra_ids):
            raise ValueError(
                f"{place}: holds another vocabulary, with {settings.extra_ids} "
                "sentinels; leave --vocabulary and --extra-ids out, or move the "
                "folder away to import the parameters without its settings"
            )
        # t5x may have continued training, so step and revision follow the parameters.
        return dataclasses.replace(
            settings,
            params=parameters.unflatten(opened.params),
            step=opened.step,
            revision="",
        )
    assert vocab is not None  # There are no settings, so a vocabulary was named.
    config = from_t5x.infer_config(opened.params, place)
    if relpos_max_distance is not None:
        config = dataclasses.replace(config, relpos_max_distance=relpos_max_distance)
    elif config.relpos_num_buckets != _T5_BUCKETS:
        logging.warning(
            "%s: the relative bias has %d buckets, T5's has %d, and T5X does not store "
            "the distance at which they end; %d tokens are assumed, set "
            "--relpos-max-distance to the distance of the training",
            place,
            config.relpos_num_buckets,
            _T5_BUCKETS,
            config.relpos_max_distance,
        )
    tokenizer.check_size(vocab, config.vocab_size, source=place, is_given=True)
    return _build(opened.params, config, vocab, step=opened.step)


def _read_t5x_settings(model_dir: kvstores.Folder) -> model_folder.ModelFiles | None:
    """Returns the settings in `gecko/` of a `model_dir`, None if it has none."""
    folder = model_dir / _T5X_SETTINGS
    if not folder.has(model_folder.MODEL_JSON):
        return None
    local = folder.local_file("")
    if local is not None:
        return model_folder.load_settings(local)
    with tempfile.TemporaryDirectory() as copy:
        for name in (model_folder.MODEL_JSON, model_folder.VOCABULARY):
            content = folder.read(name)
            if content is not None:
                (pathlib.Path(copy) / name).write_bytes(content)
        try:
            return model_folder.load_settings(copy)
        except ValueError as error:
            raise ValueError(str(error).replace(copy, folder.path)) from None


def _open_hugging_face(
    folder: pathlib.Path,
    vocabulary: str | pathlib.Path | None,
    extra_ids: int,
    *,
    has_modules: bool,
    is_length_given: bool,
) -> model_folder.ModelFiles:
    from_hugging_face.refuse_adapter(folder)
    if has_modules and (folder / model_folder.MODEL_JSON).exists():
        return _open_own_export(folder)
    modules = None
    encoder = folder
    if has_modules:
        modules = from_sentence_transformers.read_modules(folder)
        encoder = modules.encoder
        from_hugging_face.refuse_adapter(encoder)
    values = from_hugging_face.read_config(encoder)
    config = from_hugging_face.encoder_config(values, str(encoder / "config.json"))
    params = from_hugging_face.open_params(encoder, config)
    if modules is not None:
        params, config = from_sentence_transformers.add_projection(
            modules, params, config
        )
    if vocabulary is not None:
        vocab = _load_vocabulary(vocabulary, extra_ids)
    else:
        prompts = modules.text_format.prompts.values() if modules else ()
        vocab = tokenizer.read(encoder, prompts)
    tokenizer.check_size(
        vocab,
        config.vocab_size,
        source=str(encoder),
        is_given=vocabulary is not None,
    )
    if modules is None:
        length = from_sentence_transformers.tokenizer_length(encoder)
        return _build(params, config, vocab, lengths=(length, length))
    lengths = (modules.query_length, modules.passage_length)
    if None in lengths and not is_length_given:
        logging.warning(
            "%s: sets no max_seq_length, so sentence-transformers does not cut texts; "
            "gecko_jax cuts them at %d tokens, set other lengths with `gecko import "
            "--query-length --passage-length`",
            folder,
            _PRETRAINED_LENGTH,
        )
    return _build(
        params,
        config,
        vocab,
        lengths=lengths,
        text_format=modules.text_format,
        truncate_dim=modules.truncate_dim,
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
    return vocabularies.Vocabulary(proto, extra_ids)


def _open_own_export(folder: pathlib.Path) -> model_folder.ModelFiles:
    """Opens a sentence-transformers folder that `gecko export` wrote."""
    settings = model_folder.load_settings(folder)
    modules = from_sentence_transformers.read_modules(folder)
    config = dataclasses.replace(
        settings.encoder_config,
        projection=False,
        embedding_dim=settings.encoder_config.model_dim,
    )
    params = from_hugging_face.open_params(modules.encoder, config)
    params, _ = from_sentence_transformers.add_projection(modules, params, config)
    return dataclasses.replace(settings, params=parameters.unflatten(params))


def _build(
    params: Mapping[str, tensors.Tensor],
    config: dual_encoder.EncoderConfig,
    vocab: vocabularies.Vocabulary,
    *,
    step: int = 0,
    lengths: tuple[int | None, int | None] = (None, None),
    text_format: text_formats.TextFormat = PLAIN_FORMAT,
    truncate_dim: int | None = None,
) -> model_folder.ModelFiles:
    query_length, passage_length = (n or _PRETRAINED_LENGTH for n in lengths)
    width = config.embedding_dim
    return model_folder.ModelFiles(
        params=parameters.unflatten(params),
        encoder_config=config,
        text_format=text_format,
        vocabulary_proto=vocab.model_proto,
        extra_ids=vocab.extra_ids,
        added_tokens=vocab.added_tokens,
        # `encode` returns the largest, as sentence-transformers' `truncate_dim` does.
        mrl_dims=(min(truncate_dim or width, width),),
        query_length=query_length,
        passage_length=passage_length,
        step=step,
        revision="",
    )
