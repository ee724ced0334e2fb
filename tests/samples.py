"""Records in the schemas of the recipe's sources, and functions that write them."""

import gzip
import json

from gecko_jax.data import task_table
from gecko_jax.formats import model_folder


def load_model(path, mesh=None):
    """Reads a model folder, or the newest checkpoint of a workdir."""
    return model_folder.read_params(model_folder.open_model(path, mesh), mesh)


def forget_checksums(path):
    """Removes the checksums from the JSON file of a folder, as in earlier versions."""
    values = json.loads(path.read_text())
    for name in ("files", "xxh128"):
        values.pop(name, None)
    path.write_text(json.dumps(values))


def write_cache(folder):
    """Writes the records of a token cache in another order than the source file's."""
    import numpy as np
    from array_record.python import array_record_module

    from gecko_jax.data import cache, features

    folder.mkdir()
    writer = array_record_module.ArrayRecordWriter(
        str(folder / "records.array_record"), "group_size:1"
    )
    for i in range(5):
        ids = np.asarray([i, i], np.uint32)
        example = features.Example(
            np.arange(i + 1), np.arange(9), (np.arange(3),), ids, ids, ids[None], 0
        )
        writer.write(cache.encode(example))
    writer.close()
    np.save(folder / "order.npy", np.asarray([4, 2, 0, 1, 3]))


TABLE = {task.name: task for task in task_table.TASKS if task.source}


NLI = [
    {"premise": "A man sleeps.", "hypothesis": "A man rests.", "label": 0},
    {"premise": "A man sleeps.", "hypothesis": "A man runs.", "label": 2},
    {"premise": "A man sleeps.", "hypothesis": "A man dreams.", "label": 1},
    {"premise": "A dog.", "hypothesis": "An animal.", "label": 0},
    {"premise": "A cat.", "hypothesis": "?", "label": -1},
]


LABELLED = [
    {"text": "loved it", "label": 1},
    {"text": "great fun", "label": 1},
    {"text": "dull", "label": 0},
    {"text": "a bore", "label": 0},
]


MIRACL = {
    "query_id": "7",
    "query": "who",
    "positive_passages": [
        {"docid": "1#0", "title": "A", "text": "a"},
        {"docid": "1#1", "title": "A", "text": "aa"},
    ],
    "negative_passages": [{"docid": "2#0", "title": "B", "text": "b"}],
}


HOTPOT = {
    "id": "5a",
    "question": "Who?",
    "supporting_facts": {"title": ["A"], "sent_id": [0]},
    "context": {"title": ["A", "B"], "sentences": [["a ", "b"], ["c"]]},
}


FEVER = {
    "claim": "Honey spoils.",
    "label": "REFUTES",
    "evidence": [["Honey_-LRB-food-RRB-", 3, "Honey keeps."]],
}


MEDMCQA = {
    "question": "Where is insulin made?",
    "opa": "Liver",
    "opb": "Pancreas",
    "opc": "Spleen",
    "opd": "Lung",
    "cop": 1,
    "exp": "Beta cells make it.",
}


NATURAL = {
    "question": {"text": "who found it"},
    "document": {
        "title": "Honey",
        "tokens": {
            "token": ["<P>", "Bees", "did", "</P>"],
            "is_html": [True, False, False, True],
        },
    },
    "annotations": {"long_answer": {"start_token": [-1, 0], "end_token": [-1, 4]}},
}


# Task -> two or more records in the real schema of its source.
RECORDS = {
    "gooaq": [{"id": 1, "question": "what is it", "answer": "A lizard."}],
    "stackexchange_title_body": [{"title": "a &amp; b", "body": "<p>Why?</p>"}],
    "stackexchange_qa": [{"title": "a < b?", "answer": "<b>No</b>, b &lt; a"}],
    "hotpotqa": [HOTPOT],
    "fever": [FEVER],
    "medmcqa": [MEDMCQA],
    **{name: [MIRACL] for name in TABLE if name.startswith("miracl_")},
}


def split(found):
    found = list(found)
    lines = [line for line in found if isinstance(line, dict)]
    return lines, [line.reason for line in found if not isinstance(line, dict)]


def write_source(folder, kind, records):
    """Writes records in the file format of a source of the table."""
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        path = folder / "train-0.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path = folder / "train.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    return str(path)


def write_lines(path, *records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def beir_folder(folder, corpus=(), queries=(), judged=()):
    """Writes a valid folder with one query, two passages and the given additions."""
    write_lines(
        folder / "corpus.jsonl",
        {"_id": "d1", "title": "A", "text": "a"},
        {"_id": "d2", "text": "b"},
        *corpus,
    )
    write_lines(folder / "queries.jsonl", {"_id": "q", "text": "who"}, *queries)
    (folder / "qrels").mkdir(exist_ok=True)
    rows = ["query-id\tcorpus-id\tscore", "q\td1\t1", "q\td2\t0", *judged]
    (folder / "qrels" / "train.tsv").write_text("\n".join(rows))
    return str(folder)


def write(path, content):
    """Writes text or bytes, compressed if the name ends in `.gz`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    packs = path.name.endswith(".gz") and not data.startswith(b"\x1f")
    path.write_bytes(gzip.compress(data) if packs else data)
    return path


def judged_folder(folder, corpus, name, ids, qrels=None, split="test"):
    """Writes a BEIR folder with one query whose relevant passages are `ids`."""
    if name:
        write(folder / name, corpus)
    write(folder / "queries.jsonl", '{"_id": "q", "text": "lizard"}\n')
    rows = [{"query-id": "q", "corpus-id": i, "score": 1} for i in ids]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    name, content = qrels or ("qrels/SPLIT.jsonl", lines)
    write(folder / name.replace("SPLIT", split), content)
    return folder
