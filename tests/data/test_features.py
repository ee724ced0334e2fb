"""Features: packing moves texts and changes none; trimming keeps EOS."""

import functools

import jax
import numpy as np
import pytest

from gecko_jax.data import features
from gecko_jax.models import dual_encoder


def tokens(*values):
    return np.array([*values, 1], np.int32)


def example(query, positive, *negatives, group=0):
    return features.Example(
        query=query,
        positive=positive,
        negatives=negatives,
        query_id=np.array([len(query), 1], np.uint32),
        passage_id=np.array([len(positive), 2], np.uint32),
        negative_ids=np.array([[len(n), 3] for n in negatives], np.uint32).reshape(
            -1, 2
        ),
        negative_group=group,
    )


TWO = [
    example(tokens(5, 6), tokens(7, 8, 9), tokens(4)),
    example(tokens(2), tokens(3, 3), tokens(8, 8, 8), group=4),
]


def text_at(batch, side, number):
    row, segment = batch[f"{side}_index"][number]
    inside = batch[f"{side}_segment_ids"][row] == segment + 1
    return batch[f"{side}_tokens"][row][inside].tolist()


def test_golden_example_unpacked():
    batch = features.convert(TWO, features.Shape(8, 8, num_negatives=1))
    np.testing.assert_array_equal(
        batch["query_tokens"], [[5, 6, 1, 0, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch["passage_tokens"],
        [
            [7, 8, 9, 1, 0, 0, 0, 0],
            [3, 3, 1, 0, 0, 0, 0, 0],
            [4, 1, 0, 0, 0, 0, 0, 0],
            [8, 8, 8, 1, 0, 0, 0, 0],
        ],
    )
    np.testing.assert_array_equal(batch["passage_index"], [[n, 0] for n in range(4)])
    np.testing.assert_array_equal(
        batch["passage_segment_ids"], batch["passage_tokens"] != 0
    )
    np.testing.assert_array_equal(batch["negative_id"], [[[2, 3]], [[4, 3]]])
    np.testing.assert_array_equal(batch["negative_group"], [0, 4])
    assert batch["negative_mask"].all()
    assert batch["example_mask"].all()


def test_scores_belong_to_the_chosen_negatives():
    scored = [
        example(tokens(5), tokens(7), tokens(4), tokens(6), tokens(8)),
        example(tokens(5), tokens(7), tokens(4)),
        example(tokens(5), tokens(7), tokens(4)),
    ]
    for one, scores in zip(scored, ([9, 1, 2, 3], [8, 5], []), strict=True):
        object.__setattr__(one, "scores", np.array(scores, np.float32))
    shape = features.Shape(8, 8, num_negatives=2, scores=True)
    batch = features.convert(scored, shape, [[2, 0], [0], [0]])
    none = -np.inf
    np.testing.assert_array_equal(
        batch["scores"], [[9, 3, 1], [8, 5, none], [none, none, none]]
    )


def test_golden_example_packed():
    batch = features.convert(TWO, features.Shape(8, 8, num_negatives=1, packing=True))
    np.testing.assert_array_equal(batch["query_tokens"], [[5, 6, 1, 2, 1, 0, 0, 0]])
    np.testing.assert_array_equal(
        batch["query_segment_ids"], [[1, 1, 1, 2, 2, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch["passage_tokens"], [[7, 8, 9, 1, 8, 8, 8, 1], [3, 3, 1, 4, 1, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch["passage_index"], [[0, 0], [1, 0], [1, 1], [0, 1]]
    )


def test_golden_dtypes():
    batch = features.convert(TWO, features.Shape(8, 8, num_negatives=1))
    assert {name: str(array.dtype) for name, array in batch.items()} == {
        "query_tokens": "int32",
        "query_segment_ids": "int32",
        "query_index": "int32",
        "passage_tokens": "int32",
        "passage_segment_ids": "int32",
        "passage_index": "int32",
        "query_id": "uint32",
        "passage_id": "uint32",
        "negative_id": "uint32",
        "negative_mask": "bool",
        "example_mask": "bool",
        "negative_group": "int32",
    }


@pytest.mark.parametrize("packing", [False, True])
def test_missing_negatives_are_masked_and_still_embed(packing):
    batch = features.convert(
        TWO, features.Shape(8, 8, num_negatives=3, packing=packing)
    )
    np.testing.assert_array_equal(batch["negative_mask"], [[True, False, False]] * 2)
    assert batch["passage_index"].shape == (8, 2)
    for number in range(8):  # An empty text would be a mean over nothing.
        assert text_at(batch, "passage", number)


def random_examples(seed, count, longest):
    random = np.random.default_rng(seed)

    def text():
        return tokens(*random.integers(3, 99, random.integers(1, longest)))

    return [
        example(text(), text(), *[text() for _ in range(random.integers(0, 4))])
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("row_multiple", [1, 4])
def test_packing_keeps_every_text(seed, row_multiple):
    examples = random_examples(seed, count=37, longest=40)
    sizes = {"query_length": 16, "passage_length": 32, "num_negatives": 2}
    plain = features.convert(examples, features.Shape(**sizes))
    packed = features.convert(
        examples,
        features.Shape(**sizes, packing=True, row_multiple=row_multiple),
    )
    for name in ("query_id", "passage_id", "negative_id", "negative_mask"):
        np.testing.assert_array_equal(plain[name], packed[name])
    present = np.concatenate([np.ones(37, bool), plain["negative_mask"].ravel()])
    for side, real in (("query", np.ones(37, bool)), ("passage", present)):
        for number in np.flatnonzero(real):
            assert text_at(plain, side, number) == text_at(packed, side, number)
        rows, length = packed[f"{side}_tokens"].shape
        assert length == 32
        assert rows % row_multiple == 0
        assert packed[f"{side}_segment_ids"].max() <= 16
        # Nothing but the texts is there, and no two texts share a token.
        kept = sum(len(text_at(plain, side, n)) for n in np.flatnonzero(real))
        assert (packed[f"{side}_tokens"] != 0).sum() == kept
        padding = packed[f"{side}_segment_ids"] == 0
        np.testing.assert_array_equal(padding, packed[f"{side}_tokens"] == 0)


CONFIG = dual_encoder.EncoderConfig(
    vocab_size=128,
    model_dim=32,
    num_layers=1,
    num_heads=4,
    head_dim=8,
    mlp_dim=48,
    embedding_dim=16,
)


def test_packed_texts_are_encoded_as_they_are_alone():
    """Hidden states of each token, and embeddings, of texts as uneven as real ones."""
    random = np.random.default_rng(7)

    def text(mean):
        size = int(min(random.lognormal(np.log(mean), 0.9), 100)) + 1
        return tokens(*random.integers(2, 128, size))

    examples = [example(text(5), text(15), text(20)) for _ in range(12)]
    params = dual_encoder.init_params(CONFIG, jax.random.key(0))
    # A tenth of T5X's residual branches would hide faults in the layers.
    params = jax.tree.map(lambda leaf: 2 * leaf if leaf.ndim == 2 else leaf, params)
    encoder = dual_encoder.DualEncoder(CONFIG)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def encode(batch, side, num_segments):
        arrays = [batch[f"{side}_{name}"] for name in ("tokens", "segment_ids")]
        hidden = encoder.apply({"params": params}, *arrays, method="hidden_states")
        return hidden, dual_encoder.embed_texts(
            encoder, params, batch, side, num_segments=num_segments
        )

    found = []
    for packing in (False, True):
        shape = features.Shape(16, 64, num_negatives=1, packing=packing)
        batch = features.convert(examples, shape)
        for side in ("query", "passage"):
            inside = [
                (row, batch[f"{side}_segment_ids"][row] == segment + 1)
                for row, segment in batch[f"{side}_index"]
            ]
            hidden, embedded = encode(batch, side, shape.num_segments)
            hidden = [np.asarray(hidden)[row][where] for row, where in inside]
            found.append((embedded, np.concatenate(hidden)))
        if packing:
            assert len(batch["passage_tokens"]) < 12
    for alone, packed in zip(found[:2], found[2:], strict=True):
        for one, other in zip(alone, packed, strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(other, one, atol=1e-5)


def test_packing_is_deterministic_and_bounded():
    examples = [example(tokens(5), tokens(6)) for _ in range(40)]
    shape = features.Shape(64, 64, packing=True)
    batch, again = features.convert(examples, shape), features.convert(examples, shape)
    for name in batch:
        np.testing.assert_array_equal(batch[name], again[name])
    assert len({*map(tuple, batch["query_index"].tolist())}) == 40
    assert batch["query_index"].max(axis=0).tolist() == [2, 15]
    assert shape.num_segments == 16
    assert features.Shape(64, 512, packing=True).num_segments == 64
    assert features.Shape(64, 512).num_segments == 1


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("multiple", "microbatch"), [(1, 0), (8, 0), (8, 40)])
def test_row_counts_are_few_and_hardly_larger(packing, multiple, microbatch):
    shape = features.Shape(8, 8, 0, packing, multiple, microbatch)
    rounded = [shape.round_rows(rows) for rows in range(1, 2_000)]
    for rows, found in enumerate(rounded, start=1):
        unit = microbatch if 0 < microbatch < rows else multiple
        assert found % unit == 0
        # The root: what the rows of one config vary by anyway.
        assert rows <= found <= rows + max(rows / 16, rows**0.5, unit - 1)
        assert found <= microbatch or found % max(microbatch, 1) == 0
    if packing:
        near = {found for found in rounded if 1_000 <= found <= 1_200}
        assert len(near) <= 6


def test_trimming_keeps_eos_and_the_original():
    text = tokens(5, 6, 7, 8)
    np.testing.assert_array_equal(features.trim(text, 3), [5, 6, 1])
    np.testing.assert_array_equal(features.trim(text, 5), text)
    np.testing.assert_array_equal(text, [5, 6, 7, 8, 1])


def test_choices_pick_negatives():
    one = example(tokens(2), tokens(3), tokens(4), tokens(5, 5), tokens(6, 6, 6))
    batch = features.convert([one], features.Shape(8, 8, num_negatives=2), [[2, 0]])
    assert text_at(batch, "passage", 1) == [6, 6, 6, 1]
    assert text_at(batch, "passage", 2) == [4, 1]
    np.testing.assert_array_equal(batch["negative_id"], [[[4, 3], [2, 3]]])
