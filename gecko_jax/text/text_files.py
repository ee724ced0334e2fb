"""Texts of a user's file: JSON lines as in BEIR, or one text a line of a `.txt`."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from gecko_jax.io import inputs, reading
from gecko_jax.text import text_formats


class TextRecord(NamedTuple):
    """One text of a user's file: a passage, or a query."""

    place: str
    id: str
    title: str
    text: str
    task: str


def read_texts(
    path: str | os.PathLike, *, allow_empty: bool = False
) -> Iterator[TextRecord]:
    """Yields the texts of a JSON-lines file in the BEIR layout, or of a `.txt` file.

    JSON lines have `_id` (or `id`), `text` and, if they like, `title` and `task`; a
    passage with nothing but a title is its title. Of a `.txt` file each line is a
    text, and its id the line's number.

    Args:
        path: The file; `.gz` is unpacked.
        allow_empty: Yields texts without a visible character too.

    Raises:
        ValueError: A line breaks a rule, or an id comes twice; names file and line.
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
    """Yields (place, record) of JSON lines, or of a `.txt` file as `id` and `text`.

    The id of a line of text is its number.
    """
    name = pathlib.PurePath(path).name
    if not name.removesuffix(".gz").endswith(".txt"):
        yield from reading.read_records(path, any_characters=any_characters)
        return
    for place, line in reading.read_lines(path):
        yield place, {"id": place.rpartition(":")[2], "text": line}
