"""Whether a vocabulary is that of an encoder: its ids, and how it opens and ends texts.

Folders of other libraries hold a tokenizer and weights that nothing ties together. With
the tokenizer of another model, every embedding would be wrong without an error.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from gecko_jax.formats import family_configs
from gecko_jax.models import dual_encoder
from gecko_jax.text import vocabularies

# T5 rounds the rows of its embedding table up to a multiple of this. Other tables have
# fewer rows without a token than the second number: Qwen3's have 267.
_ROUNDED_TO, _SPARE_ROWS = 128, 1_024


def check(
    vocab: vocabularies.Vocabulary,
    config: dual_encoder.EncoderConfig,
    values: Mapping[str, Any] | None = None,
    *,
    source: str,
    is_given: bool,
) -> None:
    """Raises a ValueError for the vocabulary of another model.

    `values` are the contents of `config.json`, which T5 does not need. If the user
    named the vocabulary (`is_given`), additional rows of a T5 are an error, because the
    vocabulary is another one or lacks its sentinels.
    """
    _check_size(vocab, config, source, is_given)
    opening, ends = (), [vocabularies.EOS_ID]
    if config.family != "t5":
        text = family_configs.text_settings(values or {}, source)
        opening, ends = _needed_ends(text, config.family)
    if vocab.opening == opening and (not ends or vocab.eos_id in ends):
        return
    raise ValueError(
        f"{source}: its vocabulary begins texts with {_named(vocab.opening)} and ends "
        f"them with {_named([vocab.eos_id])}, and the model needs {_named(opening)} "
        f"and {_named(ends) if ends else 'any'}; use the vocabulary of the model"
    )


def _check_size(
    vocab: vocabularies.Vocabulary,
    config: dual_encoder.EncoderConfig,
    source: str,
    is_given: bool,
) -> None:
    """Compares the number of ids with the rows of the embedding table."""
    rows, is_t5 = config.vocab_size, config.family == "t5"
    sentinels = f" ({vocab.extra_ids} of them sentinels)" if is_t5 else ""
    numbers = f"the vocabulary has {vocab.size:,} ids{sentinels}, and the embedding"
    numbers += f" table {rows:,} rows"
    spare = rows - vocab.size
    if spare < 0 or (not is_t5 and spare >= _SPARE_ROWS):
        raise ValueError(
            f"{source}: {numbers}: they do not belong together; use the vocabulary of "
            "the model"
        )
    if not is_t5 or spare < _ROUNDED_TO:
        return
    if is_given:
        raise ValueError(
            f"{source}: {numbers}: give the vocabulary of the model, and its sentinels "
            "with --extra-ids (T5: 100)"
        )
    logging.warning("%s: %s", source, numbers)


def _needed_ends(
    text: Mapping[str, Any], family: str
) -> tuple[tuple[int, ...], list[int]]:
    """Returns the ids that open a text, and those that may end it; [] for any.

    Texts of the Gemma families begin with BOS and end with EOS. Those of Qwen3 begin
    with no token and end with one of its special tokens: Qwen3-Embedding ends them with
    the token that `config.json` calls BOS.
    """
    has_bos = family in ("gemma", "embeddinggemma2")
    # Defaults of transformers.
    bos, eos, pad = (
        text.get(f"{name}_token_id", default if has_bos else None)
        for name, default in (("bos", 2), ("eos", 1), ("pad", 0))
    )
    ends = {
        *(eos if isinstance(eos, list) else [eos]),
        *(() if has_bos else (bos, pad)),
    }
    opening = (bos,) if has_bos and bos is not None else ()
    return opening, sorted(ends - {None})


def _named(ids: Sequence[int]) -> str:
    return f"the id {' or '.join(map(str, ids))}" if ids else "no token"
