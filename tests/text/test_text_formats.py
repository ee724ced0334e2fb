"""The encoding format: what the encoder reads."""

import unicodedata

import pytest

from gecko_jax.text import text_formats

FORMAT = text_formats.TextFormat(
    task_descriptions={"docs": "search result"}, symmetric_tasks=("sts",)
)


def test_queries_and_passages_are_written_as_documented():
    assert FORMAT.format_query("arrays", "docs") == (
        "task: search result | query: arrays"
    )
    assert FORMAT.format_query("arrays", "any words") == (
        "task: any words | query: arrays"
    )
    assert FORMAT.format_passage("one two", "Title") == "title: Title | text: one two"
    for nothing in (None, "", " \n"):
        assert FORMAT.format_passage("one", nothing) == "title: none | text: one"


def test_fields_inside_fields_are_left_alone():
    assert FORMAT.format_passage("body", "{text}") == "title: {text} | text: body"
    assert FORMAT.format_query("{task_description}", "docs").endswith(
        "query: {task_description}"
    )


def test_whitespace_and_composition_do_not_count():
    composed = unicodedata.normalize("NFC", "é")
    assert text_formats.clean(" e\u0301 \n\t x ") == f"{composed} x"
    assert text_formats.content_id("e\u0301 x") == text_formats.content_id(
        f"  {composed}\nx"
    )


def test_the_title_is_part_of_a_passage():
    alone = text_formats.content_id("one")
    assert text_formats.content_id("one", " ") == alone
    assert text_formats.content_id("one", "title") != alone


@pytest.mark.parametrize("empty", ["", "  ", "\n\t\u00a0"])
def test_an_empty_text_is_refused(empty):
    with pytest.raises(ValueError, match=r"is empty.*remove it or fill it in"):
        FORMAT.format_query(empty, "docs")


def test_a_text_too_long_is_refused():
    with pytest.raises(ValueError, match=r"200,001 characters.*split it"):
        text_formats.clean("x" * 200_001)
    assert text_formats.clean("x" * 200_000)


@pytest.mark.parametrize(
    "fields",
    [
        {"query": "{title} {text}"},
        {"query": "no field"},
        {"query": "{task_description} {text} {text}"},
        {"passage": "{title} {text} {url}"},
    ],
)
def test_a_template_must_hold_the_text_once_and_no_foreign_field(fields):
    with pytest.raises(ValueError, match=r"must hold {text} once, .* at\s+most once"):
        text_formats.TextFormat(**fields)


def test_a_format_without_a_title_field_writes_the_title_before_the_text():
    plain = text_formats.TextFormat(query="{text}", passage="{text}")
    assert plain.format_query("arrays", "docs") == "arrays"
    assert plain.format_passage("one two", "Title") == "Title one two"
    assert plain.format_passage("one two") == "one two"


def test_a_format_survives_json():
    assert text_formats.TextFormat.from_dict(FORMAT.to_dict()) == FORMAT


def test_half_a_surrogate_pair_is_no_text():
    for query, task in (("caf\udce9", "docs"), ("cafe", "\udce9")):
        with pytest.raises(ValueError, match="no character; write it as UTF-8"):
            text_formats.TextFormat().format_query(query, task)


PROMPTS = {"query": "query: ", "document": "{title} </s>{text} ", "sts": "as {x}: "}
PROMPTED = text_formats.TextFormat("{text}", "{text}", "", prompts=PROMPTS)


@pytest.mark.parametrize(
    ("task", "written"),
    [
        ("sts", "as {x}: a cat"),
        ("query", "query: a cat"),
        ("search result", "query: a cat"),
        ("semantic similarity", "query: a cat"),
        ("qa", "query: a cat"),
    ],
)
def test_prompts_are_literal_and_an_unknown_task_has_that_of_queries(task, written):
    assert PROMPTED.format_query(" a\ncat", task) == written
    assert PROMPTED.format_query("a cat", task, "find answers") == written


def test_the_prompt_of_documents_stands_before_title_and_text():
    assert PROMPTED.format_passage("b") == "{title} </s>{text} b"
    assert PROMPTED.format_passage("b", "T") == "{title} </s>{text} T b"


def test_prompts_survive_json_and_older_formats_stay_as_they_were():
    assert text_formats.TextFormat.from_dict(PROMPTED.to_dict()) == PROMPTED
    assert "prompts" not in FORMAT.to_dict()


def test_prompts_stored_as_descriptions_are_no_longer_glued():
    """As imported models had them; what is known is written as before."""
    stored = {
        "query": "{task_description}{text}",
        "passage": "passage: {text}",
        "no_title": "",
        "task_descriptions": {"sts": "Represent: ", "search result": "query: "},
        "symmetric_tasks": ["sts"],
    }
    read = text_formats.TextFormat.from_dict(stored)
    assert read.format_query("a cat", "sts") == "Represent: a cat"
    assert read.format_query("a cat", "search result") == "query: a cat"
    assert read.format_query("a cat", "semantic similarity") == "query: a cat"
    assert read.format_passage("b") == "passage: b"
    assert read.is_symmetric("sts")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompts": {"query": "a"}},
        {"prompts": PROMPTS, "query": "{text}"},
    ],
)
def test_prompts_need_both_sides_and_bare_templates(fields):
    with pytest.raises(ValueError, match="text format: prompts"):
        text_formats.TextFormat(**fields)


# As in config_sentence_transformers.json of google/embeddinggemma-300m, and in that of
# Qwen/Qwen3-Embedding-0.6B.
EMBEDDING_GEMMA = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
    "BitextMining": "task: search result | query: ",
    "Clustering": "task: clustering | query: ",
    "Classification": "task: classification | query: ",
    "InstructionRetrieval": "task: code retrieval | query: ",
    "MultilabelClassification": "task: classification | query: ",
    "PairClassification": "task: sentence similarity | query: ",
    "Reranking": "task: search result | query: ",
    "Retrieval": "task: search result | query: ",
    "Retrieval-query": "task: search result | query: ",
    "Retrieval-document": "title: none | text: ",
    "STS": "task: sentence similarity | query: ",
    "Summarization": "task: summarization | query: ",
}
WEB = "Given a web search query, retrieve relevant passages that answer the query"
QWEN = {"query": f"Instruct: {WEB}\nQuery:", "document": ""}


def test_prompts_of_embedding_gemma_are_the_templates():
    found = text_formats.from_prompts(EMBEDDING_GEMMA)
    gecko = text_formats.TextFormat()
    assert (found.query, found.passage, found.no_title) == (
        gecko.query,
        gecko.passage,
        gecko.no_title,
    )
    assert found.prompts == {"Retrieval-document": "title: none | text: "}
    assert text_formats.TextFormat.from_dict(found.to_dict()) == found
    for task, prompt in EMBEDDING_GEMMA.items():
        if task == "document":
            assert found.format_passage("a") == prompt + "a"
        else:
            named = text_formats.DEFAULT_TASK if task == "query" else task
            assert found.format_query("a", named) == prompt + "a"
    assert found.format_passage("a", "T") == "title: T | text: a"
    assert found.format_query("a", "fact checking") == "task: fact checking | query: a"


def test_prompts_of_qwen3_embedding_instruct_queries_only():
    found = text_formats.from_prompts(QWEN)
    assert found.format_query("a b", text_formats.DEFAULT_TASK) == (
        f"Instruct: {WEB}\nQuery:a b"
    )
    assert found.format_query("a", "Find code") == "Instruct: Find code\nQuery:a"
    assert found.format_passage("a") == "a"
    assert found.format_passage("a", "T") == "T a"
    assert not found.prompts


@pytest.mark.parametrize(
    "prompts",
    [
        {"query": "query: ", "document": "passage: "},
        {**EMBEDDING_GEMMA, "document": "text: "},
        {**QWEN, "document": "Passage: "},
        {"query": "", "document": "title: none | text: "},
    ],
)
def test_other_prompts_stay_literal(prompts):
    found = text_formats.from_prompts(prompts)
    assert found.has_only_prompts
    assert found.prompts == prompts
    assert found.format_passage("a") == prompts["document"] + "a"
