"""Metrics compared with loops over their definitions; BM25 on a few passages."""

import math

import numpy as np
import pytest

from gecko_jax.inference import ranking


def _loop_ndcg(ranked, relevance, k):
    gain = 0.0
    for rank in range(1, min(k, len(ranked)) + 1):
        gain += max(relevance.get(ranked[rank - 1], 0), 0) / math.log2(rank + 1)
    best = 0.0
    grades = sorted((g for g in relevance.values() if g > 0), reverse=True)
    for rank in range(1, min(k, len(grades)) + 1):
        best += grades[rank - 1] / math.log2(rank + 1)
    return gain / best


def _loop_recall(ranked, relevance, k):
    relevant = [p for p, g in relevance.items() if g > 0]
    return sum(p in ranked[:k] for p in relevant) / len(relevant)


def _loop_mrr(ranked, relevance, k):
    ranks = [r for r, p in enumerate(ranked[:k], 1) if relevance.get(p, 0) > 0]
    return 1 / min(ranks) if ranks else 0.0


@pytest.mark.parametrize("k", [1, 3, 10, 100])
def test_metrics_follow_their_definitions(k):
    rng = np.random.default_rng(k)
    for _ in range(50):
        passages = [f"p{i}" for i in range(rng.integers(1, 30))]
        ranked = rng.permutation(passages)[
            : rng.integers(0, len(passages) + 1)
        ].tolist()
        grades = rng.integers(-1, 4, len(passages) + 3)
        relevance = {f"p{i}": int(g) for i, g in enumerate(grades)} | {"p0": 2}
        for metric, loop in (
            (ranking.ndcg_at_k, _loop_ndcg),
            (ranking.recall_at_k, _loop_recall),
            (ranking.mrr_at_k, _loop_mrr),
        ):
            result = metric(ranked, relevance, k)
            assert result == pytest.approx(loop(ranked, relevance, k), abs=1e-12)
            assert 0 <= result <= 1


def test_the_example_of_the_module():
    relevance = {"p7": 2, "p9": 1}
    assert ranking.ndcg_at_k(["p3", "p7", "p1"], relevance) == pytest.approx(
        0.480, abs=1e-3
    )


def test_gain_is_linear_in_the_grade():
    # Exponential gain would give 1 / (1 + 7 / log2(3)) here and below.
    result = ranking.ndcg_at_k(["low", "high"], {"low": 1, "high": 3})
    assert result == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)))


def test_nothing_relevant_scores_zero():
    for metric in (ranking.ndcg_at_k, ranking.recall_at_k, ranking.mrr_at_k):
        assert metric(["p1"], {"p1": 0}) == 0
        assert metric([], {"p1": 1}) == 0


def test_spearman_follows_the_formula_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, (2, 25)).astype(float)
        ranks = [
            [sum(w < v for w in x) + (sum(w == v for w in x) + 1) / 2 for v in x]
            for x in (a, b)
        ]
        expected = np.corrcoef(ranks)[0, 1]
        assert ranking.spearman(a, b) == pytest.approx(expected, abs=1e-12)


def test_spearman_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(1).normal(size=(2, 40)).round(1)
    assert ranking.spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0], abs=1e-12)


def test_spearman_of_a_constant_is_zero_and_of_one_pair_an_error():
    assert ranking.spearman(np.ones(4), np.arange(4.0)) == 0
    with pytest.raises(ValueError, match="at least 2"):
        ranking.spearman(np.ones(1), np.ones(1))


def test_equal_scores_keep_their_order_also_at_the_end_of_the_list():
    scores = np.array([1.0, 2.0, 1.0, 1.0, 3.0])
    assert ranking.best_positions(scores, 3).tolist() == [4, 1, 0]
    assert ranking.best_positions(scores, 99).tolist() == [4, 1, 0, 2, 3]
    assert ranking.best_positions(scores[:0], 5).tolist() == []


def test_bm25_matches_stems_and_omits_other_passages():
    passages = ["The cats were running", "A dog sleeps", "Running dogs", "Nothing here"]
    ranked = ranking.bm25_rankings(
        ["cat run", "dogs", "zebra", "the"], passages, list("abcd")
    )
    assert ranked[0] == ["a", "c"]
    assert sorted(ranked[1]) == ["b", "c"]
    assert ranked[2:] == [[], []]


def test_bm25_breaks_ties_by_the_greater_id_and_cuts_at_k():
    passages = ["same words"] * 30 + ["other thing"]
    ids = [f"p{i}" for i in range(31)]
    assert ranking.bm25_rankings(["words"], passages, ids, k=4) == [
        ["p9", "p8", "p7", "p6"]
    ]
    # The same holds at the cut-off: the best passage comes first, then the largest ids.
    passages[3] = "words words"
    assert ranking.bm25_rankings(["words"], passages, ids, k=3) == [["p3", "p9", "p8"]]


@pytest.mark.torch  # mteb installs it.
def test_ties_rank_as_in_trec_eval():
    import pytrec_eval as trec

    rng = np.random.default_rng(0)
    names = [*(f"p{n}" for n in range(30)), "é", "z", "Z", "10", "9"]
    for _ in range(30):
        ids = rng.permutation(names).tolist()
        scores = rng.integers(0, 4, len(ids)).astype(np.float32)
        order = ranking.tie_order(ids)
        best = ranking.best_positions(scores[order], 10)
        ranked = [ids[order[int(place)]] for place in best]
        relevance = {
            p: int(g) for p, g in zip(ids, rng.integers(0, 3, 35), strict=True)
        }
        relevance["p0"] = 3
        judge = trec.RelevanceEvaluator({"q": relevance}, {"ndcg_cut.10", "recip_rank"})
        run = dict(zip(ids, scores.tolist(), strict=True))
        expected = judge.evaluate({"q": run})["q"]
        found = ranking.ndcg_at_k(ranked, relevance)
        assert found == pytest.approx(expected["ndcg_cut_10"], abs=1e-12)


def test_duplicate_rows_are_removed_for_any_dtype():
    rows = np.array([[1, 2], [3, 4], [1, 2], [3, 4], [5, 6]])
    for dtype in (np.float32, np.int8, np.uint8):
        first, number_of = ranking.distinct_rows(rows.astype(dtype))
        assert first.tolist() == [0, 1, 4]
        assert number_of.tolist() == [0, 1, 0, 1, 2]
    assert ranking.distinct_rows(rows[:0])[0].shape == (0,)


@pytest.mark.parametrize("factor", [0.5, 0.1, 3, 1e-300, 1e300, 10**300])
def test_ndcg_does_not_depend_on_the_unit_of_the_grades(factor):
    grades = {"a": 1, "b": 3, "c": 2, "d": 0, "e": -1}
    ranked = ["a", "e", "c", "d", "b"]
    expected = ranking.ndcg_at_k(ranked, grades)
    assert expected == pytest.approx(_loop_ndcg(ranked, grades, 10))
    scaled = {passage: grade * factor for passage, grade in grades.items()}
    assert ranking.ndcg_at_k(ranked, scaled) == pytest.approx(expected)


def test_bm25_survives_a_corpus_of_stop_words():
    assert ranking.bm25_rankings(["cat"], ["the", "of the"], ["a", "b"]) == [[]]


# Passage i answers query i, in scripts without spaces.
WITHOUT_SPACES = (
    ("壁虎吃什么", "大多数壁虎吃昆虫，例如蟋蟀和飞蛾。"),
    ("猫", "家里的猫整天睡觉。"),
    ("東京タワーの高さ", "東京タワーは高さ333メートルの電波塔である。"),
    ("ヤモリは何を食べる", "ヤモリの多くは昆虫を食べて暮らす。"),
    ("ตุ๊กแกกินอะไร", "ตุ๊กแกส่วนใหญ่กินแมลงเป็นอาหาร"),
    ("ເມືອງຫຼວງຂອງລາວ", "ວຽງຈັນແມ່ນເມືອງຫຼວງຂອງປະເທດ"),
    ("រាជធានីកម្ពុជា", "ភ្នំពេញគឺជារាជធានីនៃប្រទេស"),
    ("မြန်မာနိုင်ငံမြို့တော်", "နေပြည်တော်သည်မြို့တော်ဖြစ်သည်"),
)


def test_bm25_finds_in_scripts_without_spaces():
    queries, passages = zip(*WITHOUT_SPACES, strict=True)
    found = ranking.bm25_rankings(
        queries, passages, [str(n) for n in range(len(passages))]
    )
    assert [ranked[0] for ranked in found] == [str(n) for n in range(len(passages))]


@pytest.mark.parametrize(
    ("query", "best"), [("C++", "1"), ("R", "2"), ("error 5", "0")]
)
def test_bm25_counts_words_of_one_letter(query, best):
    passages = [
        "The error has number 5.",
        "Learn C++ soon.",
        "Plots in R.",
        "An error.",
    ]
    assert ranking.bm25_rankings([query], passages, list("0123"))[0][0] == best
