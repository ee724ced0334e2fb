import dataclasses
import math

import numpy as np
import pytest

from gecko_jax import evaluation
from gecko_jax.evaluation import judgements, retrieval_scores, sets, tables
from gecko_jax.inference import ranking

PASSAGES = {
    "1": "A gecko is a small lizard that climbs walls.",
    "2": "Bread is baked from flour, water and yeast.",
    "3": "The stock market fell sharply on Monday.",
    "4": "Rain is expected over the mountains tonight.",
}


def _set(relevance, queries=None, passages=PASSAGES, name="numbers", titles=None):
    queries = queries or {query: f"what of {query}" for query in relevance}
    return sets.RetrievalSet(
        name=name,
        passage_ids=tuple(passages),
        titles=tuple(titles or ("",) * len(passages)),
        texts=tuple(passages.values()),
        query_ids=tuple(relevance),
        queries=tuple(queries[query] for query in relevance),
        tasks=("",) * len(relevance),
        relevance=relevance,
    )


def _write(folder, found):
    import json

    folder.mkdir(exist_ok=True)
    corpus = [
        {"_id": p, "text": t}
        for p, t in zip(found.passage_ids, found.texts, strict=True)
    ]
    queries = [
        {"_id": q, "text": t}
        for q, t in zip(found.query_ids, found.queries, strict=True)
    ]
    qrels = [
        {"query-id": query, "corpus-id": passage, "score": grade}
        for query, grades in found.relevance.items()
        for passage, grade in grades.items()
    ]
    for name, records in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def test_a_judged_passage_with_the_id_of_the_query_stays(tiny_gecko, tmp_path):
    # This holds even for a name (arguana) and query texts that mark own passages.
    for name in ("numbers", "arguana"):
        found = _set({q: {q: 1} for q in "123"}, queries=PASSAGES, name=name)
        assert not judgements.find_own(found)
        results = evaluation.evaluate(tiny_gecko, [_write(tmp_path / name, found)])
        for row in results.rows:
            assert row.metrics["recall_at_100"] == 1
        (row,) = results.find(tables.BM25)
        assert row.metrics["ndcg_at_10"] == 1
        assert not results.about["num_own_left_out"]


def test_a_passage_with_another_text_stays_in_a_set_of_another_name(tmp_path):
    found = _set({"1": {"2": 1}})
    assert judgements.leave_out_own(found, [["1", "2"]]) == [["1", "2"]]


@pytest.mark.parametrize("name", ["arguana", "ArguAna", "quora", "QuoraRetrieval"])
def test_own_passages_are_left_out_of_sets_that_ignore_identical_ids(name):
    found = _set({"1": {"2": 1}, "3": {"1": 1}}, name=name)
    assert judgements.find_own(found) == {"1", "3"}
    ranked = judgements.leave_out_own(found, [["1", "3", "2"], ["1", "3"]])
    assert ranked == [["3", "2"], ["1"]]


def test_own_passages_with_the_text_of_the_query_are_left_out(tiny_gecko, tmp_path):
    queries = {"1": f"  {PASSAGES['1']}", "2": "Loaf Bread is baked.", "3": "else"}
    passages = PASSAGES | {"2": "Bread is baked."}
    found = _set(
        {"1": {"2": 1}, "2": {"1": 1}, "3": {"1": 1}},
        queries,
        passages,
        titles=("", "Loaf", "", ""),
    )
    assert judgements.find_own(found) == {"1", "2"}
    results = evaluation.evaluate(tiny_gecko, [_write(tmp_path / "own", found)])
    # The title is not in the file, so only one query remains.
    assert results.about["num_own_left_out"] == {"own": 1}
    assert "1 passage with the id of the query" in evaluation.format_table(results)


def test_ties_do_not_depend_on_the_order_of_the_corpus(tiny_gecko):
    texts = ["a list of rows", "a table", "an index of a table", "a key"]
    passages = {f"p{n}": texts[n % 4] for n in range(300)}
    relevance = {"q": {f"p{n}": 1 + n % 3 for n in range(0, 300, 7)}}
    found = _set(relevance, {"q": "a table of rows"}, passages)
    order = np.random.default_rng(0).permutation(list(passages)).tolist()
    other = _set(relevance, {"q": "a table of rows"}, {p: passages[p] for p in order})
    one, two = (
        retrieval_scores.score_model(
            tiny_gecko,
            each,
            (4, 16),
            precisions=("float32", "binary"),
            by_words=(by_words := retrieval_scores.rank_by_words(each)),
        )
        + retrieval_scores.score_bm25(each, by_words)
        + retrieval_scores.score_bag_of_words(
            tiny_gecko.vocabulary, each, dim=8, idf=True
        )
        for each in (found, other)
    )
    assert one == two
    # Of the passages with the best text, the greatest ids come first.
    vector = tiny_gecko.encode_queries(["a table of rows"])[0]
    best = int(np.argmax(tiny_gecko.encode_passages(texts) @ vector))
    ids = sorted((p for p in passages if int(p[1:]) % 4 == best), reverse=True)
    expected = ranking.ndcg_at_k(ids, relevance["q"])
    (row,) = [
        r for r in one if (r.system, r.dim, r.precision) == ("model", 16, "float32")
    ]
    assert row.metrics["ndcg_at_10"] == pytest.approx(expected, abs=1e-12)


def test_judgements_of_another_corpus_are_refused(tiny_gecko, tmp_path):
    found = _set({"q1": {"x7": 1}, "q2": {"x8": 1, "1": 0}})
    with pytest.raises(ValueError, match=r"such as 'x7', are absent .* such as '1'"):
        judgements.check(found)
    with pytest.raises(ValueError, match="absent from the corpus"):
        evaluation.evaluate(tiny_gecko, [_write(tmp_path / "other", found)])
    with pytest.raises(ValueError, match="no query has a relevant passage"):
        judgements.check(_set({"q1": {"1": 0}, "q2": {"2": -1}}))


def test_queries_without_their_answers_in_the_corpus_give_a_warning(caplog):
    with caplog.at_level("WARNING", logger="absl"):
        judgements.check(_set({"q1": {"x7": 1, "2": 0}, "q2": {"1": 1}}))
    assert "1 of 2 queries, such as 'q1', score 0" in caplog.text


def test_equal_grades_give_a_warning(caplog):
    every = dict.fromkeys(PASSAGES, 2)
    with caplog.at_level("WARNING", logger="absl"):
        judgements.check(_set({"q1": every | {"4": 1}, "q2": every}))
        assert not caplog.records
        judgements.check(_set({"q1": every, "q2": every}))
    assert "all rankings score the same" in caplog.text
    pairs = sets.SimilaritySet("pairs", ("a", "b"), ("c", "d"), np.array([3.0, 3.0]))
    with pytest.raises(ValueError, match="all 2 pairs have the gold score 3"):
        judgements.check(pairs)


def test_the_callback_of_training_refuses_such_a_set_at_the_start(tmp_path):
    import ml_collections

    folder = _write(tmp_path / "other", _set({"q1": {"x7": 1}}))
    values = {"evaluation": {"folder": str(folder), "max_queries": 0}}
    with pytest.raises(ValueError, match="absent from the corpus"):
        evaluation.build_callback(ml_collections.ConfigDict(values), tmp_path)


def test_bm25_reports_a_search_without_a_hit(tiny_gecko, tmp_path):
    found = _set({"q1": {"1": 1}}, {"q1": "zebra"})
    results = evaluation.evaluate(tiny_gecko, [_write(tmp_path / "none", found)])
    (row,) = results.find(tables.BM25)
    assert row.metrics["ndcg_at_10"] == 0
    assert "BM25: no query shares a word with a passage" in evaluation.format_table(
        results
    )
    paths = evaluation.save(results, tmp_path / "out")
    assert evaluation.read(paths[0]) == results
    hit = evaluation.evaluate(
        tiny_gecko,
        [_write(tmp_path / "none", dataclasses.replace(found, queries=("gecko",)))],
    )
    assert "shares a word" not in evaluation.format_table(hit)
    # Earlier versions had no notes.
    assert not any("note" in row for row in hit.to_dict()["rows"])


@pytest.mark.parametrize(
    ("grades", "whole"),
    [
        ({"1": 0.5, "2": 1.5, "3": 0}, {"1": 1, "2": 3, "3": 0}),
        ({"1": 0.1, "2": 0.7, "3": -0.3}, {"1": 1, "2": 7, "3": 0}),
        ({"1": 10**12, "2": 3 * 10**12}, {"1": 1, "2": 3}),
        ({"1": 1e300}, {"1": 1}),
        # Grades that trec_eval supports do not change.
        ({"1": 2, "2": 4, "3": -1}, {"1": 2, "2": 4, "3": -1}),
    ],
)
def test_grades_become_whole_and_keep_their_gains(grades, whole):
    found = _set({"q1": grades})
    shown = judgements.for_trec(found)
    assert shown.relevance["q1"] == whole
    for ranked in ([], ["2", "1"], ["3", "4", "1", "2"]):
        expected = ranking.ndcg_at_k(ranked, grades)
        assert ranking.ndcg_at_k(ranked, whole) == pytest.approx(expected, abs=1e-12)
    assert shown == found or whole != grades


@pytest.mark.parametrize("grades", [{"1": math.pi, "2": 1}, {"1": 1, "2": 10**9 + 7}])
def test_grades_without_a_common_step_are_refused(grades):
    with pytest.raises(
        ValueError, match=r"numbers: query 'q1' has the grades 1 and (3\.14|.*007)"
    ):
        judgements.for_trec(_set({"q1": grades}))


def test_queries_that_keep_their_own_passage_get_another_id():
    found = _set({"1": {"1": 1}, "2": {"1": 1}, "q": {"1": 1}, "query 1": {"1": 1}})
    shown = judgements.for_trec(found)
    assert shown.query_ids == ("query query 1", "query 2", "q", "query 1")
    assert shown.relevance.keys() == set(shown.query_ids)
    assert not set(shown.query_ids) & set(shown.passage_ids)
    dropped = dataclasses.replace(found, name="quora")
    assert judgements.for_trec(dropped).query_ids[1] == "2"
