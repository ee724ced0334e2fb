"""Files of texts as people have them: JSON lines, lines, prose, or folders.

    corpus.jsonl.gz   a text for each line, in the BEIR layout; its id is `_id`
    titles.txt        a text for each line; its id is the number of the line
    notes.md          a passage for each paragraph; its id is the number of its line

The passages of several files have ids such as "titles.txt:LINE".
"""

import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from gecko_jax.io import inputs, reading
from gecko_jax.text import text_formats

_PROSE = (".md", ".rst")
_KINDS = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz", *_PROSE)
_LISTED = f"{', '.join(_KINDS[:-1])} or {_KINDS[-1]}"
# Longer paragraphs are split between lines: a model reads only the start of a passage.
_MAX_PASSAGE = 2_000  # characters


class TextRecord(NamedTuple):
    """A passage or a query of a file; `place` is `file:line`."""

    place: str
    id: str
    title: str
    text: str
    task: str


def read_texts(
    path: str | os.PathLike, *, allow_empty: bool = False
) -> Iterator[TextRecord]:
    """Yields the texts of a JSON-lines file in the BEIR layout, or of a `.txt` file.

    JSON lines have `_id` (or `id`), `text`, and optionally `title` and `task`. A
    passage with a title and no text uses the title as its text. `allow_empty` also
    yields texts without a visible character. Raises ValueError if a line is invalid, or
    an id occurs twice.
    """
    ids = inputs.UniqueIds()
    for place, record in read_texts_or_records(path):
        identity = inputs.id_field(place, record, "_id", "id")
        title = inputs.string_field(place, record, "title", default="").strip()
        text = inputs.string_field(place, record, "text", default="")
        if "text" not in record and not title:
            raise inputs.no_value(place, record, "text")
        text = text if text.strip() else title
        ids.add(place, identity)
        try:
            if text.strip() or not allow_empty:
                text_formats.clean(text)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        task = inputs.string_field(place, record, "task", default="")
        yield TextRecord(place, identity, title, text, task)


def read_texts_or_records(
    path: str | os.PathLike, *, any_characters: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, record) of JSON lines, or of the lines of a `.txt` file.

    A `.txt` line becomes a record with its `text` and, as `id`, its line number.
    """
    name = pathlib.PurePath(path).name
    if not name.removesuffix(".gz").endswith(".txt"):
        yield from reading.read_records(path, any_characters=any_characters)
        return
    for place, line in reading.read_lines(path):
        yield place, {"id": place.rpartition(":")[2], "text": line}


def find_files(paths: Iterable[str | os.PathLike]) -> list[pathlib.Path]:
    """Returns the files at some paths; a folder stands for all files below it.

    Raises FileNotFoundError if there is nothing at a path, and ValueError if a file is
    of another kind, or a folder has no file of a known kind.
    """
    files: list[pathlib.Path] = []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            inside = (f for f in path.rglob("*") if f.name.endswith(_KINDS))
            inside = sorted(filter(pathlib.Path.is_file, inside))
            if not inside:
                raise ValueError(f"{path}: no files in it that end in {_LISTED}")
            files += inside
            continue
        reading.check_is_file(path)
        if not path.name.endswith(_KINDS):
            raise ValueError(
                f"{path}: unknown kind of file; use one that ends in {_LISTED}"
            )
        files.append(path)
    return list(dict.fromkeys(files))


def read_passages(files: Sequence[pathlib.Path]) -> Iterator[TextRecord]:
    """Yields the passages of some files, with unique ids.

    Raises ValueError, which names file and line, if a line breaks a rule or an id comes
    twice.
    """
    ids = inputs.UniqueIds()
    for file in files:
        is_prose = file.name.endswith(_PROSE)
        passages = _paragraphs(file) if is_prose else read_texts(file)
        for passage in passages:
            name = passage.id if len(files) == 1 else f"{file}:{passage.id}"
            ids.add(passage.place, name)
            yield passage._replace(id=name)


def _paragraphs(file: pathlib.Path) -> Iterator[TextRecord]:
    """Yields paragraphs, which blank lines separate; the id is the first line's."""
    start, number = "", 0
    lines: list[str] = []
    for place, line in reading.read_lines(file):
        before, number = number, int(place.rpartition(":")[2])
        # `read_lines` skips blank lines, so numbers jump between paragraphs.
        is_long = sum(map(len, lines)) + len(line) > _MAX_PASSAGE
        if lines and (number > before + 1 or is_long):
            yield _paragraph(start, lines)
            lines = []
        start = start if lines else place
        lines.append(line.strip())
    if lines:
        yield _paragraph(start, lines)


def _paragraph(place: str, lines: Sequence[str]) -> TextRecord:
    number = place.rpartition(":")[2]
    return TextRecord(place, number, "", " ".join(lines), "")
