"""The recipe: golden examples, every source, every set, every mixture, bad inputs."""

import dataclasses
import gzip
import json
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from gecko_jax import cli, text
from gecko_jax.data import (
    classification,
    jsonl,
    load_seqio,
    mixtures,
    prepare,
    preprocessors,
    sources,
    tasks,
)

TABLE = {task.name: task for task in tasks.TASKS if task.source}
NLI = [
    {"premise": "A man sleeps.", "hypothesis": "A man rests.", "label": 0},
    {"premise": "A man sleeps.", "hypothesis": "A man runs.", "label": 2},
    {"premise": "A man sleeps.", "hypothesis": "A man dreams.", "label": 1},
    {"premise": "A dog.", "hypothesis": "An animal.", "label": 0},
    {"premise": "A cat.", "hypothesis": "?", "label": -1},
]
LABELLED = [
    {"text": "loved it", "label": 1},
    {"text": "great fun", "label": 1},
    {"text": "dull", "label": 0},
    {"text": "a bore", "label": 0},
]
MIRACL = {
    "query_id": "7",
    "query": "who",
    "positive_passages": [
        {"docid": "1#0", "title": "A", "text": "a"},
        {"docid": "1#1", "title": "A", "text": "aa"},
    ],
    "negative_passages": [{"docid": "2#0", "title": "B", "text": "b"}],
}
HOTPOT = {
    "id": "5a",
    "question": "Who?",
    "supporting_facts": {"title": ["A"], "sent_id": [0]},
    "context": {"title": ["A", "B"], "sentences": [["a ", "b"], ["c"]]},
}
FEVER = {
    "claim": "Honey spoils.",
    "label": "REFUTES",
    "evidence": [["Honey_-LRB-food-RRB-", 3, "Honey keeps."]],
}
MEDMCQA = {
    "question": "Where is insulin made?",
    "opa": "Liver",
    "opb": "Pancreas",
    "opc": "Spleen",
    "opd": "Lung",
    "cop": 1,
    "exp": "Beta cells make it.",
}
NATURAL = {
    "question": {"text": "who found it"},
    "document": {
        "title": "Honey",
        "tokens": {
            "token": ["<P>", "Bees", "did", "</P>"],
            "is_html": [True, False, False, True],
        },
    },
    "annotations": {"long_answer": {"start_token": [-1, 0], "end_token": [-1, 4]}},
}
# Task -> two or more records in the real schema of its source.
RECORDS = {
    "gooaq": [{"id": 1, "question": "what is it", "answer": "A lizard."}],
    "stackexchange_title_body": [{"title": "a &amp; b", "body": "<p>Why?</p>"}],
    "stackexchange_qa": [{"title": "a < b?", "answer": "<b>No</b>, b &lt; a"}],
    "hotpotqa": [HOTPOT],
    "fever": [FEVER],
    "medmcqa": [MEDMCQA],
    **{name: [MIRACL] for name in TABLE if name.startswith("miracl_")},
}


def split(found):
    found = list(found)
    lines = [line for line in found if isinstance(line, dict)]
    return lines, [line.reason for line in found if not isinstance(line, dict)]


def test_nli_groups_by_premise():
    lines, dropped = split(preprocessors.nli(NLI))
    assert lines == [
        {
            "query": "A man sleeps.",
            "positive": "A man rests.",
            "negatives": ["A man runs."],
        }
    ]
    assert dropped == [
        "neutral",
        "annotators disagree",
        "no contradiction of this premise",
    ]


@pytest.mark.parametrize(
    ("preprocessor", "record", "line"),
    [
        (
            preprocessors.fact_verification,
            FEVER,
            {
                "query": "Honey spoils.",
                "positive": "Honey keeps.",
                "title": "Honey (food)",
            },
        ),
        (
            preprocessors.multiple_choice,
            MEDMCQA,
            {
                "query": "Where is insulin made?",
                "positive": "Pancreas. Beta cells make it.",
                "negatives": ["Liver", "Spleen", "Lung"],
            },
        ),
        (
            preprocessors.multi_hop,
            HOTPOT,
            {
                "query": "Who?",
                "query_id": "5a",
                "positive": "a b",
                "title": "A",
                "negatives": ["c"],
                "negative_titles": ["B"],
            },
        ),
        (
            preprocessors.natural_questions,
            NATURAL,
            {"query": "who found it", "positive": "Bees did", "title": "Honey"},
        ),
    ],
)
def test_golden_examples(preprocessor, record, line):
    assert split(preprocessor([record])) == ([line], [])


EMPTY = {"docid": "3#0", "title": "C", "text": " "}


@pytest.mark.parametrize(
    ("preprocessor", "record", "positives", "reasons"),
    [
        # Sentences come in the page's order, and marks of titles are read.
        (
            preprocessors.fact_verification,
            {**FEVER, "evidence": [["A-COLON-B", 7, "two."], ["A-COLON-B", 2, "one."]]},
            [("A:B", "one. two.")],
            [],
        ),
        (
            preprocessors.fact_verification,
            {**FEVER, "evidence": [["A", 1, " "], [None, 2, "x"]]},
            [],
            ["no evidence"],
        ),
        (
            preprocessors.fact_verification,
            {**FEVER, "label": "NOT ENOUGH INFO"},
            [],
            ["no evidence"],
        ),
        (preprocessors.multiple_choice, {**MEDMCQA, "cop": -1}, [], ["no answer"]),
        (preprocessors.multiple_choice, {**MEDMCQA, "opb": ""}, [], ["empty text"]),
        (
            preprocessors.multiple_choice,
            {**MEDMCQA, "exp": None, "opa": "Pancreas", "opd": ""},
            [(None, "Pancreas")],
            [],
        ),
        (
            preprocessors.multi_hop,
            {**HOTPOT, "supporting_facts": {"title": ["Z"]}},
            [],
            ["no positive"],
        ),
        (
            preprocessors.natural_questions,
            {
                **NATURAL,
                "annotations": {"long_answer": {"start_token": [-1], "end_token": [3]}},
            },
            [],
            ["no long answer"],
        ),
        (
            preprocessors.natural_questions,
            {
                **NATURAL,
                "annotations": {"long_answer": {"start_token": [3], "end_token": [4]}},
            },
            [],
            ["empty text"],
        ),
        (
            preprocessors.passage_lists,
            {**MIRACL, "positive_passages": []},
            [],
            ["no positive"],
        ),
        (preprocessors.passage_lists, {**MIRACL, "query": " "}, [], ["empty text"]),
        (
            preprocessors.passage_lists,
            {
                **MIRACL,
                "positive_passages": [EMPTY, MIRACL["positive_passages"][0]],
                "negative_passages": [EMPTY, *MIRACL["negative_passages"]],
            },
            [("A", "a")],
            ["empty text"],
        ),
    ],
)
def test_what_is_left_out_has_a_reason(preprocessor, record, positives, reasons):
    lines, dropped = split(preprocessor([record]))
    assert [(line.get("title"), line["positive"]) for line in lines] == positives
    assert dropped == reasons
    for line in lines:
        wrong = {
            preprocessors.multiple_choice: ["Spleen"],
            preprocessors.passage_lists: ["b"],
        }
        assert line.get("negatives") == wrong.get(preprocessor)


def test_nli_without_entailment_is_left_out():
    _, dropped = split(preprocessors.nli([NLI[1], {**NLI[0], "hypothesis": ""}]))
    assert dropped == ["empty text", "no entailment of this premise"]


def test_classification_leaves_out_what_has_no_partner():
    records = [
        *LABELLED,
        {"text": "dull", "label": 1},
        {"text": "so so", "label": 2},
        {"text": "unknown", "label": -1},
        {"text": "unsaid", "label": None},
        {"text": " ", "label": 1},
    ]
    lines, dropped = split(classification.triples(records))
    assert len(lines) == 4
    assert dropped == [
        "duplicate text",
        "no label",
        "no label",
        "empty text",
        "only text of its label",
    ]
    with pytest.raises(ValueError, match=r"s 1\.5 is out of range"):
        list(
            classification.threshold(
                [{"t": "a", "s": 1.5}], text="t", score="s", low=0.0, high=1.0
            )
        )


@pytest.mark.parametrize("seed", range(5))
def test_no_text_is_its_own_positive(seed):
    lines, _ = split(classification.triples(LABELLED, seed=seed))
    assert all(line["query"] != line["positive"] for line in lines)


def test_toxicity_needs_a_clear_score():
    scores = {"a": 0.0, "b": 0.0, "c": 0.9, "d": 0.5, "e": 0.2}
    records = [{"text": name, "toxicity": score} for name, score in scores.items()]
    lines, dropped = split(TABLE["civil_comments_toxicity"].preprocessor(records))
    assert {line["query"] for line in lines} == {"a", "b", "c", "d"}
    assert dropped == ["no label"]


def test_descriptions_given_beforehand_stay():
    found = tasks.complete_text_format(
        text.TextFormat(task_descriptions={"snli": "given"}), tasks.TASKS
    )
    assert found.describe("snli") == "given"
    assert found.describe("mnli") == "semantic similarity"
    assert (
        found.describe("docs") == found.describe("quickstart_docs") == "search result"
    )
    assert found.is_symmetric("snli")
    assert not found.is_symmetric("fever")
    (row,) = tasks.from_files(["a", "b"], [{}, {"snli": 3}], found)
    assert (row.files, row.num_examples, row.symmetric) == (("b",), 3, True)
    assert row.task_description == "given"


def test_shares_and_temperature_are_honoured():
    drawn = mixtures.Mixture(("a", "b"), {"a": 1.0, "b": 3.0})
    assert drawn.rates(["b", "a"], [5, 5]) == [3.0, 1.0]
    with pytest.raises(ValueError, match=r"temperature 0\.0: must be above 0"):
        mixtures.Mixture(("a",), temperature=0.0).rates(["a"], [1])


def test_half_prepared_sets_have_no_files(tmp_path):
    folder = tmp_path / "fever"
    folder.mkdir()
    (folder / "part-00000.jsonl.gz").write_bytes(b"")
    assert not mixtures.locate(TABLE["fever"], tmp_path).files
    (folder / "prepared.json").write_text("{}")
    assert len(mixtures.locate(TABLE["fever"], tmp_path).files) == 1


def test_several_positives_share_their_negatives():
    lines, _ = split(preprocessors.passage_lists([MIRACL]))
    assert [line["positive"] for line in lines] == ["a", "aa"]
    assert [line["passage_id"] for line in lines] == ["1#0", "1#1"]
    for line in lines:
        assert line["negatives"] == ["b"]
        assert line["negative_ids"] == ["2#0"]
        assert line["negative_titles"] == ["B"]


def test_pairs_lose_html_and_control_characters():
    records = [{"q": "<b>a\x00</b> &amp; b", "p": "x\x07y", "t": "T"}]
    lines, _ = split(
        preprocessors.pairs(records, query="q", positive="p", title="t", is_html=True)
    )
    assert lines == [{"query": "a & b", "positive": "xy", "title": "T"}]


@pytest.mark.parametrize("unique_ids", classification.UNIQUE_IDS)
def test_classification_draws_same_and_other_label(unique_ids):
    lines, _ = split(
        classification.triples(LABELLED, num_labels=2, unique_ids=unique_ids)
    )
    label = {record["text"]: record["label"] for record in LABELLED}
    for number, line in enumerate(lines):
        texts = [line["query"], line["positive"], *line["negatives"]]
        if unique_ids == "text":
            assert all(t.endswith(f" {number}") for t in texts)
            texts = [t.removesuffix(f" {number}") for t in texts]
        else:
            assert line["negative_group"] == number + 1
        query, positive, negative = texts
        assert query != positive
        assert label[query] == label[positive] != label[negative]
    assert len(lines) == 4


def test_emotions_and_toxicity_become_labels():
    rows = [{"c": "ta", "joy": True, "fear": False}, {"c": "eh", "joy": 1, "fear": 1}]
    found = classification.one_true_column(rows, text="c", columns=("joy", "fear"))
    assert [row["label"] for row in found] == ["joy", None]
    rows = [{"t": "a", "s": s} for s in (0.0, 0.3, 0.5)]
    found = classification.threshold(rows, text="t", score="s", low=0.0, high=0.5)
    assert [row["label"] for row in found] == ["low", None, "high"]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: preprocessors.nli([{**NLI[0], "label": 7}]),
            "label 7 is out of range",
        ),
        (lambda: preprocessors.nli([{"premise": "a", "label": 0}]), "no field 'hypoth"),
        (
            lambda: preprocessors.multiple_choice([{**MEDMCQA, "cop": 4}]),
            "label 4 is out of range",
        ),
        (
            lambda: preprocessors.fact_verification([{**FEVER, "label": "MAYBE"}]),
            "'MAYBE' is out of range",
        ),
        (
            lambda: classification.triples([{"text": "a", "label": 2}], num_labels=2),
            "label 2 is out of range: there are 2",
        ),
        (lambda: classification.triples(LABELLED[:2]), "at least two labels"),
        (lambda: sources.read("x.parquet"), "no such file"),
        (lambda: sources.read("x.csv"), "cannot tell what it is"),
    ],
)
def test_bad_input_is_named(run, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        list(run())


def write_source(folder, kind, records):
    """Writes records as a source of the table would lie on disk."""
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        path = folder / "train-0.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path = folder / "train.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    return str(path)


@pytest.mark.parametrize("name", RECORDS)
def test_every_set_of_files_is_prepared(tmp_path, name):
    task = TABLE[name]
    source = write_source(tmp_path, task.source, RECORDS[name])
    summary = prepare.prepare(task, tmp_path / "p", source=source)
    located = mixtures.locate(task, tmp_path / "p")
    pairs = [p for path in located.files for p in jsonl.read_pairs(path, name)]
    assert len(pairs) == summary.examples > 0
    again = prepare.prepare(task, tmp_path / "p", source=source)
    assert again == summary


def test_a_set_gets_as_many_negatives_as_are_asked_for(tmp_path):
    words = ("lizard", "gecko", "snake", "bird")
    records = [
        {"question": f"animal named {w}", "answer": f"a {w} is an animal that moves"}
        for w in words
    ]
    task = dataclasses.replace(TABLE["gooaq"], mine=True)
    source = write_source(tmp_path, task.source, records)
    one, two = tmp_path / "one", tmp_path / "two"
    prepare.prepare(task, one, source=source)
    prepare.prepare(task, two, source=source, negatives=2)
    for folder, wanted in ((one, 1), (two, 2)):
        located = mixtures.locate(task, folder)
        pairs = [p for path in located.files for p in jsonl.read_pairs(path)]
        mined = [len(pair.negatives) for pair in pairs]
        assert mined == [wanted] * 4
    with pytest.raises(ValueError, match="by other settings"):
        prepare.prepare(task, one, source=source, negatives=2)


@pytest.mark.parametrize(
    "name", [n for n, t in TABLE.items() if t.source.startswith("tfds:")]
)
def test_every_tfds_set_is_prepared(tmp_path, name, monkeypatch):
    load_seqio()
    import tensorflow_datasets as tfds

    def as_dataset(self, *args, **kwargs):
        import tensorflow as tf

        rng = np.random.default_rng(0)

        def four(item):
            if isinstance(item, dict):
                # Ragged within ragged is more than a generator can give.
                return {k: four(v) for k, v in item.items() if k != "short_answers"}
            return [item] * 4

        def value(feature, path, n):
            if isinstance(feature, tfds.features.FeaturesDict):
                return {k: value(f, k, n) for k, f in feature.items()}
            if isinstance(feature, tfds.features.Sequence):
                return four(value(feature.feature, path, n))
            dtype = feature.np_dtype
            if dtype == np.bool_:
                return path == ("joy" if n % 2 else "anger")
            if path == "start_token":
                return 0
            if path == "end_token":
                return 4
            if np.issubdtype(dtype, np.integer):
                return n % 2 * (2 if "premise" in self.info.features else 1)
            if np.issubdtype(dtype, np.floating):
                return float(n % 2)
            if path == "intent_name":
                return f"intent {n % 2}"
            if path == "premise":
                return f"premise {n // 2}"
            return f"{path} {n} {rng.integers(9)}"

        records = [value(self.info.features, "", n) for n in range(8)]
        spec = self.info.features.get_tensor_spec()
        spec.get("annotations", {}).pop("short_answers", None)
        return tf.data.Dataset.from_generator(lambda: records, output_signature=spec)

    with tfds.testing.mock_data(as_dataset_fn=as_dataset):
        summary = prepare.prepare(
            TABLE[name], tmp_path, accepted_licences=(name,), part=3
        )
    assert summary.examples > 0
    assert len(list(summary.folder.glob("part-*"))) == -(-summary.examples // 3)


@pytest.mark.parametrize("stop", [3, 6])
def test_interrupted_preparation_goes_on(tmp_path, monkeypatch, stop):
    task = TABLE["fever"]
    records = [
        {**FEVER, "claim": f"q {n}", "evidence": [[f"P{n % 5}", 0, f"a q {n % 7}"]]}
        for n in range(10)
    ]
    source = write_source(tmp_path, "jsonl", records)
    write, calls = prepare.mining.write_lines, []

    def fail(path, lines):
        calls.append(path)
        if len(calls) == stop:
            raise KeyboardInterrupt
        write(path, lines)

    monkeypatch.setattr(prepare.mining, "write_lines", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(task, tmp_path / "a", source=source, part=3)
    assert not mixtures.locate(task, tmp_path / "a").files
    summary = prepare.prepare(task, tmp_path / "a", source=source, part=3)
    # Four parts are read and four are mined: what was there is not written again.
    assert len(calls) == 4 + 4 + 1
    monkeypatch.undo()
    whole = prepare.prepare(task, tmp_path / "b", source=source, part=3)
    assert summary.dropped == whole.dropped
    for one, other in zip(
        sorted(summary.folder.glob("part-*")),
        sorted(whole.folder.glob("part-*")),
        strict=True,
    ):
        assert one.read_bytes() == other.read_bytes()


def test_a_source_that_changed_meanwhile_is_refused(tmp_path, monkeypatch):
    task, target = TABLE["gooaq"], tmp_path / "p"
    records = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(4)]
    source = write_source(tmp_path, "parquet", records)
    with monkeypatch.context() as patched:
        patched.setattr(prepare.mining, "extend", None)
        with pytest.raises(TypeError):
            prepare.prepare(task, target, source=source, part=3)
    write_source(tmp_path, "parquet", [{"question": "q", "answer": "other"}] * 4)
    with pytest.raises(ValueError, match="the source has changed since"):
        prepare.prepare(task, target, source=source, part=3)
    folder = beir_folder(tmp_path / "beir")
    assert sources.stamps(folder)[f"{folder}/qrels/train.tsv"][0] == 38
    assert sources.stamps("tfds:snli:train") == {}


def test_restricted_licence_must_be_accepted(tmp_path):
    with pytest.raises(ValueError, match="--accept-licence=imdb_sentiment"):
        prepare.prepare(TABLE["imdb_sentiment"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_drops_are_counted_and_empty_sets_refused(tmp_path):
    records = [
        {"question": "q", "answer": "a"},
        {"question": "q", "answer": "a"},
        {"question": "q", "answer": None},
        {"question": "same", "answer": "same"},
    ]
    task = TABLE["gooaq"]
    source = write_source(tmp_path, "parquet", records)
    summary = prepare.prepare(task, tmp_path / "p", source=source)
    assert summary.examples == 1
    assert summary.dropped == {
        "duplicate": 1,
        "empty text": 1,
        "positive equals query": 1,
    }
    with pytest.raises(ValueError, match="gives no example"):
        prepare.prepare(
            task,
            tmp_path / "q",
            source=write_source(tmp_path, "parquet", records[2:3]),
        )


def test_negatives_are_mined_from_the_whole_source(tmp_path):
    evidence = [
        {**FEVER, "claim": "Honey of bees", "evidence": [["A", 0, "Honey is food"]]},
        {**FEVER, "claim": "Sea of salt", "evidence": [["C", 0, "Salty water"]]},
        {**FEVER, "claim": "Bees make food", "evidence": [["B", 0, "Bees make honey"]]},
        {**FEVER, "claim": "A word alone", "evidence": [["D", 0, "Xyzzy"]]},
    ]
    source = write_source(tmp_path, "jsonl", evidence)
    for part in (1, 2, 9):
        target = tmp_path / f"p{part}"
        summary = prepare.prepare(TABLE["fever"], target, source=source, part=part)
        assert (summary.examples, summary.without_negative) == (4, 2)
        lines = [
            pair
            for path in mixtures.locate(TABLE["fever"], target).files
            for pair in jsonl.read_pairs(path)
        ]
        assert [pair.negatives for pair in lines] == [
            ("Bees make honey",),
            (),
            ("Honey is food",),
            (),
        ]
        assert lines[0].negative_titles == ("B",)
        names = {path.name for path in summary.folder.iterdir()}
        assert names == {
            "prepared.json",
            *(f"part-{n:05}.jsonl.gz" for n in range(-(-4 // part))),
        }


def write_lines(path, *records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def beir_folder(folder, corpus=(), queries=(), judged=()):
    """A sound folder of one query and two passages, and what is added to it."""
    write_lines(
        folder / "corpus.jsonl",
        {"_id": "d1", "title": "A", "text": "a"},
        {"_id": "d2", "text": "b"},
        *corpus,
    )
    write_lines(folder / "queries.jsonl", {"_id": "q", "text": "who"}, *queries)
    (folder / "qrels").mkdir(exist_ok=True)
    rows = ["query-id\tcorpus-id\tscore", "q\td1\t1", "q\td2\t0", *judged]
    (folder / "qrels" / "train.tsv").write_text("\n".join(rows))
    return str(folder)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (
            {"corpus": [{"_id": "d1", "text": "other"}]},
            "corpus.jsonl:3: _id 'd1' was given before, at {}/corpus.jsonl:1",
        ),
        (
            {"queries": [{"_id": "q", "text": "who"}]},
            "queries.jsonl:2: _id 'q' was given before, at {}/queries.jsonl:1",
        ),
        (
            {"judged": ["q\td1\t0"]},
            "train.tsv:4: query 'q' and passage 'd1' were judged before, at "
            "{}/qrels/train.tsv:2",
        ),
        ({"judged": ["q\td3\thigh"]}, "train.tsv:4: score 'high' is not a number"),
        ({"judged": ["q d3 1"]}, "train.tsv:4: 1 column;"),
        ({"judged": ["q\td9\t1"]}, "train.tsv:4: passage 'd9' is not in the corpus"),
        ({"corpus": [{"text": "a"}]}, "corpus.jsonl:3: no field '_id' (it has text)"),
        (
            {"corpus": [{"_id": "d3"}], "judged": ["q\td3\t1"]},
            "corpus.jsonl:3: no field 'text'",
        ),
        (
            {"queries": [{"_id": "r"}], "judged": ["r\td1\t1"]},
            "queries.jsonl:2: no field 'text'",
        ),
    ],
)
def test_bad_beir_folders_are_named(tmp_path, added, message):
    folder = beir_folder(tmp_path, **added)
    with pytest.raises(ValueError, match=re.escape(message.format(tmp_path))):
        list(sources.read(folder))


@pytest.mark.parametrize("name", ["id", "_id"])
def test_an_id_may_come_once_in_a_source(tmp_path, name):
    one, two = {name: 7, "question": "q"}, {name: 8, "question": "q"}
    write_lines(tmp_path / "a.jsonl", one, {"question": "has none"}, two)
    last = write_lines(tmp_path / "b.jsonl", {"question": "has none"}, {name: "7"})
    message = f"{last}:2: {name} '7' was given before, at {tmp_path}/a.jsonl:1"
    with pytest.raises(ValueError, match=re.escape(message)):
        list(sources.read(f"{tmp_path}/*.jsonl"))
    assert len(list(sources.read(str(tmp_path / "a.jsonl")))) == 3


@pytest.mark.parametrize("kind", ["parquet", "tfrecord", "arrayrecord", "jsonl.gz"])
def test_a_damaged_file_is_named(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(
        gzip.compress(b'{"a": 1}\n' * 9)[:-9] if "gz" in kind else b"\0" * 50
    )
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*not a whole"):
        list(sources.read(f"{kind.removesuffix('.gz')}:{path}"))


@pytest.mark.parametrize("line", ['{"a": ', "[1]", "9" * 5000, "[" * 9999, "\xff"])
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}:2: "):
        list(sources.read(str(path)))


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_tf_examples_are_read(tmp_path, kind):
    load_seqio()
    import tensorflow as tf
    from array_record.python import array_record_module

    features = {
        "question": tf.train.Feature(
            bytes_list=tf.train.BytesList(value=["é".encode()])
        ),
        "cop": tf.train.Feature(int64_list=tf.train.Int64List(value=[3])),
    }
    record = tf.train.Example(
        features=tf.train.Features(feature=features)
    ).SerializeToString()
    path = str(tmp_path / f"a.{kind}")
    if kind == "tfrecord":
        with tf.io.TFRecordWriter(path) as writer:
            writer.write(record)
    else:
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
        writer.write(record)
        writer.close()
    assert list(sources.read(path)) == [{"question": "é", "cop": 3}]


@pytest.mark.parametrize("name", mixtures.MIXTURES)
def test_every_mixture_has_its_rows_and_rates(name, tmp_path):
    rows, drawn = mixtures.describe(name)
    sizes = [1_000 * (n + 1) for n in range(len(rows))]
    rates = drawn.rates([row.name for row in rows], sizes)
    assert len(rates) == len(rows)
    assert min(rates) > 0
    if name != "quickstart":
        with pytest.raises(ValueError, match="not prepared"):
            mixtures.resolve(name, tmp_path)


def test_rates_by_size_are_capped_and_tempered():
    drawn = mixtures.Mixture(("a", "b"), cap=400, temperature=2.0)
    assert drawn.rates(["a", "b"], [100, 10_000]) == [10.0, 20.0]
    with pytest.raises(ValueError, match="task b has the rate 0"):
        mixtures.Mixture(("a", "b"), {"a": 1.0, "b": 0.0}).rates(["a", "b"], [1, 1])


_ANY = strategies.text(strategies.characters(exclude_categories=()))


@hypothesis.given(_ANY, _ANY)
@hypothesis.example("half \ud800", "whole")
@hypothesis.example("whole", "half \udfff")
@hypothesis.settings(max_examples=200, deadline=None)
def test_any_text_survives_or_is_left_out(query, positive):
    lines, dropped = split(
        preprocessors.pairs(
            [{"q": query, "p": positive}], query="q", positive="p", is_html=False
        )
    )
    assert len(lines) + len(dropped) == 1
    for line in lines:
        written = json.loads(json.dumps({**line, "task": "t"}))
        if any("\ud800" <= letter <= "\udfff" for letter in query + positive):
            with pytest.raises(ValueError, match=r"here: field .* lone surrogate"):
                jsonl.parse("here", written)
        else:
            pair = jsonl.parse("here", written)
            assert (pair.query, pair.positive) == (line["query"], line["positive"])


def cli_prepare(capsys, *arguments):
    status = cli.main(["data", "prepare", *map(str, arguments)])
    return status, capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "records", "message"),
    [
        ("gooaq", [{"question": "q"}], "record 1: a record has no field 'answer' (it"),
        (
            "medmcqa",
            [MEDMCQA, {**MEDMCQA, "cop": 4}],
            "record 2: label 4 is out of range",
        ),
        ("medmcqa", [{**MEDMCQA, "cop": "b"}], "record 1: "),
        ("fever", [{**FEVER, "label": "MAYBE"}], "record 1: label 'MAYBE' is out of"),
        ("fever", [{**FEVER, "evidence": [["A", 0]]}], "record 1: "),
        ("fever", [{**FEVER, "evidence": 3}], "record 1: "),
        ("fever", [{**FEVER, "claim": 3}], "record 1: field 'claim' is a int"),
        ("fever", [{**FEVER, "id": 3}] * 2, "train.jsonl.gz:2: id 3 was given before"),
        (
            "hotpotqa",
            [{**HOTPOT, "context": {"x": 1}}],
            "record 1: a record has no field",
        ),
        ("miracl_en", [{**MIRACL, "positive_passages": ["a"]}], "record 1: "),
        ("fever", [{**FEVER, "label": "NOT ENOUGH INFO"}], "(left out: 1 no evidence)"),
        ("fever", [], "gives no example; check the split"),
    ],
)
def test_bad_sources_are_told(tmp_path, capsys, name, records, message):
    source = write_source(tmp_path, TABLE[name].source, records)
    target = tmp_path / "prepared"
    status, printed = cli_prepare(
        capsys, name, f"--source={source}", f"--prepared-dir={target}"
    )
    assert status == 1
    assert message in printed.err
    assert "Traceback" not in printed.err
    # What was begun is hidden, and no set is there.
    assert not mixtures.locate(TABLE[name], target).files
    assert all(path.name.startswith(".") for path in target.glob("*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imdb_sentiment"], "its licence is restricted (IMDb's"),
        (["fever"], "give its files, as jsonl, with --source=PATH"),
        (["fever", "--source=none.jsonl"], "none.jsonl: no such file"),
        (["fever", "--source=none.csv"], "none.csv: cannot tell what it is"),
        (["fever", "--source=tfds:no_such_set:train"], "TFDS has no such set"),
        (["quickstart_docs"], "lies ready as JSONL"),
        (["nothing"], "nothing: is no set of the table"),
    ],
)
def test_bad_requests_are_told(tmp_path, capsys, arguments, message):
    status, printed = cli_prepare(capsys, *arguments, f"--prepared-dir={tmp_path}/p")
    assert status == 1
    assert message in printed.err
    assert not list(tmp_path.glob("p/[!.]*"))
