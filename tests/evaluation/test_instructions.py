import pytest

from gecko_jax.evaluation import instructions

SYMMETRIC = True


@pytest.mark.parametrize(
    ("name", "kind", "task", "symmetric"),
    [
        # Table 9, row by row.
        ("Banking77Classification", "Classification", "classification", SYMMETRIC),
        ("TwitterURLCorpus", "PairClassification", "semantic similarity", SYMMETRIC),
        ("STS12", "STS", "semantic similarity", SYMMETRIC),
        ("RedditClustering", "Clustering", "search result", SYMMETRIC),
        ("SummEval", "Summarization", "search result", SYMMETRIC),
        ("AskUbuntuDupQuestions", "Reranking", "question answering", False),
        ("SciDocsRR", "Reranking", "question answering", False),
        ("MindSmallReranking", "Reranking", "semantic similarity", False),
        ("StackOverflowDupQuestions", "Reranking", "search result", False),
        ("ArguAna", "Retrieval", "semantic similarity", False),
        ("ClimateFEVER", "Retrieval", "search result", False),
        ("FEVER", "Retrieval", "search result", False),
        ("HotpotQA", "Retrieval", "search result", False),
        ("TRECCOVID", "Retrieval", "search result", False),
        ("QuoraRetrieval", "Retrieval", "search result", SYMMETRIC),
        ("NFCorpus", "Retrieval", "fact checking", False),
        ("SciFact", "Retrieval", "fact checking", False),
        ("CQADupstackRetrieval", "Retrieval", "question answering", False),
        ("CQADupstackGamingRetrieval", "Retrieval", "question answering", False),
        ("DBPedia", "Retrieval", "question answering", False),
        ("FiQA2018", "Retrieval", "question answering", False),
        ("MSMARCO", "Retrieval", "question answering", False),
        ("NQ", "Retrieval", "question answering", False),
        ("SCIDOCS", "Retrieval", "question answering", False),
        ("Touche2020", "Retrieval", "question answering", False),
        # Not in the table.
        ("MyRetrieval", "Retrieval", "search result", False),
        ("Tatoeba", "BitextMining", "semantic similarity", SYMMETRIC),
    ],
)
def test_instructions_equal_table_9(name, kind, task, symmetric):
    assert instructions.find(name, kind) == instructions.Instruction(task, symmetric)


def test_a_name_precedes_the_original_names_and_the_type():
    found = instructions.find("NanoQuoraRetrieval", "Retrieval", ["QuoraRetrieval"])
    assert found == instructions.BY_NAME["QuoraRetrieval"]
    # Made from SCIDOCS in mteb's book.
    found = instructions.find("MindSmallReranking", "Reranking", ["SCIDOCS"])
    assert found == instructions.BY_NAME["MindSmallReranking"]


def test_a_type_without_an_instruction_is_refused():
    with pytest.raises(ValueError, match="type 'ImageClustering', which has no instr"):
        instructions.find("Birds", "ImageClustering")
