"""The table of tasks.

A data set is a row of `TASKS`. `mixtures` combines tasks and sets their rates, and
`registration` registers them with seqio. A user's own files need no row: each value of
the field `task` in them becomes a task.
"""

import collections
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gecko_jax.data import classification, jsonl, preprocessors
from gecko_jax.formats import pretrained
from gecko_jax.io import progress
from gecko_jax.text import text_formats

QUICKSTART = pathlib.Path(__file__).parents[1] / "quickstart"
QUICKSTART_VOCABULARY = QUICKSTART / "vocabulary.model"


@dataclasses.dataclass(frozen=True)
class Task:
    """A row of the table."""

    name: str  # in configs, metrics and seqio
    task_description: str  # the paper's *t*, written before every query
    files: tuple[str, ...] = ()  # JSONL, see `jsonl`
    source_task: str = ""  # field `task` of the task's lines; by default the name
    symmetric: bool = False  # write passages in the query form
    licence: str = "unknown"
    num_examples: int | None = None  # None before the lines are counted
    touches: tuple[str, ...] = ()  # evaluation sets that may have the same texts
    source: str = ""  # where `gecko data prepare` reads (`sources`); "" if it is JSONL
    preprocessor: preprocessors.Preprocessor | None = None  # records -> lines
    restricted: str = ""  # why the licence must be accepted by name; "" if it need not
    published_size: int | None = None  # examples according to the authors, if known
    mine: bool = True  # mine hard negatives for lines without any
    validation_files: tuple[str, ...] = ()  # seqio's split "validation", not trained on
    unique_ids: bool = False  # see `classification.append_id`
    scores: bool = False  # keep the scores of the lines, for `loss.kl_weight`

    def __post_init__(self):
        if not self.source_task:
            object.__setattr__(self, "source_task", self.name)


_EMOTIONS = (
    "admiration", "amusement", "anger", "annoyance", "approval", "caring",
    "confusion", "curiosity", "desire", "disappointment", "disapproval", "disgust",
    "embarrassment", "excitement", "fear", "gratitude", "grief", "joy", "love",
    "nervousness", "optimism", "pride", "realization", "relief", "remorse",
    "sadness", "surprise", "neutral",
)  # fmt: skip


def _emotions(records: Iterable[preprocessors.Record]) -> Iterator[Any]:
    return classification.triples(
        classification.one_true_column(records, text="comment_text", columns=_EMOTIONS)
    )


def _toxicity(records: Iterable[preprocessors.Record]) -> Iterator[Any]:
    # Few comments are toxic. Jigsaw's threshold is 0.5; scores between are unclear.
    return classification.triples(
        classification.threshold(
            records, text="text", score="toxicity", low=0.0, high=0.5
        )
    )


def _labels(
    text: str, label: str, num_labels: int | None
) -> preprocessors.Preprocessor:
    return functools.partial(
        classification.triples, text=text, label=label, num_labels=num_labels
    )


def _pairs(
    query: str, positive: str, is_html: bool = False
) -> preprocessors.Preprocessor:
    return functools.partial(
        preprocessors.pairs, query=query, positive=positive, is_html=is_html
    )


_QUICKSTART: tuple[tuple[str, str, int, str, tuple[str, ...]], ...] = (
    ("docs", "search result", 1374, "PostgreSQL, PSF-2.0, public domain", ()),
    ("wordnet", "dictionary definition", 1170, "WordNet-3.0", ()),
    ("code", "code retrieval", 776, "BSD-3-Clause, Apache-2.0", ("CodeSearchNet",)),
    ("term", "question answering", 508, "public domain", ()),
)
# Task that Qwen wrote queries for -> number of triples in quickstart/fret.
_QUICKSTART_FRET = {
    "question answering": 150,
    "technical documentation": 118,
    "dictionary definition": 85,
    "search result": 129,
    "technical support": 133,
}
_STACKEXCHANGE: Mapping[str, Any] = {
    "source": "jsonl",
    "licence": "CC-BY-SA-4.0",
    "touches": ("CQADupstack", "StackExchangeClustering", "StackOverflowDupQuestions"),
    "mine": False,
}
_CLASSIFICATION: Mapping[str, Any] = {
    "task_description": "classification",
    "symmetric": True,
}
_MIRACL_LANGUAGES = (
    "ar", "bn", "en", "es", "fa", "fi", "fr", "hi", "id", "ja", "ko", "ru", "sw",
    "te", "th", "zh",
)  # fmt: skip

# The user has the files of a source without a scheme and names them with `--source`.
# Licences are those stated by the sets' authors or cards; docs/data.md cites each.
TASKS: tuple[Task, ...] = (
    *(
        Task(
            f"quickstart_{source_task}",
            description,
            files=(str(QUICKSTART / "train.jsonl"),),
            validation_files=(str(QUICKSTART / "validation.jsonl.gz"),),
            source_task=source_task,
            licence=licence,
            num_examples=number,
            touches=touches,
        )
        for source_task, description, number, licence, touches in _QUICKSTART
    ),
    # FRet about the bundled passages: queries by a language model, judged by it.
    *(
        Task(
            f"quickstart_fret_{description.replace(' ', '_')}",
            description,
            files=(str(QUICKSTART / "fret" / "fret.jsonl.gz"),),
            source_task=description,
            licence="Apache-2.0 for queries; each line names those of its passages",
            num_examples=number,
        )
        for description, number in _QUICKSTART_FRET.items()
    ),
    # Pairs of other documentation, whose positives it chose anew.
    *(
        Task(
            f"quickstart_relabelled_{source_task}",
            "search result",
            files=(str(QUICKSTART / "relabelled" / "fret.jsonl.gz"),),
            source_task=source_task,
            licence="PostgreSQL, PSF-2.0, Apache-2.0, curl, public domain",
            num_examples=number,
        )
        for source_task, number in (("docs", 357), ("man", 223))
    ),
    # Pre-finetuning: community questions and answers, titles and bodies (section 3.3).
    Task(
        "gooaq",
        "question answering",
        source="parquet",
        preprocessor=_pairs("question", "answer"),
        licence="Apache-2.0",
        published_size=3_112_679,
        mine=False,
    ),
    Task(
        "stackexchange_title_body",
        "search result",
        preprocessor=_pairs("title", "body", is_html=True),
        **_STACKEXCHANGE,
    ),
    Task(
        "stackexchange_qa",
        "question answering",
        preprocessor=_pairs("title", "answer", is_html=True),
        **_STACKEXCHANGE,
    ),
    Task(
        "wikipedia_title_body",
        "search result",
        source="tfds:wikipedia/20230601.en:train",
        preprocessor=_pairs("title", "text"),
        licence="CC-BY-SA-3.0",
        touches=("DBPedia", "NQ", "HotpotQA", "FEVER", "MIRACL"),
        mine=False,
    ),
    # FRet: the export of `gecko fret` needs no preprocessor.
    Task(
        "fret",
        "search result",
        source="canonical",
        licence="of the seed passages and the LLM",
        published_size=6_600_000,
    ),
    # Academic sets (section 3.3).
    Task(
        "natural_questions",
        "question answering",
        source="tfds:natural_questions/default:train",
        preprocessor=preprocessors.natural_questions,
        licence="CC-BY-SA-3.0",
        touches=("NQ",),
    ),
    Task(
        "hotpotqa",
        "search result",
        source="parquet",
        preprocessor=preprocessors.multi_hop,
        licence="CC-BY-SA-4.0",
        published_size=90_447,
        touches=("HotpotQA",),
    ),
    Task(
        "fever",
        "fact checking",
        source="jsonl",
        preprocessor=preprocessors.fact_verification,
        licence="CC-BY-SA-3.0",
        touches=("FEVER", "ClimateFEVER"),
    ),
    Task(
        "medmcqa",
        "question answering",
        source="parquet",
        preprocessor=preprocessors.multiple_choice,
        licence="Apache-2.0",
        published_size=182_822,
    ),
    Task(
        "snli",
        "semantic similarity",
        source="tfds:snli:train",
        preprocessor=preprocessors.nli,
        symmetric=True,
        licence="CC-BY-SA-4.0",
        touches=("STS12", "STS14", "STS15", "SICK-R"),
    ),
    Task(
        "mnli",
        "semantic similarity",
        source="tfds:multi_nli:train",
        preprocessor=preprocessors.nli,
        symmetric=True,
        licence="OANC, CC-BY-SA-3.0, CC-BY-3.0",
    ),
    # Classification. The paper names no sets; these are our choice.
    Task(
        "imdb_sentiment",
        source="tfds:imdb_reviews/plain_text:train",
        preprocessor=_labels("text", "label", 2),
        licence="none stated",
        restricted="IMDb's reviews come without a licence; research use",
        published_size=25_000,  # the README of TFDS's imdb_reviews
        touches=("ImdbClassification",),
        **_CLASSIFICATION,
    ),
    Task(
        "ag_news_topic",
        source="tfds:ag_news_subset:train",
        preprocessor=_labels("description", "label", 4),
        licence="non-commercial",
        restricted="AG's corpus is given for research and non-commercial use",
        published_size=120_000,  # the README of TFDS's ag_news_subset
        **_CLASSIFICATION,
    ),
    Task(
        "clinc_intent",
        source="tfds:clinc_oos:train",
        preprocessor=_labels("text", "intent_name", None),
        licence="CC-BY-3.0",
        **_CLASSIFICATION,
    ),
    Task(
        "goemotions_emotion",
        source="tfds:goemotions:train",
        preprocessor=_emotions,
        licence="Apache-2.0",
        **_CLASSIFICATION,
    ),
    Task(
        "civil_comments_toxicity",
        source="tfds:civil_comments/CivilComments:train",
        preprocessor=_toxicity,
        licence="CC0-1.0",
        touches=("ToxicConversationsClassification",),
        **_CLASSIFICATION,
    ),
    # The multilingual recipe.
    *(
        Task(
            f"miracl_{language}",
            "question answering",
            source="jsonl",
            preprocessor=preprocessors.passage_lists,
            licence="Apache-2.0",
            touches=("MIRACL",),
        )
        for language in _MIRACL_LANGUAGES
    ),
)


def vocabulary_path(name: str) -> str:
    """Returns the file of `data.vocabulary`.

    `name` is a path, "quickstart", or the name of a model (`pretrained.find`).
    """
    if name == "quickstart":
        return str(QUICKSTART_VOCABULARY)
    folder = pretrained.find(name)
    pretrained.check_imported(folder)
    return name if folder == name else f"{folder}/vocabulary.model"


def from_files(
    files: Sequence[str | os.PathLike],
    examples: Sequence[Mapping[str, int]],
    text_format: text_formats.TextFormat,
) -> tuple[Task, ...]:
    """Returns a task for each value of the field `task` in JSONL files.

    `examples` has the number of each task's examples for each file. `text_format` has
    the descriptions of the tasks; by default, a task's name describes it.
    """
    sizes = collections.Counter[str]()
    files_of = collections.defaultdict[str, list[str]](list)
    for file, counts in zip(files, examples, strict=True):
        sizes.update(counts)
        for name in counts:
            files_of[name].append(os.fspath(file))
    return tuple(
        Task(
            name,
            text_format.describe(name),
            tuple(files_of[name]),
            symmetric=text_format.is_symmetric(name),
            num_examples=size,
        )
        for name, size in sizes.items()
    )


def no_lines(task: Task) -> ValueError:
    """Returns the error of a task without a line in its files."""
    return ValueError(
        f"task {task.name}: no line of {', '.join(task.files)} has the task "
        f"{task.source_task!r}; check the field `task` of the lines"
    )


def read_lines(
    tasks: Sequence[Task], description: str
) -> Iterator[tuple[Task, str, jsonl.Pair]]:
    """Yields (task, place, example) of all lines of tasks; reads each file once.

    `description` is the verb of the progress bar. Raises ValueError if a line is
    invalid.
    """
    for path in dict.fromkeys(path for task in tasks for path in task.files):
        tasks_here = {task.source_task: task for task in tasks if path in task.files}
        lines = progress.track(jsonl.read_lines(path), f"{description} {path}")
        for place, _, pair in lines:
            if pair.task in tasks_here:
                yield tasks_here[pair.task], place, pair
