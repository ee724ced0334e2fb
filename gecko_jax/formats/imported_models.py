"""Opens models of other libraries: T5X, Hugging Face and sentence-transformers."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping, Sequence

from absl import logging

from gecko_jax.formats import (
    from_hugging_face,
    from_sentence_transformers,
    from_t5x,
    kvstores,
    model_folder,
    parameters,
    tensors,
    to_t5x,
    tokenizer,
    vocabulary_fit,
)
from gecko_jax.io import field_rules
from gecko_jax.models import dual_encoder
from gecko_jax.text import text_formats, vocabularies

# T5 was pre-trained on texts of this many tokens.
_PRETRAINED_LENGTH = 512

# Trained prefixes of the embedding in a `config.json`, as vLLM reads them.
_DIMS = field_rules.optional(field_rules.list_of(field_rules.integer(1)))


def open_t5x(
    place: str,
    vocab: vocabularies.Vocabulary | None,
    extra_ids: int,
    relpos_max_distance: int | None,
) -> model_folder.ModelFiles:
    """Opens a T5X checkpoint; for the arguments, see `detection.open_model`."""
    folder, file = kvstores.Folder(place), "checkpoint"
    model_dir = folder.parent
    if not from_t5x.is_checkpoint(folder):  # A bare file.
        folder, file = model_dir, folder.name
    settings = _read_t5x_settings(model_dir)
    if vocab is None and settings is None:
        raise ValueError(
            f"{place}: a T5X checkpoint holds no vocabulary; name the "
            "SentencePiece file with --vocabulary (vocabulary=), and its sentinels "
            "with --extra-ids (extra_ids=). T5's is "
            "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model with 100"
        )
    opened = from_t5x.open_checkpoint(folder, file)
    if settings is not None:
        place = f"{model_dir.path}/{to_t5x.SETTINGS}"
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
    elif config.relpos_num_buckets != 32:
        logging.warning(
            "%s: the relative bias has %d buckets, T5's has 32, and T5X does not store "
            "the distance at which they end; %d tokens are assumed, set "
            "--relpos-max-distance to the distance of the training",
            place,
            config.relpos_num_buckets,
            config.relpos_max_distance,
        )
    vocabulary_fit.check(vocab, config, source=place, is_given=True)
    return _build(opened.params, config, vocab, step=opened.step)


def _read_t5x_settings(model_dir: kvstores.Folder) -> model_folder.ModelFiles | None:
    """Returns the settings in `gecko/` of a `model_dir`, None if it has none."""
    folder = model_dir / to_t5x.SETTINGS
    if not folder.has(model_folder.MODEL_JSON):
        return None
    local = folder.local_file("")
    if local is not None:
        return model_folder.load_settings(local)
    with tempfile.TemporaryDirectory() as copy:
        for name in (model_folder.MODEL_JSON, *model_folder.VOCABULARY_FILES):
            content = folder.read(name)
            if content is not None:
                (pathlib.Path(copy) / name).write_bytes(content)
        try:
            return model_folder.load_settings(copy)
        except ValueError as error:
            raise ValueError(str(error).replace(copy, folder.path)) from None


def open_hugging_face(
    folder: pathlib.Path,
    vocab: vocabularies.Vocabulary | None,
    *,
    has_modules: bool,
    is_length_given: bool,
) -> model_folder.ModelFiles:
    """Opens a Hugging Face or sentence-transformers folder.

    `vocab` is the vocabulary that the user named; None reads the folder's.
    `has_modules` tells whether the folder has the modules of sentence-transformers, and
    `is_length_given` whether the user set both lengths.
    """
    from_hugging_face.refuse_adapter(folder)
    if has_modules and (folder / model_folder.MODEL_JSON).exists():
        if vocab is not None:
            raise ValueError(
                f"{folder}: exported by gecko_jax, with its own vocabulary; leave "
                "--vocabulary out"
            )
        return _open_own_export(folder)
    modules = None
    encoder = folder
    if has_modules:
        modules = from_sentence_transformers.read_modules(folder)
        encoder = modules.encoder
        from_hugging_face.refuse_adapter(encoder)
    values = from_hugging_face.read_config(encoder)
    config = from_hugging_face.encoder_config(values, str(encoder / "config.json"))
    is_given = vocab is not None
    if vocab is None and config.family == "t5":
        prompts = modules.text_format.prompts.values() if modules else ()
        vocab = tokenizer.read(encoder, prompts)
    elif vocab is None:
        vocab = tokenizer.read_json(encoder, is_base=modules is None)
    vocabulary_fit.check(vocab, config, values, source=str(encoder), is_given=is_given)
    params = from_hugging_face.open_params(encoder, config, values["model_type"])
    text_format, truncate_dim = text_formats.PLAIN, None
    if modules is None:
        length = from_sentence_transformers.tokenizer_length(encoder)
        if config.family != "t5":  # The limit of a language model.
            length = min(length or _PRETRAINED_LENGTH, _PRETRAINED_LENGTH)
        lengths = (length, length)
    else:
        if modules.pooling != "mean" and config.family == "t5":
            raise ValueError(
                f"{encoder}: a T5 encoder that pools by the last token; Gecko pools T5 "
                "by the mean of all tokens, take another model"
            )
        config = dataclasses.replace(config, pooling=modules.pooling)
        params, config = from_sentence_transformers.add_projection(
            modules, params, config
        )
        text_format, truncate_dim = modules.text_format, modules.truncate_dim
        if config.family != "t5" and text_format.prompts:
            text_format = text_formats.from_prompts(text_format.prompts)
        lengths = (modules.query_length, modules.passage_length)
        if None in lengths and not is_length_given:
            logging.warning(
                "%s: sets no max_seq_length, so sentence-transformers does not cut "
                "texts; gecko_jax cuts them at %d tokens, set other lengths with "
                "`gecko import --query-length --passage-length`",
                folder,
                _PRETRAINED_LENGTH,
            )
    dims = {"matryoshka_dimensions": _DIMS}
    field_rules.check(encoder / "config.json", values, dims, "remove it, or correct it")
    mrl_dims = values.get("matryoshka_dimensions") or ()
    if any(dim > config.embedding_dim for dim in mrl_dims):
        raise ValueError(
            f"{encoder / 'config.json'}: matryoshka_dimensions={list(mrl_dims)} has "
            f"more than the model's {config.embedding_dim} dims; correct it"
        )
    return _build(
        params,
        config,
        vocab,
        lengths=lengths,
        text_format=text_format,
        mrl_dims=mrl_dims,
        truncate_dim=truncate_dim,
    )


def _open_own_export(folder: pathlib.Path) -> model_folder.ModelFiles:
    """Opens a sentence-transformers folder that `gecko export` wrote."""
    settings = model_folder.load_settings(folder)
    modules = from_sentence_transformers.read_modules(folder)
    config = settings.encoder_config
    model_type = from_hugging_face.read_config(modules.encoder)["model_type"]
    if modules.dense:
        config = dataclasses.replace(
            config, projection=False, embedding_dim=config.model_dim
        )
    params = from_hugging_face.open_params(modules.encoder, config, model_type)
    params, _ = from_sentence_transformers.add_projection(modules, params, config)
    return dataclasses.replace(settings, params=parameters.unflatten(params))


def _build(
    params: Mapping[str, tensors.Tensor],
    config: dual_encoder.EncoderConfig,
    vocab: vocabularies.Vocabulary,
    *,
    step: int = 0,
    lengths: tuple[int | None, int | None] = (None, None),
    text_format: text_formats.TextFormat = text_formats.PLAIN,
    mrl_dims: Sequence[int] = (),
    truncate_dim: int | None = None,
) -> model_folder.ModelFiles:
    query_length, passage_length = (n or _PRETRAINED_LENGTH for n in lengths)
    # `encode` returns the largest, as sentence-transformers' `truncate_dim` does.
    largest = min(truncate_dim or config.embedding_dim, config.embedding_dim)
    return model_folder.ModelFiles(
        params=parameters.unflatten(params),
        encoder_config=config,
        text_format=dataclasses.replace(text_format, verbatim=vocab.verbatim),
        vocabulary_proto=vocab.model_proto,
        extra_ids=vocab.extra_ids,
        added_tokens=vocab.added_tokens,
        tokenizer_config=vocab.tokenizer_config,
        mrl_dims=(*sorted({d for d in mrl_dims if d < largest}), largest),
        query_length=query_length,
        passage_length=passage_length,
        step=step,
        revision="",
    )
