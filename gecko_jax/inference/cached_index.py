"""An index of files and folders, built at the first search and kept in a cache.

    ~/.cache/gecko_jax/search/KEY/files.json    the files, with their checksums
    ~/.cache/gecko_jax/search/KEY/texts.jsonl   their passages
    ~/.cache/gecko_jax/search/KEY/index         the index

KEY is a hash of the paths and the model. If a file changes, the entry is built again.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Sequence

from gecko_jax.inference import embedding, vector_files, vector_index
from gecko_jax.io import reading, writing
from gecko_jax.text import text_files

CACHE = "~/.cache/gecko_jax/search"


def open_index(
    gecko: embedding.Gecko,
    paths: Sequence[str | os.PathLike],
    cache: str | os.PathLike = CACHE,
) -> vector_index.Index:
    """Returns an index of the passages in some files and folders (`text_files`).

    An interrupted build resumes after the last shard of vectors. `cache` is the folder
    of all cached indexes. Raises ValueError if a path is of an unknown kind, or a line
    breaks a rule.
    """
    files = text_files.find_files(paths)
    names = [str(file.absolute()) for file in files]
    key = hashlib.sha256(json.dumps([gecko.revision, names]).encode()).hexdigest()[:16]
    folder = pathlib.Path(cache).expanduser() / key
    listing = folder / "files.json"
    checksums = {name: reading.sha256(name) for name in names}
    if not listing.exists() or json.loads(listing.read_text("utf-8")) != checksums:
        shutil.rmtree(folder, ignore_errors=True)
        with (
            writing.write_file(folder / "texts.jsonl") as path,
            path.open("w") as lines,
        ):
            for _, identity, title, text, _ in text_files.read_passages(files):
                record = {"_id": identity, "title": title, "text": text}
                lines.write(json.dumps(record) + "\n")
        with writing.write_file(listing) as temporary:
            temporary.write_text(json.dumps(checksums, indent=1), "utf-8")
    if (folder / "index").exists():
        return vector_index.load(folder / "index")
    vectors = folder / "vectors"
    vector_files.embed_file(gecko, folder / "texts.jsonl", vectors)
    index = vector_index.from_embeddings(vectors)
    index.save(folder / "index")
    shutil.rmtree(vectors)
    return index
