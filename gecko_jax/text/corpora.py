"""Passages from files as people have them: JSON lines, lines, prose, or folders.

    corpus.jsonl.gz   a passage for each line, with the id "corpus.jsonl.gz:ID"
    titles.txt        a passage for each line, with the id "titles.txt:LINE"
    notes.md          a passage for each paragraph, with the id "notes.md:LINE"

A corpus of a single file leaves its name out of the ids.
"""

import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from gecko_jax.io import inputs, reading
from gecko_jax.text import text_files

_PROSE = (".md", ".rst")
_KINDS = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz", *_PROSE)
_LISTED = f"{', '.join(_KINDS[:-1])} or {_KINDS[-1]}"
# Longer paragraphs are split between lines: a model reads only the start of a passage.
_MAX_PASSAGE = 2_000  # characters


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


def read_passages(files: Sequence[pathlib.Path]) -> Iterator[text_files.TextRecord]:
    """Yields the passages of some files, with unique ids.

    Raises ValueError, which names file and line, if a line breaks a rule or an id comes
    twice.
    """
    ids = inputs.UniqueIds()
    for file in files:
        is_prose = file.name.endswith(_PROSE)
        passages = _paragraphs(file) if is_prose else text_files.read_texts(file)
        for passage in passages:
            name = passage.id if len(files) == 1 else f"{file}:{passage.id}"
            ids.add(passage.place, name)
            yield passage._replace(id=name)


def _paragraphs(file: pathlib.Path) -> Iterator[text_files.TextRecord]:
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


def _paragraph(place: str, lines: Sequence[str]) -> text_files.TextRecord:
    number = place.rpartition(":")[2]
    return text_files.TextRecord(place, number, "", " ".join(lines), "")
