"""seqio's tasks: texts are written as the format says, and found by name."""

import importlib

import pytest

from gecko_jax.data import formatting, jsonl, load_seqio, registration, task_table
from gecko_jax.text import text_formats, vocabularies

TASK = task_table.Task("qa", "question answering")


def parse(**fields):
    return jsonl.parse("here", {"task": "qa", **fields})


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("body", "title"),
    [
        ("plain", ""),
        ("  spaces\u3000and\nlines ", "a  title"),
        ("e\u0301 decomposed {title} {text} | query:", " \t"),
    ],
)
# The last is the name of a task, and stands for itself all the same.
@pytest.mark.parametrize("own", ["", "fact checking", "docs"])
def test_examples_are_written_as_the_encoder_reads_them(body, title, own, symmetric):
    text_format = text_formats.TextFormat(
        task_descriptions={"qa": "question answering", "docs": "search result"},
        symmetric_tasks=("qa",) if symmetric else (),
    )
    pair = parse(
        query=body,
        positive=body,
        title=title,
        task_description=own,
        negatives=["wrong", "bad"],
        negative_titles=["", "T"],
    )
    prefix = f"task: {own or 'question answering'} | query: "
    query, positive, negatives = formatting.write(text_format, TASK, pair)
    assert query == f"{prefix}{text_formats.clean(body)}"
    if symmetric:
        assert (positive, negatives) == (query, (f"{prefix}wrong", f"{prefix}bad"))
    else:
        assert positive == text_format.format_passage(body, title)
        assert negatives == ("title: none | text: wrong", "title: T | text: bad")


@pytest.mark.parametrize(
    ("task", "prompt"), [("qa", "query: "), ("sts", "as {text}: ")]
)
def test_prompts_of_an_imported_model_are_written_literally(task, prompt):
    """A description without a prompt is not written before the text."""
    prompts = {"query": "query: ", "document": "{title} ", "sts": "as {text}: "}
    text_format = text_formats.TextFormat("{text}", "{text}", "", prompts=prompts)
    (row,) = task_table.from_files(["x.jsonl"], [{task: 1}], text_format)
    completed = formatting.complete_text_format(text_format, [row])
    assert completed == text_format
    pair = parse(
        query="what do geckos eat",
        task_description="find answers",
        positive="Insects.",
        title="Food",
        negatives=["Bread."],
    )
    assert formatting.write(completed, row, pair) == (
        f"{prompt}what do geckos eat",
        "{title} Food Insects.",
        ("{title} Bread.",),
    )


def test_quickstart_is_a_seqio_mixture():
    """The golden example of each bundled task, through seqio alone."""
    seqio = load_seqio()
    assert registration.register("quickstart") is registration.register("quickstart")
    assert seqio.get_mixture_or_task("quickstart").num_input_examples("train") == 3828
    pieces = vocabularies.load(task_table.QUICKSTART_VOCABULARY)
    golden = {
        "quickstart_docs": (
            "task: search result | query: PostgreSQL: Arrays",
            "title: none | text: 8.15.1. Declaration of Array Types",
        ),
        "quickstart_wordnet": (
            "task: dictionary definition | query: omphaloskepsis, navel-gazing",
            "title: none | text: literally, the contemplation of one's navel",
        ),
        "quickstart_code": (
            "task: code retrieval | query: Create node positions using :mod:`pydot`",
            'title: none | text: def pydot_layout(G, prog="neato", root=None):',
        ),
        "quickstart_term": (
            "task: question answering | query: What is B5?",
            "title: none | text: [common] Abbreviation for “Babylon 5”",
        ),
    }
    for name, (query, positive) in golden.items():
        dataset = seqio.get_mixture_or_task(name).get_dataset(
            sequence_length=None, split="train", shuffle=False
        )
        record = next(dataset.take(1).as_numpy_iterator())
        assert pieces.decode(record["query"].tolist()).startswith(query)
        assert pieces.decode(record["positive"].tolist()).startswith(positive)
        assert record["query"][-1] == record["positive"][-1] == 1
    mixture = seqio.get_mixture_or_task("quickstart")
    dataset = mixture.get_dataset(
        sequence_length={"query": 8, "positive": 16}, split="train", shuffle=False
    )
    assert len(next(dataset.as_numpy_iterator())["positive"]) <= 16


def test_a_mixture_keeps_the_ids_of_its_examples():
    """seqio's mixtures drop what is not among the output features of a task."""
    seqio = load_seqio()
    registration.register("quickstart")
    alone = seqio.get_mixture_or_task("quickstart_docs").get_dataset(
        sequence_length=None, split="train", shuffle=False
    )
    mixed = seqio.get_mixture_or_task("quickstart").get_dataset(
        sequence_length=None, split="train", shuffle=False
    )
    assert mixed.element_spec.keys() == alone.element_spec.keys() - {
        "place",
        "negative_lengths",
    }
    for name in ("query_id", "passage_id", "negative_ids", "negative_group"):
        assert mixed.element_spec[name] == alone.element_spec[name]
    known, found = (
        {tuple(row["query_id"]) for row in rows.take(40).as_numpy_iterator()}
        for rows in (alone, mixed)
    )
    assert found & known


def test_the_validation_split_is_the_held_out_queries():
    import json

    seqio = load_seqio()
    registration.register("quickstart")
    task = seqio.get_mixture_or_task("quickstart_term")
    assert set(task.splits) == {"train", "validation"}
    rows = list(
        task.get_dataset(
            sequence_length=None, split="validation", shuffle=False
        ).as_numpy_iterator()
    )
    pieces = vocabularies.load(task_table.QUICKSTART_VOCABULARY)
    queries, passages, relevant = (
        [json.loads(line) for line in (task_table.QUICKSTART / name).open()]
        for name in ("queries.jsonl", "corpus.jsonl", "qrels.jsonl")
    )
    texts = {row["_id"]: row["text"] for row in (*queries, *passages)}
    chosen = {row["_id"] for row in queries if row["task"] == "term"}
    pairs = [
        (texts[row["query-id"]], texts[row["corpus-id"]])
        for row in relevant
        if row["query-id"] in chosen
    ]
    assert len(rows) == len(pairs) == 56
    for row, (query, positive) in zip(rows, pairs, strict=True):
        decoded = pieces.decode(row["query"].tolist())
        assert (
            decoded == f"task: question answering | query: {text_formats.clean(query)}"
        )
        passage = pieces.decode(row["positive"].tolist())
        assert passage.endswith(text_formats.clean(positive))


def test_what_tasks_were_registered_with_can_be_described():
    registration.register("quickstart")
    text_format, vocabulary = registration.describe("quickstart")
    assert text_format.task_descriptions["quickstart_code"] == "code retrieval"
    assert vocabulary.model_proto == task_table.QUICKSTART_VOCABULARY.read_bytes()
    assert vocabulary.extra_ids == 0
    assert registration.describe("quickstart_term")[0].describe("quickstart_term")


def test_importing_the_module_for_t5x_registers_what_is_ready():
    seqio = load_seqio()
    importlib.import_module("gecko_jax.data.t5x_tasks")
    assert "quickstart" in seqio.MixtureRegistry.names()
    assert "quickstart_code" in seqio.TaskRegistry.names()
    assert "gecko_academic" not in seqio.MixtureRegistry.names()
