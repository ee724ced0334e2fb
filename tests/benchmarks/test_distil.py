"""The scripts that distil the bundled model."""

import json
import pathlib
import re
import sys
import types

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_texts_keep_their_order_when_rows_are_added():
    import distil_texts

    rows = [
        {"t": f"Passage {n} tells much. It has two sentences.", "q": f"topic {n}"}
        for n in range(20)
    ]
    some = distil_texts.texts_of(rows[:10], spans=2)
    all_ = distil_texts.texts_of(rows, spans=2)
    assert [text for text in all_ if text in set(some)] == some
    assert {"topic 3", "Passage 3 tells much.", rows[3]["t"]} <= set(some)
    assert len(set(some)) == len(some)


def test_an_opening_ends_with_a_sentence_or_a_word():
    import distil_texts

    sentence = "These are seven words of some text."
    opening = distil_texts.opening(" ".join([sentence] * 30))
    assert opening == " ".join([sentence] * 11)
    assert len(opening) <= distil_texts.OPENING
    long = distil_texts.opening("word " * 200)
    assert long.endswith("word")
    assert len(long) <= distil_texts.OPENING


def test_another_form_has_the_same_words():
    import distil_texts

    texts = [f"How Do {n} Geckos stick to the Glass?" for n in range(400)]
    others = [distil_texts.other_form(text) for text in texts]
    assert others == [distil_texts.other_form(text) for text in texts]

    def words(text):
        return re.findall(r"\w+", text.lower())

    assert [words(other) for other in others] == [words(text) for text in texts]
    letters = [re.sub(r"\W", "", other) for other in others]
    titles = sum(other.endswith("StickToTheGlass") for other in letters)
    assert (
        titles + sum(map(str.islower, letters)) + sum(map(str.isupper, letters)) == 400
    )
    assert 120 < titles < 200
    assert 20 < sum(map(str.isupper, letters)) < 70
    # About half have other punctuation: one sign around a word, and another end.
    signs = [re.sub(r"[\w ]", "", other) for other in others]
    assert 150 < signs.count("?") < 250
    assert {"#!", "()", '"".', "“”..."} <= set(signs)


def test_a_store_finds_what_was_added_and_nothing_else(tmp_path):
    import distil_teacher

    store = distil_teacher.Store(tmp_path / "teacher")
    vectors = np.arange(12, dtype=np.float16).reshape(4, 3)
    store.add(["a", "b"], vectors[:2])
    store.add(["c", "d"], vectors[2:])
    places, found = distil_teacher.Store(tmp_path / "teacher").find(["d", "x", "a"])
    assert places.tolist() == [0, 2]
    np.testing.assert_array_equal(found, vectors[[3, 0]])
    np.testing.assert_array_equal(store.vectors(["b", "b"]), vectors[[1, 1]])
    with pytest.raises(ValueError, match="1 are missing"):
        store.vectors(["a", "x"])


def test_the_teacher_does_not_embed_a_text_twice(tmp_path, monkeypatch):
    import distil_teacher

    seen = []

    def encode(ids):
        seen.extend(ids.tolist())
        return np.ones((len(ids), 4), np.float32)

    class Tokenizer:
        @classmethod
        def from_file(cls, path):
            return cls()

        def no_padding(self):
            pass

        def enable_truncation(self, length):
            pass

        def encode_batch(self, texts):
            return [types.SimpleNamespace(ids=[len(text), 7]) for text in texts]

    module = types.SimpleNamespace(Tokenizer=Tokenizer)
    monkeypatch.setitem(sys.modules, "tokenizers", module)
    monkeypatch.setattr(distil_teacher, "encoder", lambda folder: (encode, 4))
    store = distil_teacher.Store(tmp_path / "teacher")
    distil_teacher.teach(tmp_path, ["a", "bb", "a"], store, np.inf)
    distil_teacher.teach(tmp_path, ["bb", "ccc"], store, np.inf)
    assert sorted(seen) == [[1, 7], [2, 7], [3, 7]]
    # The time limit has passed.
    distil_teacher.teach(tmp_path, ["dddd"], store, -np.inf)
    assert len(store.digests()) == 3
    np.testing.assert_allclose(store.vectors(["ccc"]), [[0.5] * 4])


@pytest.mark.torch
@pytest.mark.parametrize("has_amx", [False, True])
def test_the_teacher_in_low_precision_is_close_to_its_float32(
    tmp_path, monkeypatch, has_amx
):
    import distil_teacher
    import torch
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 50, (3, 8))
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)).last_hidden_state.mean(1).numpy()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx})
    encode, size = distil_teacher.encoder(tmp_path)
    expected_size = "BATCH_IN_BFLOAT16" if has_amx else "BATCH"
    assert size == getattr(distil_teacher, expected_size)
    found = encode(ids)
    cosines = np.sum(found * expected, axis=1) / (
        np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    )
    assert cosines.min() > 0.99


def _tokens(random, texts, count):
    lengths = random.integers(2, 8, texts)
    return [random.integers(2, count, n).astype(np.uint16) for n in lengths]


def test_least_squares_find_the_table_behind_the_targets():
    import distil_solve

    random = np.random.default_rng(0)
    table = random.normal(size=(40, 6)).astype(np.float32)
    tokens = _tokens(random, 4_000, 40)
    targets = np.stack([table[row].sum(0) for row in tokens])
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    found = distil_solve.solve(tokens, targets, np.zeros((40, 6), np.float32))
    sums = np.stack([found[row].sum(0) for row in tokens])
    cosines = np.sum(sums * targets, axis=1) / np.linalg.norm(sums, axis=1)
    assert cosines.mean() > 0.98


def test_a_turn_puts_the_dimensions_of_pairs_first():
    import distil_solve

    random = np.random.default_rng(0)
    # In the last two dimensions, a query's token equals its passage's token.
    table = random.normal(size=(200, 6)).astype(np.float32)
    table[100:, 4:] = table[:100, 4:]
    queries = [np.array([n]) for n in range(100)]
    passages = [np.array([n + 100]) for n in range(100)]
    turn = distil_solve.turn(table, random.normal(size=(500, 6)), queries, passages)
    share = np.square(turn[4:]).sum(0) / np.square(turn).sum(0)
    assert share[:2].min() > 0.9


def test_training_reduces_the_distance_to_the_teacher(tmp_path):
    import distil_training

    random = np.random.default_rng(0)
    count = 60
    table = random.normal(size=(count, 256)).astype(np.float32)
    tokens = _tokens(random, 300, count)
    targets = np.stack([table[row].sum(0) for row in tokens]).astype(np.float16)
    options = types.SimpleNamespace(batch=64, pair_batch=16, seed=0)
    sides = [tokens[:50], tokens[50:100]]
    ids = np.stack([np.arange(50), np.arange(50)], axis=1)
    trainer = distil_training.Trainer(
        options, tokens, targets, np.arange(300), sides, ids,
        np.eye(256, dtype=np.float32),
    )  # fmt: skip
    begin = random.normal(size=(count, 256)).astype(np.float32)
    begin[50:] = 0.5
    recipe = distil_training.Recipe(steps=80, rate=0.05, relate=1.0, pairs=0.1)
    trained, facts = trainer.train(begin, recipe, tmp_path / "state.npz")

    def cosine(table):
        sums = np.stack([table[row].sum(0) for row in tokens])
        product = np.sum(sums * targets, axis=1)
        return np.mean(
            product / np.linalg.norm(sums, axis=1) / np.linalg.norm(targets, axis=1)
        )

    assert cosine(begin) < 0.3
    assert cosine(trained) > 0.8
    assert np.isfinite(facts["loss"])


def _trainer():
    import distil_training

    random = np.random.default_rng(0)
    tokens = [random.integers(2, 30, 5).astype(np.uint16) for _ in range(50)]
    targets = random.normal(size=(50, 256)).astype(np.float16)
    options = types.SimpleNamespace(batch=8, pair_batch=4, seed=0)
    trainer = distil_training.Trainer(
        options, tokens, targets, np.arange(50), [tokens, tokens],
        np.stack([np.arange(50)] * 2, axis=1), np.eye(256, dtype=np.float32),
    )  # fmt: skip
    return random, trainer


def test_texts_share_a_target():
    import distil_training

    _, trainer = _trainer()
    trainer.target_of = np.repeat(np.arange(25), 2)
    random = np.random.default_rng(0)
    batch = trainer.batch(random, distil_training.Recipe(), 30)
    random = np.random.default_rng(0)
    chosen = np.searchsorted(trainer.shares, random.random(8))
    np.testing.assert_array_equal(batch["targets"], trainer.targets[chosen // 2])


def test_rows_without_tokens_in_the_batch_do_not_change(tmp_path):
    import distil_training

    random, trainer = _trainer()
    begin = random.normal(size=(40, 256)).astype(np.float32)
    recipe = distil_training.Recipe(steps=3, relate=1.0)
    trained, _ = trainer.train(begin, recipe, tmp_path / "state.npz")
    scale = 1 / np.mean(np.linalg.norm(begin, axis=1))
    np.testing.assert_allclose(trained[30:], begin[30:] * scale, rtol=1e-6)
    assert np.abs(trained[2:30] - begin[2:30] * scale).max() > 1e-5


def test_training_resumes_where_it_stopped(tmp_path, monkeypatch):
    import distil_training

    random, trainer = _trainer()
    begin = random.normal(size=(30, 256)).astype(np.float32)
    recipe = distil_training.Recipe(steps=9, relate=1.0, pairs=0.5)
    stored = tmp_path / "state.npz"
    whole, _ = trainer.train(begin, recipe, stored)
    monkeypatch.setattr(distil_training, "STORED", 4)
    batch = trainer.batch
    calls = []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return batch(*arguments)

    monkeypatch.setattr(trainer, "batch", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(begin, recipe, stored)
    monkeypatch.setattr(trainer, "batch", batch)
    rest, _ = trainer.train(begin[::-1], recipe, stored)
    np.testing.assert_allclose(rest, whole, atol=1e-6)
    assert not stored.exists()


class Vocabulary:
    """The methods of a SentencePiece processor that `distil_finish` calls."""

    pieces = ("<unk>", "</s>", "▁big", "▁Big", "▁bi", "g", "▁IG", "G", "▁Gig")

    def IdToPiece(self, token):
        return self.pieces[token]

    def IsControl(self, token):
        return token == 1

    def PieceToId(self, piece):
        return self.pieces.index(piece) if piece in self.pieces else 0

    def unk_id(self):
        return 0

    def EncodeAsIds(self, text):
        return {"big": [2], "ig": [0], "gig": [5, 4]}[text]


def test_rare_tokens_with_capitals_move_towards_their_lower_case():
    import distil_finish

    table = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    before = table.copy()
    counts = np.array([0, 0, 5, distil_finish.CASE, 0, 0, 0, 0, 0])
    found = distil_finish.share_case(table, Vocabulary(), counts)
    np.testing.assert_allclose(found[3], (table[2] + table[3]) / 2, rtol=1e-6)
    np.testing.assert_allclose(found[7], table[5], rtol=1e-5)
    np.testing.assert_allclose(found[8], table[5] + table[4], rtol=1e-5)
    # Without capitals, or with an unknown lower case, a row stays.
    np.testing.assert_array_equal(found[[0, 1, 2, 4, 5, 6]], table[[0, 1, 2, 4, 5, 6]])
    np.testing.assert_array_equal(table, before)


def test_directions_that_queries_share_become_shorter():
    import distil_finish

    random = np.random.default_rng(0)
    table = random.normal(size=(50, 8)).astype(np.float32)
    table[0] = 0.0
    table[0, 3] = 20.0
    queries = [np.array([0, *random.integers(1, 50, 4)]) for _ in range(500)]
    found = distil_finish.flatten_spectrum(table, queries)
    assert np.linalg.norm(found[0]) < 0.7 * 20 * np.mean(
        np.linalg.norm(found[1:], axis=1) / np.linalg.norm(table[1:], axis=1)
    )
    # It is divided by a power of its standard deviation, the root mean square.
    vectors = np.stack([table[query].sum(0) for query in queries])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    matrix = np.linalg.lstsq(table, found, rcond=None)[0]
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-4)
    values, directions = np.linalg.eigh(vectors.T @ vectors / len(vectors))
    expected = values ** (-distil_finish.SPECTRUM / 2)
    np.testing.assert_allclose(
        directions.T @ matrix @ directions, np.diag(expected), atol=1e-3
    )


def test_every_source_has_its_share_of_the_queries(monkeypatch):
    import distil_finish

    monkeypatch.setattr(distil_finish, "PER_SOURCE", 3)
    rows = [{"t": "A text.", "s": f"one/{n}", "q": f"a {n}"} for n in range(9)]
    rows += [{"t": "A text.", "s": "@npm/two", "q": "b"}, {"t": "No query.", "s": "c"}]
    queries = distil_finish.sample_queries(rows, 0)
    bundled = queries[2 * (3 + 1) :]
    assert len(bundled) > 3_000
    assert queries[0] == "b"
    assert "b" in queries[1] != "b"
    plain = queries[2:8:2]
    assert len(set(plain)) == 3
    assert all(query.startswith("a ") for query in plain)
    assert queries == distil_finish.sample_queries(rows, 0)
