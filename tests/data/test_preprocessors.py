"""Preprocessors: golden examples, what is left out and why, bad records."""

import json
import re

import hypothesis
import pytest
import samples
from hypothesis import strategies

from gecko_jax.data import (
    classification,
    jsonl,
    preprocessors,
    sources,
)


def test_nli_groups_by_premise():
    lines, dropped = samples.split(preprocessors.nli(samples.NLI))
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


SAMPLES = {
    "fever": (preprocessors.fact_verification, samples.FEVER),
    "medmcqa": (preprocessors.multiple_choice, samples.MEDMCQA),
    "hotpotqa": (preprocessors.multi_hop, samples.HOTPOT),
    "natural_questions": (preprocessors.natural_questions, samples.NATURAL),
    "miracl": (preprocessors.passage_lists, samples.MIRACL),
}
GOLDEN = {
    "fever": {
        "query": "Honey spoils.",
        "positive": "Honey keeps.",
        "title": "Honey (food)",
    },
    "medmcqa": {
        "query": "Where is insulin made?",
        "positive": "Pancreas. Beta cells make it.",
        "negatives": ["Liver", "Spleen", "Lung"],
    },
    "hotpotqa": {
        "query": "Who?",
        "query_id": "5a",
        "positive": "a b",
        "title": "A",
        "negatives": ["c"],
        "negative_titles": ["B"],
    },
    "natural_questions": {
        "query": "who found it",
        "positive": "Bees did",
        "title": "Honey",
    },
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_examples(name):
    preprocessor, record = SAMPLES[name]
    assert samples.split(preprocessor([record])) == ([GOLDEN[name]], [])


EMPTY = {"docid": "3#0", "title": "C", "text": " "}


def span(start, end):
    """An annotated answer from token `start` to token `end`."""
    return {
        "annotations": {"long_answer": {"start_token": [start], "end_token": [end]}}
    }


@pytest.mark.parametrize(
    ("name", "changes", "positives", "reasons"),
    [
        # Sentences come in the page's order, and marks of titles are read.
        (
            "fever",
            {"evidence": [["A-COLON-B", 7, "two."], ["A-COLON-B", 2, "one."]]},
            [("A:B", "one. two.")],
            [],
        ),
        ("fever", {"evidence": [["A", 1, " "], [None, 2, "x"]]}, [], ["no evidence"]),
        ("fever", {"label": "NOT ENOUGH INFO"}, [], ["no evidence"]),
        ("medmcqa", {"cop": -1}, [], ["no answer"]),
        ("medmcqa", {"opb": ""}, [], ["empty text"]),
        (
            "medmcqa",
            {"exp": None, "opa": "Pancreas", "opd": ""},
            [(None, "Pancreas")],
            [],
        ),
        ("hotpotqa", {"supporting_facts": {"title": ["Z"]}}, [], ["no positive"]),
        ("natural_questions", span(-1, 3), [], ["no long answer"]),
        ("natural_questions", span(3, 4), [], ["empty text"]),
        ("miracl", {"positive_passages": []}, [], ["no positive"]),
        ("miracl", {"query": " "}, [], ["empty text"]),
        (
            "miracl",
            {
                name: [EMPTY, *samples.MIRACL[name]]
                for name in ("positive_passages", "negative_passages")
            },
            [("A", "a"), ("A", "aa")],
            ["empty text"],
        ),
    ],
)
def test_what_is_left_out_has_a_reason(name, changes, positives, reasons):
    preprocessor, record = SAMPLES[name]
    lines, dropped = samples.split(preprocessor([{**record, **changes}]))
    assert [(line.get("title"), line["positive"]) for line in lines] == positives
    assert dropped == reasons
    for line in lines:
        wrong = {
            preprocessors.multiple_choice: ["Spleen"],
            preprocessors.passage_lists: ["b"],
        }
        assert line.get("negatives") == wrong.get(preprocessor)


def test_nli_without_entailment_is_left_out():
    _, dropped = samples.split(
        preprocessors.nli([samples.NLI[1], {**samples.NLI[0], "hypothesis": ""}])
    )
    assert dropped == ["empty text", "no entailment of this premise"]


def test_several_positives_share_their_negatives():
    lines, _ = samples.split(preprocessors.passage_lists([samples.MIRACL]))
    assert [line["positive"] for line in lines] == ["a", "aa"]
    assert [line["passage_id"] for line in lines] == ["1#0", "1#1"]
    for line in lines:
        assert line["negatives"] == ["b"]
        assert line["negative_ids"] == ["2#0"]
        assert line["negative_titles"] == ["B"]


def test_pairs_lose_html_and_control_characters():
    records = [{"q": "<b>a\x00</b> &amp; b", "p": "x\x07y"}]
    lines, _ = samples.split(
        preprocessors.pairs(records, query="q", positive="p", is_html=True)
    )
    assert lines == [{"query": "a & b", "positive": "xy"}]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: preprocessors.nli([{**samples.NLI[0], "label": 7}]),
            "label 7 is out of range",
        ),
        (lambda: preprocessors.nli([{"premise": "a", "label": 0}]), "no field 'hypoth"),
        (
            lambda: preprocessors.multiple_choice([{**samples.MEDMCQA, "cop": 4}]),
            "label 4 is out of range",
        ),
        (
            lambda: preprocessors.fact_verification(
                [{**samples.FEVER, "label": "MAYBE"}]
            ),
            "'MAYBE' is out of range",
        ),
        (
            lambda: classification.triples([{"text": "a", "label": 2}], num_labels=2),
            "label 2 is out of range: there are 2",
        ),
        (
            lambda: classification.triples(samples.LABELLED[:2]),
            "at least two labels",
        ),
        (lambda: sources.read("x.parquet"), "no such file"),
        (lambda: sources.read("x.csv"), "cannot tell its kind"),
    ],
)
def test_bad_input_is_named(run, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        list(run())


_ANY = strategies.text(strategies.characters(exclude_categories=()))


@hypothesis.given(_ANY, _ANY)
@hypothesis.example("half \ud800", "whole")
@hypothesis.example("whole", "half \udfff")
@hypothesis.settings(max_examples=200, deadline=None)
def test_any_text_survives_or_is_left_out(query, positive):
    lines, dropped = samples.split(
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


def test_text_that_is_no_html_stays():
    records = [{"q": "a <b> c &amp; d", "p": "x < y"}]
    lines, _ = samples.split(preprocessors.pairs(records, query="q", positive="p"))
    assert lines == [{"query": "a <b> c &amp; d", "positive": "x < y"}]


def test_nli_needs_both_sides_and_a_label():
    first = samples.NLI[0]
    records = [{**first, "premise": " "}, {**first, "label": None}]
    _, dropped = samples.split(preprocessors.nli(records))
    assert dropped == ["empty text", "annotators disagree"]
