"""Preprocessors: records of a source become canonical pairs and triples.

A preprocessor takes an iterable of a source's records and yields, in their order,
either a line in the layout of `jsonl` (without `task`), or a `Drop` with the reason why
a record or a part of it is left out. Those that need all records before the first line
(NLI by premise, classification by label) hold them in memory.
"""

import dataclasses
import html
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from gecko_jax.io import inputs

Record = Mapping[str, Any]

_TAG = re.compile(r"<(?:[a-zA-Z/!][^<>]*)>")
# C0 and C1 controls that are not whitespace; they come from broken encodings.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
# Escapes in FEVER's page titles.
_ESCAPES = {"-LRB-": "(", "-RRB-": ")", "-COLON-": ":", "_": " "}
_ENTAILMENT, _NEUTRAL, _CONTRADICTION = 0, 1, 2
_CHECK = "check that it is the right set and version"


@dataclasses.dataclass(frozen=True)
class Drop:
    """A record that gives no example; `prepare` counts the reasons."""

    reason: str


Preprocessor = Callable[[Iterable[Record]], Iterator[dict[str, Any] | Drop]]


def field(record: Record, name: str) -> Any:
    """Returns a field of a source's record.

    Raises ValueError if the field is missing, so the source has another schema.
    """
    if name not in record:
        raise ValueError(
            f"a record has no field {name!r} (it has {', '.join(sorted(record))}); "
            f"{_CHECK}"
        )
    return record[name]


def text(record: Record, name: str) -> str:
    """Returns a text field without control characters, '' for null."""
    value = field(record, name)
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if not isinstance(value, str | None):
        raise ValueError(
            f"field {name!r} is {inputs.kind(value)}, and must be text; {_CHECK}"
        )
    return _CONTROL.sub("", value or "").strip()


def identity(record: Record, name: str) -> str:
    """Returns a field that holds an id (`inputs.check_id`)."""
    value = field(record, name)
    if value is None:
        raise ValueError(f"field {name!r} is null, and must be an id; give it one")
    return str(inputs.check_id(name, value))


def number(record: Record, name: str) -> int | float | None:
    """Returns a field that holds a number, None for null."""
    value = field(record, name)
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise ValueError(
            f"field {name!r} is {inputs.kind(value)}, and must be a number; {_CHECK}"
        )
    return value


def label(record: Record, name: str) -> int | None:
    """Returns a field that holds a whole number, None for null."""
    value = number(record, name)
    if value is not None and not float(value).is_integer():
        raise ValueError(f"field {name!r} is {value}, and must be a whole number")
    return None if value is None else int(value)


def strip_html(markup: str) -> str:
    """Returns the text of HTML, without tags and with entities decoded.

    >>> strip_html("<p>Use <code>a &lt; b</code></p>")
    'Use a < b'
    """
    return " ".join(html.unescape(_TAG.sub(" ", markup)).split())


def pairs(
    records: Iterable[Record], *, query: str, positive: str, is_html: bool = False
) -> Iterator[dict[str, Any] | Drop]:
    """Reads query and positive from two fields.

    {"question": "what is a gecko", "answer": "A lizard."}
    -> {"query": "what is a gecko", "positive": "A lizard."}
    """
    read = strip_html if is_html else str
    for record in records:
        line = {
            "query": read(text(record, query)),
            "positive": read(text(record, positive)),
        }
        yield line if line["query"] and line["positive"] else Drop("empty text")


def passage_lists(records: Iterable[Record]) -> Iterator[dict[str, Any] | Drop]:
    """Yields one line for each positive, with all negatives of its query.

    {"query_id": "7", "query": "who", "positive_passages": [{"docid": "1#0", "title":
     "A", "text": "a"}], "negative_passages": [{"docid": "2#0", "title": "B",
     "text": "b"}]}
    -> {"query": "who", "query_id": "7", "positive": "a", "title": "A",
        "passage_id": "1#0", "negatives": ["b"], "negative_titles": ["B"],
        "negative_ids": ["2#0"]}
    """
    for record in records:
        query = text(record, "query")
        positives = list(field(record, "positive_passages"))
        negatives = [p for p in field(record, "negative_passages") if text(p, "text")]
        if not query or not positives:
            yield Drop("no positive" if query else "empty text")
            continue
        for passage in positives:
            if not text(passage, "text"):
                yield Drop("empty text")
                continue
            yield {
                "query": query,
                "query_id": identity(record, "query_id"),
                "positive": text(passage, "text"),
                "title": text(passage, "title"),
                "passage_id": identity(passage, "docid"),
                "negatives": [text(p, "text") for p in negatives],
                "negative_titles": [text(p, "title") for p in negatives],
                "negative_ids": [identity(p, "docid") for p in negatives],
            }


def nli(records: Iterable[Record]) -> Iterator[dict[str, Any] | Drop]:
    """Groups hypotheses by premise: (premise, entailment, contradiction).

    {"premise": "A man sleeps.", "hypothesis": "A man rests.", "label": 0}
    {"premise": "A man sleeps.", "hypothesis": "A man runs.", "label": 2}
    -> {"query": "A man sleeps.", "positive": "A man rests.",
        "negatives": ["A man runs."]}

    Each entailment is one line with all contradictions of its premise. The tasks are
    symmetric, so both sides are written in the query form (section 3.3).
    """
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for record in records:
        relation = label(record, "label")
        premise, hypothesis = text(record, "premise"), text(record, "hypothesis")
        if relation is None or relation == -1:
            yield Drop("annotators disagree")
        elif relation not in (_ENTAILMENT, _NEUTRAL, _CONTRADICTION):
            raise ValueError(
                f"label {relation} is out of range: NLI has 0, 1, 2 and -1; {_CHECK}"
            )
        elif not premise or not hypothesis:
            yield Drop("empty text")
        elif relation == _NEUTRAL:
            yield Drop("neutral")
        else:
            group = groups.setdefault(premise, ([], []))
            group[relation == _CONTRADICTION].append(hypothesis)
    for premise, (entailed, contradicting) in groups.items():
        if not entailed:
            yield from [Drop("no entailment of this premise")] * len(contradicting)
        elif not contradicting:
            yield from [Drop("no contradiction of this premise")] * len(entailed)
        else:
            for positive in entailed:
                yield {
                    "query": premise,
                    "positive": positive,
                    "negatives": list(contradicting),
                }


def fact_verification(records: Iterable[Record]) -> Iterator[dict[str, Any] | Drop]:
    """Pairs a claim with each page that supports or refutes it.

    {"claim": "Honey spoils.", "label": "REFUTES",
     "evidence": [["Honey_-LRB-food-RRB-", 3, "Honey keeps."]]}
    -> {"query": "Honey spoils.", "positive": "Honey keeps.",
        "title": "Honey (food)"}

    The sentences of a page become one passage, in the page's order. A claim without
    enough information has no evidence and is dropped.
    """
    for record in records:
        claim, verdict = text(record, "claim"), text(record, "label")
        if verdict not in ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO"):
            raise ValueError(
                f"label {verdict!r} is out of range: it must be SUPPORTS, REFUTES or "
                f"NOT ENOUGH INFO; {_CHECK}"
            )
        pages: dict[str, dict[int, str]] = {}
        for page, number, sentence in field(record, "evidence"):
            if page and sentence is not None and str(sentence).strip():
                pages.setdefault(page, {})[int(number)] = sentence.strip()
        if verdict == "NOT ENOUGH INFO" or not pages:
            yield Drop("no evidence")
            continue
        for page, sentences in pages.items():
            yield {
                "query": claim,
                "positive": " ".join(sentences[n] for n in sorted(sentences)),
                "title": re.sub("-[LR]RB-|-COLON-|_", lambda m: _ESCAPES[m[0]], page),
            }


def multiple_choice(records: Iterable[Record]) -> Iterator[dict[str, Any] | Drop]:
    """Turns a question with four options into question, answer and wrong options.

    {"question": "Where is insulin made?", "opa": "Liver", "opb": "Pancreas",
     "opc": "Spleen", "opd": "Lung", "cop": 1, "exp": "Beta cells make it."}
    -> {"query": "Where is insulin made?", "positive": "Pancreas. Beta cells make it.",
        "negatives": ["Liver", "Spleen", "Lung"]}
    """
    for record in records:
        question = text(record, "question")
        options = [text(record, name) for name in ("opa", "opb", "opc", "opd")]
        answer = label(record, "cop")
        if answer is None or answer == -1:
            yield Drop("no answer")
        elif answer not in range(len(options)):
            raise ValueError(
                f"label {answer} is out of range: MedMCQA has 0 to 3; {_CHECK}"
            )
        elif not question or not options[answer]:
            yield Drop("empty text")
        else:
            explanation = text(record, "exp")
            right = options.pop(answer)
            wrong = [option for option in options if option and option != right]
            yield {
                "query": question,
                "positive": f"{right}. {explanation}" if explanation else right,
                "negatives": wrong,
            }


def multi_hop(records: Iterable[Record]) -> Iterator[dict[str, Any] | Drop]:
    """Yields each supporting paragraph as a positive; the others are negatives.

    {"id": "5a", "question": "Who?", "supporting_facts": {"title": ["A"], "sent_id":
     [0]}, "context": {"title": ["A", "B"], "sentences": [["a ", "b"], ["c"]]}}
    -> {"query": "Who?", "query_id": "5a", "positive": "a b", "title": "A",
        "negatives": ["c"], "negative_titles": ["B"]}
    """
    for record in records:
        context = field(record, "context")
        supporting = set(field(field(record, "supporting_facts"), "title"))
        paragraphs = [
            (title, "".join(sentences).strip())
            for title, sentences in zip(
                field(context, "title"), field(context, "sentences"), strict=True
            )
        ]
        positives = [p for p in paragraphs if p[0] in supporting and p[1]]
        negatives = [p for p in paragraphs if p[0] not in supporting and p[1]]
        if not positives:
            yield Drop("no positive")
        for title, body in positives:
            yield {
                "query": text(record, "question"),
                "query_id": identity(record, "id"),
                "positive": body,
                "title": title,
                "negatives": [body for _, body in negatives],
                "negative_titles": [title for title, _ in negatives],
            }


def natural_questions(records: Iterable[Record]) -> Iterator[dict[str, Any] | Drop]:
    """Extracts the annotated long answer from its page.

    {"question": {"text": "who found it"}, "document": {"title": "Honey", "tokens":
     {"token": ["<P>", "Bees", "did", "</P>"], "is_html": [True, False, False, True]}},
     "annotations": {"long_answer": {"start_token": [0], "end_token": [4]}}}
    -> {"query": "who found it", "positive": "Bees did", "title": "Honey"}
    """
    for record in records:
        document = field(record, "document")
        tokens = field(document, "tokens")
        words, is_html = field(tokens, "token"), field(tokens, "is_html")
        answers = field(field(record, "annotations"), "long_answer")
        starts, ends = field(answers, "start_token"), field(answers, "end_token")
        spans = [(s, e) for s, e in zip(starts, ends, strict=True) if 0 <= s < e]
        if not spans:
            yield Drop("no long answer")
            continue
        positions = [n for n in range(*spans[0]) if not is_html[n]]
        answer = " ".join(
            filter(None, (text({"word": words[n]}, "word") for n in positions))
        )
        if not answer:
            yield Drop("empty text")
            continue
        yield {
            "query": text(field(record, "question"), "text"),
            "positive": answer,
            "title": text(document, "title"),
        }
