import dataclasses
import json

import ml_collections
import numpy as np
import pytest

from gecko_jax import evaluation
from gecko_jax.evaluation import (
    classification,
    judge,
    retrieval_scores,
    sets,
    tables,
)
from gecko_jax.formats import model_folder
from gecko_jax.inference import embedding, ranking

WORDS = ("list", "table", "index", "query", "module", "string", "number", "file")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns passages of two words, and queries that are parts of them."""
    folder = tmp_path_factory.mktemp("sets") / "small"
    folder.mkdir()
    passages = [f"{a} {b}" for a in WORDS for b in WORDS if a != b]
    queries, qrels = [], []
    for position in range(0, len(passages), 5):
        task = "docs" if position % 2 else "sts"
        queries.append(
            {"_id": f"q{position}", "text": passages[position], "task": task}
        )
        qrels.append(
            {"query-id": f"q{position}", "corpus-id": f"p{position}", "score": 1}
        )
    # A passage with the id of a query is not an answer to it.
    corpus = [{"_id": f"p{i}", "text": p} for i, p in enumerate(passages)]
    corpus.append({"_id": "q0", "text": passages[0]})
    for name, records in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    (folder.parent / "pairs.tsv").write_text(
        "list a\tlist\t5\nlist\tfile\t1\nx\tx\t4\n"
    )
    return folder


@pytest.fixture(scope="module")
def results(tiny_gecko, folder):
    return evaluation.evaluate(
        tiny_gecko, [folder.parent], dims=(8, 16), untrained=True
    )


def _ndcg(results, system, dim, task="all"):
    (row,) = [r for r in results.find(system, dim, task) if r.set == "small"]
    return row.metrics["ndcg_at_10"]


def test_tables_include_other_models(tiny_gecko, folder):
    other = embedding.Gecko(
        dataclasses.replace(tiny_gecko.files, mrl_dims=(2, 4), revision="other-1")
    )
    found = evaluation.evaluate(
        tiny_gecko, [folder], baselines=False, beside={"mini": other}
    )
    assert [row.dim for row in found.find("mini")] == [2, 4]
    # Both are the same parameters at the same dim.
    assert _ndcg(found, "mini", 4) == _ndcg(found, tables.MODEL, 4)
    assert found.about["beside"] == {"mini": "other-1"}
    assert "mini" in evaluation.format_table(found)
    with pytest.raises(ValueError, match=r"'BM25': the tables use this name"):
        evaluation.evaluate(tiny_gecko, [folder], beside={"BM25": other})
    with pytest.raises(ValueError, match="16"):
        evaluation.evaluate(tiny_gecko, [folder], dims=(16,), beside={"mini": other})


def test_hybrid_rows_fuse_the_rankings_of_model_and_bm25(tiny_gecko, folder):
    results = evaluation.evaluate(
        tiny_gecko, [folder.parent], dims=(8, 16), baselines=False, hybrid=True
    )
    systems = [(row.system, row.dim) for row in results.rows if row.task == "all"]
    assert systems == [
        *(("model", 8), ("model", 16)),  # pairs of sentences have no BM25
        *(("model", 8), ("model", 16)),
        *(("model and BM25", 8), ("model and BM25", 16)),
    ]
    assert "model and BM25" in evaluation.format_table(results)
    (dataset,) = sets.load(folder)
    words = ranking.bm25_rankings(
        dataset.queries, dataset.texts, dataset.passage_ids, len(dataset.texts)
    )
    values = []
    for position, identity in enumerate(dataset.query_ids):
        task = dataset.tasks[position]
        query = dataset.queries[position]
        vector = tiny_gecko.encode_queries([query], task)[0]
        passages = tiny_gecko.encode(dataset.texts, side="passage", task=task)
        best = np.argsort(-(passages @ vector), kind="stable")
        ranks: dict[str, float] = {}
        for ranked in ([dataset.passage_ids[p] for p in best], words[position]):
            for rank, passage in enumerate(ranked, start=1):
                ranks[passage] = ranks.get(passage, 0) + 1 / (60 + rank)
        fused = sorted(ranks, key=lambda passage: -ranks[passage])
        fused = [passage for passage in fused if passage != identity]
        values.append(ranking.ndcg_at_k(fused, dataset.relevance[identity]))
    score = _ndcg(results, "model and BM25", 16)
    assert score == pytest.approx(np.mean(values), abs=1e-3)
    assert score != pytest.approx(_ndcg(results, "model", 16), abs=1e-3)


def test_scores_equal_those_of_ranking_every_passage(results, tiny_gecko, folder):
    (found,) = sets.load(folder)
    known = {"docs": [], "sts": []}
    for dim in (8, 16):
        values = []
        for position, query in enumerate(found.queries):
            task = found.tasks[position]
            vector = tiny_gecko.encode_queries([query], task, dim=dim)
            passages = tiny_gecko.encode(
                found.texts, side="passage", task=task, dim=dim
            )
            order = np.argsort(-(passages @ vector[0]), kind="stable")
            ranked = [found.passage_ids[p] for p in order]
            identity = found.query_ids[position]
            ranked = [p for p in ranked if p != identity]
            values.append(ranking.ndcg_at_k(ranked, found.relevance[identity]))
            known[task].append(values[-1]) if dim == 16 else None
        assert _ndcg(results, "model", dim) == pytest.approx(np.mean(values), abs=1e-3)
    for task, values in known.items():
        score = _ndcg(results, "model", 16, task)
        assert score == pytest.approx(np.mean(values), abs=1e-3)


def test_every_system_has_its_rows(results):
    assert {(row.system, row.dim) for row in results.rows if row.set == "small"} == {
        ("model", 8),
        ("model", 16),
        ("untrained model", 8),
        ("untrained model", 16),
        ("BM25", None),
        ("random bag of words", 16),
        ("random bag, IDF weights", 16),
    }
    # Only this passage has all words of the query, so every bag of words finds it.
    for system in ("BM25", "random bag of words", "random bag, IDF weights"):
        assert _ndcg(results, system, None) > 0.6
    for row in results.rows:
        if row.set == "small":
            assert list(row.metrics) == ["ndcg_at_10", "recall_at_100", "mrr_at_10"]
            assert row.metrics["recall_at_100"] == 1 or row.system == "BM25"


def test_similarity_is_the_correlation_of_cosines(results, tiny_gecko):
    rows = [row for row in results.rows if row.set == "pairs"]
    assert [(row.system, row.dim) for row in rows] == [
        ("model", 8),
        ("model", 16),
        ("untrained model", 8),
        ("untrained model", 16),
    ]
    first = tiny_gecko.encode_queries(["list a", "list", "x"], "semantic similarity")
    second = tiny_gecko.encode_queries(["list", "file", "x"], "semantic similarity")
    cosines = np.sum(first * second, axis=1).astype(np.float64)
    expected = ranking.spearman(cosines, np.array([5.0, 1.0, 4.0]))
    assert rows[1].metrics["spearman"] == pytest.approx(expected)


def test_results_hold_the_settings_and_survive_json(results):
    about = results.about
    assert (about["revision"], about["step"], about["dims"]) == ("tiny-7", 7, [8, 16])
    assert about["text_format"]["query"].startswith("task: ")
    assert (about["query_length"], about["passage_length"]) == (64, 200)
    assert "jax" in about["versions"]
    again = tables.Results.from_dict(json.loads(json.dumps(results.to_dict())))
    assert again == results


def test_the_table_shows_every_system_and_task(results):
    table = evaluation.format_table(results)
    for text in ("small: 12 queries, 57 passages", "pairs: 3 pairs", "nDCG@10", "BM25"):
        assert text in table
    assert "docs" in table
    assert f"{_ndcg(results, 'model', 8):.3f}" in table
    assert "…" not in table


def test_several_sets_have_a_mean(results):
    rows = tuple(dataclasses.replace(row, set=f"{row.set} 2") for row in results.rows)
    double = dataclasses.replace(results, rows=results.rows + rows)
    assert "mean of 2 sets: 24 queries" in evaluation.format_table(double)


def test_saving_writes_numbers_table_and_plot(results, tmp_path):
    paths = evaluation.save(results, tmp_path / "out")
    assert [path.name for path in paths] == ["results.json", "table.txt", "quality.png"]
    saved = tables.Results.from_dict(json.loads(paths[0].read_text()))
    assert saved == results
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in paths
    )


def test_an_untrained_dim_is_refused_before_anything_is_encoded(tiny_gecko, folder):
    with pytest.raises(ValueError, match=r"dim=5: .* not trained"):
        evaluation.evaluate(tiny_gecko, [folder], dims=(5,))


def _config(folder, max_queries=0):
    values = {"evaluation": {"folder": str(folder), "max_queries": max_queries}}
    return ml_collections.ConfigDict(values)


def test_the_callback_of_training_gives_the_same_scores(
    results, tiny_files, folder, tmp_path
):
    callback = evaluation.build_callback(_config(folder), tmp_path)
    # Training writes these files after it creates the callback.
    model_folder.write_model_json(tmp_path, tiny_files)
    metrics = callback(tiny_files.params, 3)
    assert metrics["ndcg_at_10/8"] == pytest.approx(_ndcg(results, "model", 8))
    assert metrics["ndcg_at_10/16"] == pytest.approx(_ndcg(results, "model", 16))
    assert set(metrics) == {
        f"{name}/{dim}"
        for name in ("ndcg_at_10", "recall_at_100", "mrr_at_10")
        for dim in (4, 8, 16)
    }


def test_the_callback_reads_its_set_at_the_start(folder, tmp_path):
    assert evaluation.build_callback(_config(""), tmp_path) is None
    with pytest.raises(ValueError, match="no such file or folder"):
        evaluation.build_callback(_config(tmp_path / "none"), tmp_path)


def test_a_bag_depends_only_on_its_seed(tiny_gecko):
    found = sets.load("quickstart")[0].limit(20, 100)
    one, two, other = (
        retrieval_scores.score_bag_of_words(
            tiny_gecko.vocabulary, found, dim=16, idf=True, seed=seed
        )
        for seed in (0, 0, 1)
    )
    assert one == two
    assert one != other


def test_unknown_tasks_use_the_given_task(tiny_gecko, folder, monkeypatch):
    asked = []

    def encode(self, texts, tasks, **settings):
        asked.extend(tasks)
        return np.ones((len(texts), 16), np.float32) / 4

    monkeypatch.setattr(embedding.Gecko, "encode_queries", encode)
    (found,) = sets.load(folder)
    strange = dataclasses.replace(found, tasks=("unknown",) * len(found.tasks))
    retrieval_scores.score_model(tiny_gecko, strange, (16,), "my task")
    assert asked == ["my task"] * len(found.tasks)


def test_classification_scores_the_vectors_of_the_texts(tiny_gecko, tmp_path):
    file = tmp_path / "topics.tsv"
    rows = [
        f"{word} {n}\t{word}\t{'train' if n % 2 else 'test'}"
        for word in WORDS[:3]
        for n in range(20)
    ]
    file.write_text("text\tlabel\tsplit\n" + "\n".join(rows) + "\n")
    results = evaluation.evaluate(tiny_gecko, [file], dims=(4, 16))
    (found,) = sets.load(file)
    for row in results.rows:
        vectors = [
            tiny_gecko.encode_queries(list(part.texts), "classification", dim=row.dim)
            for part in (found.train, found.test)
        ]
        expected = classification.accuracy(
            vectors[0], found.train.labels, vectors[1], found.test.labels
        )
        assert row.metrics == {"accuracy": pytest.approx(expected, abs=0.02)}
        assert row.count == 30
    assert [row.dim for row in results.rows] == [4, 16]
    assert "topics: 30 texts" in evaluation.format_table(results)
    (picture,) = [p for p in evaluation.save(results, tmp_path) if p.suffix == ".png"]
    assert picture.stat().st_size > 1_000


def test_texts_without_sides_may_be_as_long_as_passages(tiny_gecko):
    text = "list table index " * 40
    vector, cut = (
        judge.encode_symmetric(tiny_gecko, [text[:length]], "STS")
        for length in (None, 300)
    )
    expected = tiny_gecko.encode(
        [text], side="query", task="semantic similarity", max_length=200
    )
    np.testing.assert_allclose(vector, expected, atol=1e-6)
    assert np.abs(vector - cut).max() > 1e-4


def test_each_precision_has_a_row(tiny_gecko, folder, tmp_path):
    judged = evaluation.evaluate(
        tiny_gecko,
        [folder.parent],
        dims=(16,),
        precisions=("float32", "int8", "binary"),
        baselines=False,
    )
    scores = {
        row.label: row.metrics["ndcg_at_10"]
        for row in judged.rows
        if row.count > 3 and row.task == "all"
    }
    assert scores.keys() == {"model", "model, int8", "model, binary"}
    # int8 changes the scores only a little; binary loses most of an untrained model.
    assert abs(scores["model, int8"] - scores["model"]) < 0.1
    assert scores["model, binary"] < scores["model, int8"]
    table = evaluation.format_table(judged)
    assert "bytes" in table
    for line, size in (("model ", 64), ("model, int8", 16), ("model, binary", 2)):
        (row,) = [
            r
            for r in table.split("small:")[1].split("pairs")[0].splitlines()
            if r.strip().startswith(line)
        ][:1]
        assert str(size) in row.split()
    paths = evaluation.save(judged, tmp_path)
    assert evaluation.read(paths[0]) == judged
    with pytest.raises(ValueError, match=r"'int4'.*float32, int8, binary"):
        evaluation.evaluate(tiny_gecko, [folder], precisions=("int4",))


def test_results_of_another_model_are_refused(results, tiny_files):
    assert results.check_model(tiny_files) is results
    with pytest.raises(ValueError, match="revision tiny-7 and the model has other"):
        results.check_model(dataclasses.replace(tiny_files, revision="other"))


def test_other_files_are_refused_as_results(tmp_path):
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no rows; no about; pass the results\.json"):
        evaluation.read(tmp_path / "r.json")
    with pytest.raises(ValueError, match="no such file"):
        evaluation.read(tmp_path / "none.json")
