"""Training a SentencePiece vocabulary on the texts of JSONL files."""

import io
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

from gecko_jax.data import jsonl
from gecko_jax.io import writing
from gecko_jax.text import text_formats, vocabularies

# A constant, because the scores of the pieces depend on it in their last digits.
_THREADS = 8

# More texts are sampled, which bounds the memory.
_MAX_TEXTS = 2_000_000


def train_vocabulary(
    files: Sequence[str | os.PathLike], output: str | os.PathLike, size: int = 32_000
) -> vocabularies.Vocabulary:
    """Trains a unigram vocabulary with byte fallback and T5's reserved ids.

    It reads queries, positives and titles of JSONL files. `size` counts pieces, 256
    bytes and 3 reserved ids. Raises ValueError if a record is invalid, or the texts
    cannot fill the size.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    # SentencePiece hides the exceptions of its input.
    input_errors: list[ValueError] = []

    def texts() -> Iterator[str]:
        try:
            for path in files:
                for record in jsonl.read_pairs(path):
                    for content in (record.query, record.title, record.positive):
                        if content:
                            yield text_formats.clean(content)
        except ValueError as error:
            input_errors.append(error)

    try:
        _interruptibly(
            sentencepiece.SentencePieceTrainer.train,
            sentence_iterator=texts(),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            byte_fallback=True,
            pad_id=vocabularies.PAD_ID,
            eos_id=vocabularies.EOS_ID,
            unk_id=2,
            bos_id=-1,
            # Rarer characters are spelled in bytes.
            character_coverage=0.9999,
            # In bytes; SentencePiece skips longer texts.
            max_sentence_length=4 * text_formats.MAX_CHARACTERS,
            input_sentence_size=_MAX_TEXTS,
            shuffle_input_sentence=True,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        if not input_errors:
            raise ValueError(_explain(str(error), size)) from error
    if input_errors:
        raise input_errors[0]
    trained = vocabularies.Vocabulary(model.getvalue())
    with writing.write_file(output) as temporary:
        temporary.write_bytes(trained.model_proto)
    return trained


def _interruptibly(function: Callable[..., Any], **arguments: Any) -> None:
    """Calls C++ code in a thread, so that Ctrl-C does not wait until it returns."""
    done = futures.Future[None]()

    def call() -> None:
        try:
            done.set_result(function(**arguments))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    done.result()


def _explain(message: str, size: int) -> str:
    """Returns a clear message for SentencePiece's error about an impossible size."""
    if too_large := re.search(r"too high.*?<= (\d+)", message):
        return (
            f"vocabulary size {size:,}: the texts only fill {too_large[1]} pieces; "
            f"choose a size of at most {too_large[1]} or give more texts"
        )
    if too_small := re.search(r"smaller than required_chars.*?vs (\d+)", message):
        return (
            f"vocabulary size {size:,}: the single characters and bytes alone need "
            f"{too_small[1]} pieces; choose a larger size or a lower character coverage"
        )
    if "sentences_.empty()" in message:
        return "the files hold no examples; give lines with task, query and positive"
    return (
        f"vocabulary size {size:,}: SentencePiece cannot train it ({message}); choose "
        "another size or give other texts"
    )
