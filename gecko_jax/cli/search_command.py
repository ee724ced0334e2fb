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
Answers queries from an index; without one, reads them one a line.

examples:
  gecko search --model=runs/finetune --index=index "how do plants make food"
  gecko search --model=runs/finetune --index=index --count=3 "first" "second"
  gecko search --model=runs/finetune --index=index < queries.txt > hits.jsonl --json"""


def add_parser(verbs: Any) -> None:
    """Adds the parser of `gecko search`."""
    parser = parsing.add_verb(verbs, "gecko search", _SEARCH, search)
    parser.add_argument("queries", nargs="*", metavar="QUERY", help="in quotes")
    parsing.add_model(parser)
    parser.add_argument(
        "--index",
        required=True,
        type=parsing.path,
        metavar="DIR",
        help="of `gecko index`",
    )
    parser.add_argument("--task", help="name or description (search result)")
    parser.add_argument(
        "--count", type=parsing.positive, default=5, help="results of a query (5)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines")


def search(options: argparse.Namespace) -> None:
    """Answers the queries given, or those on standard input."""
    if not options.queries and sys.stdin is None:
        raise ValueError(
            "no QUERY, and standard input is closed; give queries in quotes, or a file "
            "of them with < queries.txt"
        )
    from gecko_jax.inference import embedding, vector_index

    model = embedding.load(options.model)
    loaded = vector_index.load(options.index)
    loaded.check_model(model)

    def answer(queries: list[str]) -> None:
        task = options.task or embedding.DEFAULT_TASK
        vectors = model.encode_queries(queries, task, dim=loaded.dim)
        scores, ids = loaded.search(vectors, options.count)
        for row, query in enumerate(queries):
            hits = [
                {"id": i, "score": round(float(s), 4), "text": loaded.text(i)}
                for s, i in zip(scores[row], ids[row], strict=True)
            ]
            if options.json:
                print(wording.json_line({"query": query, "hits": hits}))
            else:
                _print_hits(query, hits)
        if sys.stdout is not None:  # Closed.
            sys.stdout.flush()

    if options.queries:
        answer(options.queries)
    else:
        # Compiled before the first question, whose answer then takes no longer.
        for text in ("short", "long " * model.files.query_length):
            model.encode_queries([text], dim=loaded.dim)
        _answer_lines(answer)


def _answer_lines(answer: Callable[[list[str]], None]) -> None:
    """Answers each line of standard input; a bad one is told and passed over."""
    try:
        for place, line in _read_lines():
            try:
                answer([line])
            except ValueError as error:
                _tell(f"{place}: {error}" if place else error)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted") from None  # Nothing is to go on from.


def _tell(error: ValueError | str) -> None:
    print(f"gecko search: {wording.message(str(error))}", file=sys.stderr)


def _read_lines() -> Iterator[tuple[str, str]]:
    """Yields (place, line) of standard input; at a terminal the place is ""."""
    if not sys.stdin.isatty():
        yield from reading.decode_lines("standard input", sys.stdin.buffer, _tell)
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A line that is no text is refused as a query, and does not end the reading.
        sys.stdin.reconfigure(errors="surrogateescape")
    import readline  # noqa: F401  (gives the prompt its editing and history)

    print("One query a line; an empty line or Ctrl-D ends.")
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
