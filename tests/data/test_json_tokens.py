"""Tokens of a `tokenizer.json`, from lines to batches.

In the vocabulary of the kind of Qwen, the id 0 is a "!" and not padding.
"""

import json
import sys

import numpy as np
import pytest

from gecko_jax.data import (
    features,
    load_seqio,
    pipeline,
    registration,
    selection,
    seqio_vocabulary,
    statistics,
    task_table,
)
from gecko_jax.text import json_vocabularies, text_formats, vocabularies
from tests import json_tokenizers

BARE = text_formats.TextFormat(query="{text}", passage="{text}")


@pytest.fixture(scope="module", params=["gemma", "qwen"])
def vocab(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocab")
    return vocabularies.load(json_tokenizers.write(folder, request.param))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    records = [
        {
            "task": "docs",
            "query": f"!! a\tquestion!\n{n}!",
            "positive": f"!answer{'!' * n} 🦎 {'and so on ' * n}",
            "negatives": [f"wrong!\n\n{'! ' * m}{n}" for m in range(n % 4)],
        }
        for n in range(12)
    ]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path, records


def test_seqio_tokenizes_as_the_vocabulary(vocab):
    load_seqio()
    import tensorflow as tf

    wrapped = seqio_vocabulary.wrap(vocab)
    texts = list(json_tokenizers.TEXTS)
    expected = [ids[:-1] for ids in vocab.encode(texts)]
    assert wrapped.encode_tf(tf.constant(texts)).to_list() == expected
    assert wrapped.encode_tf(tf.constant([], tf.string)).to_list() == []
    for text, ids in zip(texts, expected, strict=True):
        assert wrapped.encode_tf(tf.constant(text)).numpy().tolist() == ids
        assert wrapped.encode(text) == ids
        read = text.replace("<image_soft_token>", "").partition("<eos>")[0]
        if text == read.replace("<|endoftext|>", ""):
            padded = [*ids, vocab.eos_id, 0, 0]
            assert wrapped.decode(padded) == vocab.decode(ids)
            assert wrapped.decode_tf(tf.constant(padded)).numpy().decode() == (
                vocab.decode(ids)
            )
    assert wrapped.vocab_size == vocab.size
    assert (wrapped.bos_id,) == (vocab.opening or (None,))
    again = seqio_vocabulary.wrap(vocabularies.load(vocab.path))
    assert wrapped == again
    assert wrapped != seqio_vocabulary.wrap(
        vocabularies.load(task_table.QUICKSTART_VOCABULARY)
    )


def build(vocab, path, cache_dir, **shape):
    chosen = selection.select(
        mixture="",
        files=(str(path),),
        vocabulary=vocab,
        text_format=BARE,
        cache_dir=cache_dir,
    )
    sizes = {"query_length": 9, "passage_length": 12, "num_negatives": 2, **shape}
    return pipeline.Batches(
        chosen,
        features.Shape(**sizes),
        batch_size=4,
        one_task_per_batch=False,
        seed=3,
    )


def test_batches_hold_the_texts_tokens(vocab, pairs, tmp_path, monkeypatch):
    path, records = pairs
    batches = build(vocab, path, tmp_path)
    assert batches.text_format.verbatim
    for n, example in enumerate(batches.readers[0].read(range(12))):
        record = records[n]
        texts = [record["query"], record["positive"], *record["negatives"]]
        tokens = [example.query, example.positive, *example.negatives]
        assert [part.tolist() for part in tokens] == vocab.encode(texts)
    for packing in (False, True):
        batch = build(vocab, path, tmp_path, packing=packing).batch(0)
        for row, (_, number) in enumerate(batches.picks(0)):
            line, segment = batch["query_index"][row]
            used = batch["query_segment_ids"][line] == segment + 1
            [expected] = vocab.encode([records[number]["query"]], 9)
            assert batch["query_tokens"][line][used].tolist() == expected
            line, segment = batch["passage_index"][row]
            used = batch["passage_segment_ids"][line] == segment + 1
            [expected] = vocab.encode([records[number]["positive"]], 12)
            assert batch["passage_tokens"][line][used].tolist() == expected
    # The cache is read without the package that encodes.
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    json_vocabularies._open.cache_clear()
    again = build(vocabularies.load(vocab.path), path, tmp_path)
    assert again.mixture_hash == batches.mixture_hash
    np.testing.assert_array_equal(
        again.batch(1)["passage_tokens"], batches.batch(1)["passage_tokens"]
    )


def test_statistics_count_the_same_tokens(vocab, pairs):
    path, records = pairs
    task = task_table.Task("docs", "search result", (str(path),), source_task="docs")
    mixture = selection.mixtures.Mixture(("docs",))
    collected = statistics.collect(
        [task],
        mixture,
        vocabulary=vocab,
        text_format=BARE,
        shape=features.Shape(9, 12),
        batch_size=4,
        one_task_per_batch=False,
    )
    lengths = sorted(len(ids) for ids in vocab.encode([r["query"] for r in records]))
    assert sorted(collected.tasks[0].query_lengths.tolist()) == lengths


def test_t5x_is_refused(vocab):
    with pytest.raises(ValueError, match="t5x tells padding by the id 0"):
        registration.register("quickstart", vocabulary_path=vocab.path)
