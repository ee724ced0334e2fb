"""`gecko search`: answers queries from an index."""

import argparse
import io
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from gecko_jax.cli import parsing
from gecko_jax.io import reading, wording

_SEARCH = """\
Searches an index, or files and folders of texts. Without a QUERY it reads queries from
standard input, one per line.

--texts takes JSON lines (.jsonl), one text per line (.txt) and prose (.md, .rst), and
folders of these. The first search embeds them; the next ones use the cache. --hybrid
fuses the ranking with that of BM25 (reciprocal rank fusion), which finds rare words and
names better.

examples:
  gecko search "how do plants make food" --texts notes/ --hybrid
  gecko search --model=runs/finetune --index=index "how do plants make food"
  gecko search --model=runs/finetune --index=index --count=3 "first" "second"
  gecko search --model=runs/finetune --index=index < queries.txt > hits.jsonl --json"""


def add_parser(verbs: Any) -> None:
    """Adds the parser of `gecko search`."""
    parser = parsing.add_verb(verbs, "gecko search", _SEARCH, search)
    add = parser.option
    add("queries", "query, in quotes", str, nargs="*", metavar="QUERY")
    parsing.add_model(parser, "mini")
    add("--index", "output of `gecko index`", "DIR")
    add("--texts", "files or folders to search instead of an index", "PATH", nargs="+")
    add("--hybrid", "fuse with BM25", bool)
    text = "name or description of the task (default: search result)"
    add("--task", text, str, metavar="TASK")
    add("--count", "results per query", parsing.positive, 5)
    add("--json", "print JSON lines", bool)


def search(options: argparse.Namespace) -> None:
    """Answers the queries of the command line, or those on standard input."""
    if not options.queries and sys.stdin is None:
        raise ValueError(
            "no QUERY, and standard input is closed; give queries in quotes, or "
            "redirect a file of queries with < queries.txt"
        )
    if bool(options.index) == bool(options.texts):
        raise ValueError("--index, --texts: give one of them")
    from gecko_jax.inference import embedding, vector_index

    model = embedding.load(options.model)
    if options.texts:
        from gecko_jax.inference import cached_index

        index = cached_index.open_index(model, options.texts)
    else:
        index = vector_index.load(options.index)
    index.check_model(model)
    hybrid_index = None
    if options.hybrid:
        from gecko_jax.inference import hybrid

        hybrid_index = hybrid.HybridIndex(index)

    def answer(queries: list[str]) -> None:
        task = options.task or embedding.DEFAULT_TASK
        vectors = model.encode_queries(queries, task, dim=index.dim)
        if hybrid_index is None:
            results = index.search(vectors, options.count)
        else:
            results = hybrid_index.search(queries, vectors, options.count)
        for query, scores, ids in zip(queries, *results, strict=True):
            hits = [
                {"id": i, "score": round(float(score), 4), "text": index.text(i)}
                for score, i in zip(scores, ids, strict=True)
            ]
            if options.json:
                print(wording.json_line({"query": query, "hits": hits}))
            else:
                _print_hits(query, hits)
        if sys.stdout is not None:  # None if the caller has closed it.
            sys.stdout.flush()

    if options.queries:
        answer(options.queries)
        return
    # Compile before the first query, so that its answer is not slower than the others.
    for text in ("short", "long " * model.files.query_length):
        model.encode_queries([text], dim=index.dim)
    _answer_lines(answer)


def _answer_lines(answer: Callable[[list[str]], None]) -> None:
    """Answers each line of standard input; reports invalid lines and continues."""
    try:
        for place, line in _read_lines():
            try:
                answer([line])
            except ValueError as error:
                _report(f"{place}: {error}" if place else error)
    except KeyboardInterrupt:
        # Replaces the default message, because there is no run to resume.
        raise KeyboardInterrupt("interrupted") from None


def _report(error: ValueError | str) -> None:
    print(f"gecko search: {wording.message(str(error))}", file=sys.stderr)


def _read_lines() -> Iterator[tuple[str, str]]:
    """Yields (place, line) of standard input; the place is "" at a terminal."""
    if not sys.stdin.isatty():
        yield from reading.decode_lines("standard input", sys.stdin.buffer, _report)
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are not UTF-8 become surrogates. The model refuses such a query,
        # and the loop continues.
        sys.stdin.reconfigure(errors="surrogateescape")
    import readline  # noqa: F401  (enables line editing and history in `input`)

    print("Enter one query per line. An empty line or Ctrl-D ends the session.")
    try:
        while line := input("query> ").strip():
            yield "", line
    except EOFError:
        print()


def _print_hits(query: str, hits: list[dict[str, Any]]) -> None:
    width = max(shutil.get_terminal_size((100, 24)).columns, 60)
    print(f"\n{wording.printable(query)}")
    for rank, hit in enumerate(hits, 1):
        head = f"{rank:>3}  {hit['score']:.3f}  {hit['id']}  "
        text = textwrap.shorten(hit["text"] or "", max(width - len(head), 20))
        print(wording.printable(f"{head}{text}").rstrip())
