"""Task descriptions for MTEB tasks (table 9).

A task is looked up by its name, then by the names of the tasks it was adapted from,
then by its type. Entries that are not in table 9 (bitext mining, MIRACL, ...) are our
choice and marked. `text_formats.TextFormat` holds the text around a description.

    find("NFCorpus", "Retrieval")     fact checking, asymmetric
    find("STS12", "STS")              semantic similarity, symmetric
"""

import dataclasses
from collections.abc import Sequence

_ANSWER = "question answering"
_SEARCH = "search result"
_CHECK = "fact checking"
_SIMILAR = "semantic similarity"
_CLASSIFY = "classification"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Format of the texts of a task."""

    task: str  # task description that precedes a query
    symmetric: bool = False  # whether both sides have the format of queries


# mteb's task type -> instruction.
BY_TYPE: dict[str, Instruction] = {
    "Classification": Instruction(_CLASSIFY, symmetric=True),
    "Clustering": Instruction(_SEARCH, symmetric=True),
    "PairClassification": Instruction(_SIMILAR, symmetric=True),
    "STS": Instruction(_SIMILAR, symmetric=True),
    "Summarization": Instruction(_SEARCH, symmetric=True),
    # Not in table 9.
    "Retrieval": Instruction(_SEARCH),
    "Reranking": Instruction(_SEARCH),
    "InstructionRetrieval": Instruction(_SEARCH),
    "InstructionReranking": Instruction(_SEARCH),
    "BitextMining": Instruction(_SIMILAR, symmetric=True),
    "MultilabelClassification": Instruction(_CLASSIFY, symmetric=True),
    "Regression": Instruction(_CLASSIFY, symmetric=True),
    "ZeroShotClassification": Instruction(_CLASSIFY, symmetric=True),
}

# mteb's task name -> instruction. NanoBEIR and the sets with hard negatives name the
# tasks they were adapted from, and use the instructions of these.
_NAMES = {
    _SIMILAR: "ArguAna MindSmallReranking",
    _SEARCH: "ClimateFEVER FEVER HotpotQA TRECCOVID StackOverflowDupQuestions",
    _CHECK: "NFCorpus SciFact",
    # MIRACL is not in table 9.
    _ANSWER: "DBPedia FiQA2018 MSMARCO NQ SCIDOCS Touche2020 AskUbuntuDupQuestions "
    "SciDocsRR MIRACLRetrieval",
}
_FORUMS = (
    "Android English Gaming Gis Mathematica Physics Programmers Stats Tex Unix "
    "Webmasters Wordpress"
)
BY_NAME = {
    **{name: Instruction(task) for task in _NAMES for name in _NAMES[task].split()},
    **{
        f"CQADupstack{forum}Retrieval": Instruction(_ANSWER)
        for forum in ("", *_FORUMS.split())
    },
    "QuoraRetrieval": Instruction(_SEARCH, symmetric=True),
}


def find(name: str, kind: str, made_from: Sequence[str] = ()) -> Instruction:
    """Returns the instruction of a task of mteb, by names and type.

    `made_from` lists the tasks it was adapted from. Raises ValueError if neither a name
    nor the type is known, such as for tasks on images.
    """
    for known in (name, *made_from):
        if known in BY_NAME:
            return BY_NAME[known]
    if kind not in BY_TYPE:
        raise ValueError(
            f"task {name} has type {kind!r}, which has no instruction; use a task of "
            f"type {', '.join(BY_TYPE)}"
        )
    return BY_TYPE[kind]
