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
    """Format of the texts of a task.

    Attributes:
        task: Task description that precedes a query.
        symmetric: Whether both sides have the format of queries.
    """

    task: str
    symmetric: bool = False


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
BY_NAME: dict[str, Instruction] = {
    "ArguAna": Instruction(_SIMILAR),
    "ClimateFEVER": Instruction(_SEARCH),
    "FEVER": Instruction(_SEARCH),
    "HotpotQA": Instruction(_SEARCH),
    "TRECCOVID": Instruction(_SEARCH),
    "QuoraRetrieval": Instruction(_SEARCH, symmetric=True),
    "NFCorpus": Instruction(_CHECK),
    "SciFact": Instruction(_CHECK),
    "DBPedia": Instruction(_ANSWER),
    "FiQA2018": Instruction(_ANSWER),
    "MSMARCO": Instruction(_ANSWER),
    "NQ": Instruction(_ANSWER),
    "SCIDOCS": Instruction(_ANSWER),
    "Touche2020": Instruction(_ANSWER),
    "AskUbuntuDupQuestions": Instruction(_ANSWER),
    "SciDocsRR": Instruction(_ANSWER),
    "MindSmallReranking": Instruction(_SIMILAR),
    "StackOverflowDupQuestions": Instruction(_SEARCH),
    # Not in table 9.
    "MIRACLRetrieval": Instruction(_ANSWER),
}
_FORUMS = (
    "Android English Gaming Gis Mathematica Physics Programmers Stats Tex Unix "
    "Webmasters Wordpress"
)
BY_NAME |= {
    f"CQADupstack{forum}Retrieval": Instruction(_ANSWER)
    for forum in ("", *_FORUMS.split())
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
