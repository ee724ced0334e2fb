"""Runs of mteb with the encoder, offline."""

import dataclasses
import itertools
import json
import pathlib

import jax
import ml_collections
import numpy as np
import pytest

import gecko_jax.config
from gecko_jax.cli import entry, flags
from gecko_jax.evaluation import (
    instructions,
    judge,
    judgements,
    local_tasks,
    mteb_encoder,
    mteb_suites,
    scoreboard,
    sets,
    vector_store,
)
from gecko_jax.inference import embedding

# mteb brings PyTorch.
pytestmark = pytest.mark.torch

ROOT = pathlib.Path(__file__).parents[2]
WORDS = ("list", "table", "index", "query", "module", "string")
DIMS = (8, 16)


def _lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes a retrieval, a similarity and a classification set."""
    folder = tmp_path_factory.mktemp("sets")
    passages = [f"{a} {b}" for a in WORDS for b in WORDS if a != b]
    (folder / "finding").mkdir()
    corpus = [
        {"_id": f"p{n}", "text": p, "title": p.split()[0] if n % 2 else ""}
        for n, p in enumerate(passages)
    ]
    queries = [
        {"_id": f"q{n}", "text": f"{passages[n]} {passages[-n]}", "task": task}
        for n, task in zip(range(0, 30, 3), ["docs", "code", ""] * 4, strict=False)
    ]
    # As in BEIR, a passage is not an answer to the query with its id.
    corpus += [{"_id": query["_id"], "text": query["text"]} for query in queries]
    qrels = [
        {"query-id": f"q{n}", "corpus-id": f"p{(n + 7 * k) % 30}", "score": k + 1}
        for n in range(0, 30, 3)
        for k in range(2)
    ]
    for name, records in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
        (folder / "finding" / f"{name}.jsonl").write_text(_lines(records))
    # No pair occurs twice, because rounding may make equal cosines unequal.
    rows = [f"{p}\t{passages[29 - n]}\t{n % 7}" for n, p in enumerate(passages[:15])]
    (folder / "pairs.tsv").write_text("\n".join(rows) + "\n")
    # More than eight training texts per label, so the draw matters.
    texts = [
        {
            "text": f"{p} {n}",
            "label": "early" if p.split()[1] < "m" else "late",
            "split": "test" if n % 3 else "train",
        }
        for n, p in enumerate(3 * passages)
    ]
    (folder / "topics.jsonl").write_text(_lines(texts))
    return folder


def _config(tmp_path, *overrides):
    config = flags.load(f"{ROOT}/configs/evaluate.py:none", overrides)
    config.cache.folder = str(tmp_path / "vectors")
    config.dims = DIMS
    return config


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Disables the hub and its cache: tests do not use the network."""
    from datasets import config as datasets_config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def run(tiny_gecko, folder, tmp_path_factory):
    """Results of the folder on a mesh of all devices."""
    tmp_path = tmp_path_factory.mktemp("run")
    config = _config(tmp_path)
    config.folders = (str(folder),)
    encode = embedding.Gecko.encode
    encoded = []

    def count(self, texts, **settings):
        encoded.extend(texts)
        return encode(self, texts, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding.Gecko, "encode", count)
        board = mteb_suites.run(tiny_gecko, config, tmp_path / "out", "tiny")
    (tmp_path / "encoded").write_text(str(len(encoded)))
    return tmp_path, config, board


def test_mteb_gives_the_scores_of_gecko_evaluate(run, tiny_gecko, folder):
    tmp_path, _, board = run
    assert not board.failures
    results = judge.evaluate(tiny_gecko, [folder], dims=DIMS, baselines=False)
    metrics = {"finding": "ndcg_at_10", "pairs": "spearman", "topics": "accuracy"}
    tasks = board.suites["local sets"]
    assert [task.name for task in tasks] == list(metrics)
    for task in tasks:
        for row in results.find("model"):
            if row.set != task.name:
                continue
            name = "gecko-jax/tiny" if row.dim == 16 else f"gecko-jax/tiny-{row.dim}"
            path = tmp_path / "out" / "results" / name.replace("/", "__") / "tiny-7"
            saved = json.loads((path / f"{task.name}.json").read_text())
            (scores,) = saved["scores"]["test"]
            expected = row.metrics[metrics[task.name]]
            # mteb rounds the scores of retrieval to five digits.
            assert scores["main_score"] == pytest.approx(expected, abs=1e-5)
            assert task.scores[row.dim] == scores["main_score"]
            assert 0.02 < abs(expected) < 0.98  # no accident
    assert tasks[0].scores[8] != tasks[0].scores[16]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Writes sets that score alike only with mteb's rules for ids, ties and grades."""
    folder = tmp_path_factory.mktemp("odd")
    passages = [f"{a} {b}" for a in WORDS for b in WORDS if a != b]
    # Passages with a query's id: a judged one, one with the query's text, and another.
    overlap = {
        "corpus": [{"_id": str(n), "text": p} for n, p in enumerate(passages)],
        "queries": [
            {"_id": str(n), "text": passages[n] if n % 3 else f"{passages[-n]} file"}
            for n in range(0, 30, 2)
        ],
        "qrels": [
            {"query-id": str(n), "corpus-id": str((n + n % 4) % 30), "score": 1}
            for n in range(0, 30, 2)
        ],
    }
    # Each text occurs ten times.
    ties = {
        "corpus": [{"_id": f"p{n}", "text": passages[n % 30]} for n in range(300)],
        "queries": [{"_id": f"q{n}", "text": passages[n]} for n in range(0, 30, 3)],
        "qrels": [
            {"query-id": f"q{n}", "corpus-id": f"p{(n + 17 * k) % 300}", "score": k + 1}
            for n in range(0, 30, 3)
            for k in range(18)
        ],
    }
    steps = (0.25, 1.5, 0.1, 7e11)
    grades = {
        "corpus": overlap["corpus"],
        "queries": [{"_id": f"q{n}", "text": passages[n]} for n in range(8)],
        "qrels": [
            {
                "query-id": f"q{n}",
                "corpus-id": str(n + 3 * k),
                "score": steps[n % 4] * (k + 1),
            }
            for n in range(8)
            for k in range(3)
        ],
    }
    for name, parts in {"overlap": overlap, "ties": ties, "grades": grades}.items():
        (folder / name).mkdir()
        for part, records in parts.items():
            (folder / name / f"{part}.jsonl").write_text(_lines(records))
    return folder


@pytest.mark.parametrize("name", ["overlap", "ties", "grades"])
def test_edge_cases_have_the_same_scores_in_mteb_and_judge(
    tiny_gecko, odd, tmp_path, name
):
    config = _config(tmp_path)
    config.folders = (str(odd / name),)
    board = mteb_suites.run(tiny_gecko, config, tmp_path / "out", "tiny")
    assert not board.failures
    results = judge.evaluate(tiny_gecko, [odd / name], dims=DIMS, baselines=False)
    metrics = {
        "ndcg_at_10": "ndcg_at_10",
        "recall_at_100": "recall_at_100",
        "mrr_at_10": "mrr_at_10",
    }
    for row in results.find("model"):
        model = "gecko-jax__tiny" if row.dim == 16 else f"gecko-jax__tiny-{row.dim}"
        (path,) = (tmp_path / "out" / "results" / model).glob(f"*/{name}.json")
        (scores,) = json.loads(path.read_text())["scores"]["test"]
        for ours, theirs in metrics.items():
            assert scores[theirs] == pytest.approx(row.metrics[ours], abs=1e-5), ours
        assert 0.002 < row.metrics["ndcg_at_10"] < 0.98
    if name == "overlap":
        (found,) = sets.load(odd / name)
        own = judgements.find_own(found)
        assert 0 < len(own) < len(set(found.query_ids) & set(found.passage_ids))


def test_grades_that_mteb_cannot_count_are_refused_before_it_runs(
    tiny_gecko, odd, tmp_path
):
    (found,) = sets.load(odd / "grades")
    relevance = dict(found.relevance) | {"q0": {"0": 1 / 3, "1": 1}}
    with pytest.raises(ValueError, match=r"grades: query 'q0' has the grades 0\.33"):
        local_tasks.build(tiny_gecko, dataclasses.replace(found, relevance=relevance))
    absent = {query: {"x": 1} for query in found.query_ids}
    with pytest.raises(ValueError, match="absent from the corpus"):
        local_tasks.build(tiny_gecko, dataclasses.replace(found, relevance=absent))


def test_results_of_whole_grades_and_distinct_ids_stay_valid(folder):
    # The results of an earlier run are identified by this value.
    (found,) = sets.load(folder / "finding")
    assert local_tasks._revision(judgements.for_trec(found)) == (
        local_tasks._revision(found)
    )


def test_sets_that_ignore_identical_ids_equal_those_of_mteb():
    import mteb

    tasks = mteb.get_tasks(languages=["eng"], exclude_superseded=False)
    by_name = {judgements._plain(task.metadata.name): task for task in tasks}
    known = judgements._IGNORES_OWN & by_name.keys()
    assert known == judgements._IGNORES_OWN - {"fiqa", "quora"}
    assert all(by_name[name].ignore_identical_ids for name in known)


def test_an_empty_text_runs_in_every_text_format(tiny_files, tmp_path):
    import mteb

    from gecko_jax.text import text_formats

    found = sets.SimilaritySet(
        "empty", ("list", "", "table"), ("file", "b", " "), np.array([3.0, 1.0, 2.0])
    )
    plain = text_formats.TextFormat(query="{text}", passage="{text}", no_title="")
    scores = []
    for text_format in (tiny_files.text_format, plain):
        gecko = embedding.Gecko(
            dataclasses.replace(tiny_files, text_format=text_format)
        )
        encoder = mteb_encoder.Encoder(
            gecko,
            vector_store.Store(tmp_path / str(len(scores)), gecko, max_gib=1),
            dim=16,
            name="a/b",
            query_length=64,
            passage_length=200,
        )
        with mteb_suites._quiet():
            result = mteb.evaluate(encoder, local_tasks.build(gecko, found), cache=None)
        scores.append(result.task_results[0].get_score())
    assert len(scores) == 2


def test_the_tools_of_mteb_read_the_results(run):
    import mteb

    tmp_path, _, board = run
    loaded = mteb.ResultCache(tmp_path / "out").load_results()
    table = loaded.to_dataframe().set_index("task_name")
    for task in board.suites["local sets"]:
        row = table.loc[task.name]
        assert row["gecko-jax/tiny"] == pytest.approx(task.scores[16])
        assert row["gecko-jax/tiny-8"] == pytest.approx(task.scores[8])
    assert {r["revision"] for r in loaded.model_revisions} == {"tiny-7"}
    (path,) = (tmp_path / "out" / "results").glob("gecko-jax__tiny-8/*/model_meta.json")
    card = json.loads(path.read_text())
    assert (card["embed_dim"], card["framework"]) == (8, ["JAX"])
    assert card["use_instructions"]


def test_every_dim_comes_from_one_encoding_over_the_mesh(run, tiny_gecko, folder):
    tmp_path, config, _ = run
    assert jax.device_count() == 8
    shared = mteb_suites._share(tiny_gecko, config.mesh)
    assert shared._sharding.mesh.size == 8
    num_encoded = int((tmp_path / "encoded").read_text())
    opened = vector_store.Store(config.cache.folder, shared, max_gib=1)
    assert num_encoded == len(opened)
    finding, pairs, topics = sets.load(folder)
    sentences = {*pairs.sentences1, *pairs.sentences2}
    texts = {*topics.train.texts, *topics.test.texts}
    # mteb encodes only the training texts that it draws.
    most = len(finding.texts) + len(finding.queries) + len(sentences) + len(texts)
    assert most - len(topics.train.texts) <= num_encoded <= most


def test_a_second_run_resumes_the_first(run, tiny_gecko, monkeypatch):
    tmp_path, config, board = run
    monkeypatch.setattr(embedding.Gecko, "encode", None)
    again = mteb_suites.run(tiny_gecko, config, tmp_path / "out", "tiny")
    assert again == board
    # If one result is missing, the task is evaluated again from the stored vectors.
    (path,) = (tmp_path / "out").glob("results/gecko-jax__tiny/*/pairs.json")
    path.unlink()
    again = mteb_suites.run(tiny_gecko, config, tmp_path / "out", "tiny")
    assert again.suites["local sets"][1].scores == pytest.approx(
        board.suites["local sets"][1].scores
    )
    assert path.exists()


def test_a_changed_file_is_scored_again(tiny_gecko, tmp_path):
    file = tmp_path / "pairs.tsv"
    rows = [
        f"{a} {b}\t{b}\t{n}\n" for n, (a, b) in enumerate(itertools.pairwise(WORDS))
    ]
    config = _config(tmp_path)
    config.folders = (str(file),)
    scores = []
    for content in (rows, rows[:3]):
        file.write_text("".join(content))
        board = mteb_suites.run(tiny_gecko, config, tmp_path / "out", "tiny")
        scores.append(board.suites["local sets"][0].scores)
        (expected,) = judge.evaluate(tiny_gecko, [file], dims=(8,)).rows
        assert scores[-1][8] == pytest.approx(expected.metrics["spearman"])
    assert scores[0] != scores[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"revision": "tiny-8"}, "revision 'tiny-7', and this model has 'tiny-8'"),
        ({"passage_length": 100}, "passage_length 200, and this model has 100"),
    ],
)
def test_results_of_another_model_are_refused(run, tiny_files, change, message):
    tmp_path, config, _ = run
    other = embedding.Gecko(dataclasses.replace(tiny_files, **change))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        mteb_suites.run(other, config, tmp_path / "out", "tiny")
    assert sorted(tmp_path.rglob("*")) == before


def test_results_without_a_model_are_refused(tiny_gecko, folder, tmp_path):
    (tmp_path / "out" / "results").mkdir(parents=True)
    config = _config(tmp_path)
    config.folders = (str(folder),)
    with pytest.raises(
        ValueError, match=r"without an evaluation\.json that names the model"
    ):
        mteb_suites.run(tiny_gecko, config, tmp_path / "out", "tiny")


def test_a_killed_run_leaves_no_partial_result(
    tiny_gecko, folder, tmp_path, monkeypatch
):
    import mteb

    write = mteb.TaskResult.to_disk

    def stop_halfway(result, path):
        write(result, path)
        path.write_text(path.read_text()[:100])
        raise KeyboardInterrupt

    config = _config(tmp_path)
    config.folders = (str(folder / "pairs.tsv"),)
    monkeypatch.setattr(mteb.TaskResult, "to_disk", stop_halfway)
    with pytest.raises(KeyboardInterrupt):
        mteb_suites.run(tiny_gecko, config, tmp_path / "out", "tiny")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "out").rglob("*.json")] == [
        "evaluation.json"
    ]
    assert not mteb_suites.run(tiny_gecko, config, tmp_path / "out", "tiny").failures
    found = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found >= {"evaluation.json", "pairs.json", "model_meta.json"}


def test_errors_name_a_damaged_result(run, tiny_gecko):
    tmp_path, config, _ = run
    (path,) = (tmp_path / "out").glob("results/gecko-jax__tiny/*/pairs.json")
    content = path.read_text()
    path.write_text(content[:100])
    again = mteb_suites.run(tiny_gecko, config, tmp_path / "out", "tiny")
    path.write_text(content)
    assert list(again.failures) == ["pairs"]
    assert "pairs.json: damaged" in again.failures["pairs"]
    assert len(again.suites["local sets"][0].scores) == len(DIMS)


@pytest.mark.usefixtures("offline")
def test_only_tasks_that_need_the_network_fail(tiny_gecko, folder, tmp_path, capsys):
    config = _config(tmp_path)
    config.suites = ("MIRACL", "NanoBEIR")
    config.tasks = ("STS12", "CQADupstackRetrieval")
    config.folders = (str(folder / "pairs.tsv"),)
    board = mteb_suites.run(tiny_gecko, config, tmp_path / "out", "tiny")
    assert len(board.failures) == 1 + 13 + 2
    assert board.failures["STS12"] == (
        "its data set mteb/sts12-sts is not on this machine and cannot be downloaded"
    )
    assert "data set" in board.failures["CQADupstackRetrieval"]
    assert all("\n" not in reason for reason in board.failures.values())
    assert len(board.suites["local sets"][0].scores) == len(DIMS)
    table = scoreboard.format_board(board)
    assert "did not run (16)" in table


@pytest.mark.usefixtures("offline")
def test_an_unreachable_hub_is_detected_once(tiny_gecko, tmp_path, monkeypatch, caplog):
    import huggingface_hub
    from datasets import config as datasets_config
    from huggingface_hub import constants

    asked = []

    def get_session():
        asked.append(1)
        raise RuntimeError("no such host\nand a second line")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", get_session)
    config = _config(tmp_path)
    config.tasks = ("STS12", "STS13")
    with caplog.at_level("WARNING", logger="absl"):
        board = mteb_suites.run(tiny_gecko, config, tmp_path / "out", "tiny")
    assert len(asked) == 1
    assert list(board.failures) == ["STS12", "STS13"]
    lines = [record.getMessage() for record in caplog.records]
    assert (
        len([line for line in lines if "cannot be reached (no such host)" in line]) == 1
    )
    assert constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=m"], "give at least one FOLDER, or a --config"),
        (
            ["f", "--config=c.py", "--model=m"],
            "FOLDER cannot be combined with --config",
        ),
        (["--config=c.py", "--dims=8", "--model=m"], "--dims cannot be combined with"),
        (["--config=c.py", "--model=m"], "--config needs --output"),
        (["f", "--config.dims=8", "--model=m"], "--config.dims=8 needs a --config"),
    ],
)
def test_folders_and_a_config_exclude_each_other(arguments, message, capsys):
    assert entry.main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("offline")
def test_the_command_ends_with_the_tables_and_an_error(
    tiny_files, folder, tmp_path, capsys
):
    from gecko_jax.formats import model_folder

    model_folder.save_model(tmp_path / "model", tiny_files)
    command = [
        "evaluate",
        f"--config={ROOT}/configs/evaluate.py:none",
        f"--config.folders={folder / 'pairs.tsv'}",
        f"--config.cache.folder={tmp_path / 'vectors'}",
        f"--model={tmp_path / 'model'}",
        f"--output={tmp_path / 'out'}",
    ]
    assert entry.main(command) == 0
    assert "cosine_spearman" in capsys.readouterr().out
    assert entry.main([*command, "--config.tasks=STS12"]) == 1
    printed = capsys.readouterr()
    assert "did not run (1)" in printed.out
    assert "1 of 2 tasks did not run" in printed.err
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(saved["failures"]) == ["STS12"]
    assert "STS12" in (tmp_path / "out" / "table.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("SciFat",)}, "no task 'SciFat'; did you mean SciFact"),
        ({"dims": (5,)}, r"dim=5: .* not trained"),
        ({"folders": ("nowhere",)}, "nowhere: no such file"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_written(
    tiny_gecko, tmp_path, changes, message
):
    config = _config(tmp_path)
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        mteb_suites.run(tiny_gecko, config, tmp_path / "out", "tiny")
    assert not list(tmp_path.iterdir())


def test_two_sets_of_one_name_are_refused(tiny_gecko, folder, tmp_path):
    config = _config(tmp_path)
    config.folders = (str(folder), str(folder / "pairs.tsv"))
    with pytest.raises(ValueError, match="two sets have the name 'pairs'"):
        mteb_suites.run(tiny_gecko, config, tmp_path / "out", "tiny")


def test_queries_that_need_two_kinds_of_passages_are_refused(tiny_gecko, folder):
    (found,) = sets.load(folder / "finding")
    count = len(found.tasks)
    mixed = dataclasses.replace(found, tasks=("sts",) + ("docs",) * (count - 1))
    with pytest.raises(ValueError, match="make a folder of each"):
        local_tasks.build(tiny_gecko, mixed)


def test_a_symmetric_set_has_the_same_score_in_mteb(tiny_gecko, folder, tmp_path):
    import mteb

    from gecko_jax.evaluation import mteb_suites

    (found,) = sets.load(folder / "finding")
    symmetric = dataclasses.replace(found, tasks=("sts",) * len(found.tasks))
    encoder = mteb_encoder.Encoder(
        tiny_gecko,
        vector_store.Store(tmp_path, tiny_gecko, max_gib=1),
        dim=16,
        name="a/b",
        query_length=tiny_gecko.files.query_length,
        passage_length=tiny_gecko.files.passage_length,
    )
    with mteb_suites._quiet():
        result = mteb.evaluate(
            encoder, local_tasks.build(tiny_gecko, symmetric), cache=None
        )
    (row,) = judge._judge(tiny_gecko, symmetric, (16,))
    score = result.task_results[0].get_score()
    assert score == pytest.approx(row.metrics["ndcg_at_10"], abs=1e-5)


def test_every_task_of_the_suites_has_an_instruction():
    import mteb

    for suite in ("MTEB(eng, v1)", "MTEB(eng, v2)", "NanoBEIR"):
        for task in mteb.get_benchmark(suite).tasks:
            known = task.metadata
            made_from = known.adapted_from or ()
            instructions.find(known.name, known.type, made_from)
            if known.type in ("Retrieval", "Reranking"):
                assert {known.name, *made_from} & instructions.BY_NAME.keys()
            else:
                assert known.type in instructions.BY_TYPE
    # A name that mteb does not have would never match.
    for name in instructions.BY_NAME:
        assert mteb.get_task(name).metadata.name == name
    assert len(mteb.get_task("MIRACLRetrieval").hf_subsets) == 18


@pytest.mark.slow
def test_every_type_of_task_runs_through_the_encoder(tiny_gecko, tmp_path):
    import mteb

    encoder = mteb_encoder.Encoder(
        tiny_gecko,
        vector_store.Store(tmp_path, tiny_gecko, max_gib=1),
        dim=16,
        name="a/b",
        query_length=64,
        passage_length=200,
    )
    with mteb_suites._quiet():
        outcome = mteb.mock_run(encoder)
    ran = {name: found for name, found in outcome.items() if found is not None}
    assert len(ran) >= 25
    for name, found in ran.items():
        assert getattr(found, "exception", None) is None, name
    for kind in (
        "Classification",
        "Clustering",
        "PairClassification",
        "Reranking",
        "STS",
        "Summarization",
        "BitextMining",
        "Retrieval",
        "Regression",
        "MultilabelClassification",
        "Instruction",
        "ZeroShot",
    ):
        assert any(kind in name for name in ran), kind


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        ("", ("MTEB(eng, v1)",)),
        ("v1,v2", ("MTEB(eng, v1)", "MTEB(eng, v2)")),
        ("nano,miracl", ("NanoBEIR", "MIRACL")),
        ("none", ()),
        ("local", ()),
    ],
)
def test_every_argument_of_the_config(argument, names):
    config = flags.load(f"{ROOT}/configs/evaluate.py:{argument}")
    assert config.suites == names
    assert set(config.suites) <= set(gecko_jax.config.SUITES)
    if argument != "none":
        gecko_jax.config.check_evaluation(config)


def test_the_error_for_a_missing_mteb_names_the_extra(
    tiny_gecko, tmp_path, monkeypatch
):
    import sys

    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ImportError, match=r"gecko-jax\[eval\]"):
        mteb_suites.run(tiny_gecko, ml_collections.ConfigDict(), tmp_path, "x")
