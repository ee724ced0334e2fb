"""The one table of tasks.

A data set is a row of `TASKS`; `mixtures` names tasks and their rates, `registration`
makes them known to seqio. A user's own files need no row: each value of the field
`task` in them becomes a task.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gecko_jax.data import classification, preprocessors
from gecko_jax.formats import pretrained
from gecko_jax.text import text_formats

QUICKSTART = pathlib.Path(__file__).parents[1] / "quickstart"
QUICKSTART_VOCABULARY = QUICKSTART / "vocabulary.model"


@dataclasses.dataclass(frozen=True)
class Task:
    """A row of the table.

    Attributes:
        name: Known to configs, metrics and seqio.
        files: JSONL files, see `gecko_jax.data.jsonl`.
        source_task: Value of the field `task` that chooses the lines.
        task_description: The paper's *t*, written before every query.
        symmetric: Passages are written in the query form.
        licence: Of the texts.
        num_examples: Lines chosen; None when it is only known by reading.
        touches: Evaluation sets whose texts or near duplicates the data may hold.
        source: Where `gecko data prepare` reads it, see `gecko_jax.data.sources`; ""
            for one that lies ready as JSONL.
        preprocessor: Turns the source's records into lines, see `preprocessors`.
        restricted: Why its licence must be accepted by name; "" when it need not be.
        published_size: Examples that the source's authors count, for planning; None
            where no page of theirs has been read.
        mine: Hard negatives are mined where a line has none.
        validation_files: JSONL files of held-out examples, which become the seqio
            split "validation"; `gecko train` does not read them.
        unique_ids: Texts of examples with a negative group end with its number, see
            `classification.append_id`.
    """

    name: str
    files: tuple[str, ...]
    source_task: str
    task_description: str
    symmetric: bool = False
    licence: str = "unknown"
    num_examples: int | None = None
    touches: tuple[str, ...] = ()
    source: str = ""
    preprocessor: preprocessors.Preprocessor | None = None
    restricted: str = ""
    published_size: int | None = None
    mine: bool = True
    validation_files: tuple[str, ...] = ()
    unique_ids: bool = False


_QUICKSTART_TRAIN = (str(QUICKSTART / "train.jsonl"),)
_QUICKSTART_VALIDATION = (str(QUICKSTART / "validation.jsonl.gz"),)

TASKS: tuple[Task, ...] = (
    Task(
        name="quickstart_docs",
        files=_QUICKSTART_TRAIN,
        validation_files=_QUICKSTART_VALIDATION,
        source_task="docs",
        task_description="search result",
        licence="PostgreSQL, PSF-2.0, public domain",
        num_examples=1374,
    ),
    Task(
        name="quickstart_wordnet",
        files=_QUICKSTART_TRAIN,
        validation_files=_QUICKSTART_VALIDATION,
        source_task="wordnet",
        task_description="dictionary definition",
        licence="WordNet-3.0",
        num_examples=1170,
    ),
    Task(
        name="quickstart_code",
        files=_QUICKSTART_TRAIN,
        validation_files=_QUICKSTART_VALIDATION,
        source_task="code",
        task_description="code retrieval",
        licence="BSD-3-Clause, Apache-2.0",
        num_examples=776,
        touches=("CodeSearchNet",),
    ),
    Task(
        name="quickstart_term",
        files=_QUICKSTART_TRAIN,
        validation_files=_QUICKSTART_VALIDATION,
        source_task="term",
        task_description="question answering",
        licence="public domain",
        num_examples=508,
    ),
)


_EMOTIONS = (
    "admiration", "amusement", "anger", "annoyance", "approval", "caring",
    "confusion", "curiosity", "desire", "disappointment", "disapproval", "disgust",
    "embarrassment", "excitement", "fear", "gratitude", "grief", "joy", "love",
    "nervousness", "optimism", "pride", "realization", "relief", "remorse",
    "sadness", "surprise", "neutral",
)  # fmt: skip


def vocabulary_path(name: str) -> str:
    """Returns the file of `data.vocabulary`: a path, or the name of what comes along.

    That is "quickstart", or a model's (`pretrained`).
    """
    if name == "quickstart":
        return str(QUICKSTART_VOCABULARY)
    folder = pretrained.find(name)
    return name if folder == name else f"{folder}/vocabulary.model"


def _emotions(records: Iterable[preprocessors.Record]) -> Iterator[Any]:
    return classification.triples(
        classification.one_true_column(records, text="comment_text", columns=_EMOTIONS)
    )


def _toxicity(records: Iterable[preprocessors.Record]) -> Iterator[Any]:
    # Few comments are toxic: above 0.5 as Jigsaw counts them, and clearly not below.
    return classification.triples(
        classification.threshold(
            records, text="text", score="toxicity", low=0.0, high=0.5
        )
    )


def _labels(text: str, label: str, num_labels: int | None) -> Any:
    return functools.partial(
        classification.triples, text=text, label=label, num_labels=num_labels
    )


_MIRACL_LANGUAGES = (
    "ar", "bn", "en", "es", "fa", "fi", "fr", "hi", "id", "ja", "ko", "ru", "sw",
    "te", "th", "zh",
)  # fmt: skip

# Sources without a scheme are files that the user has: `--source` says where. Licences
# are those that the sets' authors or cards name; docs/data.md says where each stands.
TASKS += (
    # Pre-finetuning: community questions and answers, titles and bodies (section 3.3).
    Task(
        name="gooaq",
        files=(),
        source_task="gooaq",
        source="parquet",
        preprocessor=functools.partial(
            preprocessors.pairs, query="question", positive="answer"
        ),
        task_description="question answering",
        licence="Apache-2.0",
        published_size=3_112_679,
        mine=False,
    ),
    Task(
        name="stackexchange_title_body",
        files=(),
        source_task="stackexchange_title_body",
        source="jsonl",
        preprocessor=functools.partial(
            preprocessors.pairs, query="title", positive="body", is_html=True
        ),
        task_description="search result",
        licence="CC-BY-SA-4.0",
        touches=("CQADupstack", "StackExchangeClustering", "StackOverflowDupQuestions"),
        mine=False,
    ),
    Task(
        name="stackexchange_qa",
        files=(),
        source_task="stackexchange_qa",
        source="jsonl",
        preprocessor=functools.partial(
            preprocessors.pairs, query="title", positive="answer", is_html=True
        ),
        task_description="question answering",
        licence="CC-BY-SA-4.0",
        touches=("CQADupstack", "StackExchangeClustering", "StackOverflowDupQuestions"),
        mine=False,
    ),
    Task(
        name="wikipedia_title_body",
        files=(),
        source_task="wikipedia_title_body",
        source="tfds:wikipedia/20230601.en:train",
        preprocessor=functools.partial(
            preprocessors.pairs, query="title", positive="text"
        ),
        task_description="search result",
        licence="CC-BY-SA-3.0",
        touches=("DBPedia", "NQ", "HotpotQA", "FEVER", "MIRACL"),
        mine=False,
    ),
    # FRet: what `gecko fret` exports is canonical already.
    Task(
        name="fret",
        files=(),
        source_task="fret",
        source="canonical",
        task_description="search result",
        licence="of the seed passages and the LLM",
        published_size=6_600_000,
    ),
    # Academic (section 3.3).
    Task(
        name="natural_questions",
        files=(),
        source_task="natural_questions",
        source="tfds:natural_questions/default:train",
        preprocessor=preprocessors.natural_questions,
        task_description="question answering",
        licence="CC-BY-SA-3.0",
        touches=("NQ",),
    ),
    Task(
        name="hotpotqa",
        files=(),
        source_task="hotpotqa",
        source="parquet",
        preprocessor=preprocessors.multi_hop,
        task_description="search result",
        licence="CC-BY-SA-4.0",
        published_size=90_447,
        touches=("HotpotQA",),
    ),
    Task(
        name="fever",
        files=(),
        source_task="fever",
        source="jsonl",
        preprocessor=preprocessors.fact_verification,
        task_description="fact checking",
        licence="CC-BY-SA-3.0",
        touches=("FEVER", "ClimateFEVER"),
    ),
    Task(
        name="medmcqa",
        files=(),
        source_task="medmcqa",
        source="parquet",
        preprocessor=preprocessors.multiple_choice,
        task_description="question answering",
        licence="Apache-2.0",
        published_size=182_822,
    ),
    Task(
        name="snli",
        files=(),
        source_task="snli",
        source="tfds:snli:train",
        preprocessor=preprocessors.nli,
        task_description="semantic similarity",
        symmetric=True,
        licence="CC-BY-SA-4.0",
        touches=("STS12", "STS14", "STS15", "SICK-R"),
    ),
    Task(
        name="mnli",
        files=(),
        source_task="mnli",
        source="tfds:multi_nli:train",
        preprocessor=preprocessors.nli,
        task_description="semantic similarity",
        symmetric=True,
        licence="OANC, CC-BY-SA-3.0, CC-BY-3.0",
    ),
    # Classification. The paper names none; these are ours.
    Task(
        name="imdb_sentiment",
        files=(),
        source_task="imdb_sentiment",
        source="tfds:imdb_reviews/plain_text:train",
        preprocessor=_labels("text", "label", 2),
        task_description="classification",
        symmetric=True,
        licence="none stated",
        restricted="IMDb's reviews come without a licence; research use",
        published_size=25_000,  # the README of TFDS's imdb_reviews
        touches=("ImdbClassification",),
    ),
    Task(
        name="ag_news_topic",
        files=(),
        source_task="ag_news_topic",
        source="tfds:ag_news_subset:train",
        preprocessor=_labels("description", "label", 4),
        task_description="classification",
        symmetric=True,
        licence="non-commercial",
        restricted="AG's corpus is given for research and non-commercial use",
        published_size=120_000,  # the README of TFDS's ag_news_subset
    ),
    Task(
        name="clinc_intent",
        files=(),
        source_task="clinc_intent",
        source="tfds:clinc_oos:train",
        preprocessor=_labels("text", "intent_name", None),
        task_description="classification",
        symmetric=True,
        licence="CC-BY-3.0",
    ),
    Task(
        name="goemotions_emotion",
        files=(),
        source_task="goemotions_emotion",
        source="tfds:goemotions:train",
        preprocessor=_emotions,
        task_description="classification",
        symmetric=True,
        licence="Apache-2.0",
    ),
    Task(
        name="civil_comments_toxicity",
        files=(),
        source_task="civil_comments_toxicity",
        source="tfds:civil_comments/CivilComments:train",
        preprocessor=_toxicity,
        task_description="classification",
        symmetric=True,
        licence="CC0-1.0",
        touches=("ToxicConversationsClassification",),
    ),
    # The multilingual recipe.
    *(
        Task(
            name=f"miracl_{language}",
            files=(),
            source_task=f"miracl_{language}",
            source="jsonl",
            preprocessor=preprocessors.passage_lists,
            task_description="question answering",
            licence="Apache-2.0",
            touches=("MIRACL",),
        )
        for language in _MIRACL_LANGUAGES
    ),
)


def from_files(
    files: Sequence[str | os.PathLike],
    examples: Sequence[Mapping[str, int]],
    text_format: text_formats.TextFormat,
) -> tuple[Task, ...]:
    """Returns a task for each value of the field `task` in the files.

    Args:
        files: JSONL files.
        examples: Number of examples of each task, file by file.
        text_format: Gives the descriptions; a task without one describes itself.
    """
    sizes: dict[str, int] = {}
    for counts in examples:
        for name, count in counts.items():
            sizes[name] = sizes.get(name, 0) + count
    return tuple(
        Task(
            name=name,
            files=tuple(
                os.fspath(file)
                for file, counts in zip(files, examples, strict=True)
                if name in counts
            ),
            source_task=name,
            task_description=text_format.describe(name),
            symmetric=text_format.is_symmetric(name),
            num_examples=size,
        )
        for name, size in sizes.items()
    )


def complete_text_format(
    text_format: text_formats.TextFormat, tasks: Sequence[Task]
) -> text_formats.TextFormat:
    """Adds the tasks' descriptions to the format that goes with the checkpoint.

    A task is known both by its name and by the word its files use for it, as held-out
    queries in the same layout do. Descriptions that are there already stay. A format
    with prompts has no place for descriptions, and gets none.
    """
    descriptions: dict[str, str] = {}
    for task in tasks:
        descriptions.setdefault(task.source_task, task.task_description)
    descriptions |= {task.name: task.task_description for task in tasks}
    symmetric = dict.fromkeys(text_format.symmetric_tasks)
    symmetric |= dict.fromkeys(task.name for task in tasks if task.symmetric)
    if text_format.prompts:
        descriptions = {}
    return dataclasses.replace(
        text_format,
        task_descriptions=descriptions | dict(text_format.task_descriptions),
        symmetric_tasks=tuple(symmetric),
    )
