"""A corpus, a config and the files of small FRet runs, for the tests."""

import json
import pathlib
import random

import fake_llm

from gecko_jax.cli import flags
from gecko_jax.fret import records
from gecko_jax.llm import request_log

ROOT = pathlib.Path(__file__).parents[1]
WORDS = (
    *("gecko", "insect", "wall", "night", "house", "warm", "toes", "hairs", "climb"),
    *("glass", "bridge", "river", "stone", "train", "station", "coast", "honey"),
    *("acid", "water", "bacteria", "ancient", "tomb", "council", "vote", "spring"),
    *("printer", "paper", "light", "cover", "green", "potato", "vinegar", "mustard"),
)


def write_corpus(folder):
    """17 passages of random words; returns their file."""
    rng = random.Random(0)
    with (folder / "corpus.jsonl").open("w") as lines:
        for number in range(17):
            words = " ".join(rng.sample(WORDS, 12))
            record = {"_id": f"d{number}", "text": f"Passage {number} about {words}."}
            lines.write(json.dumps(record | {"licence": "CC0-1.0"}) + "\n")
    return folder / "corpus.jsonl"


def write_pairs(folder):
    """17 lines to relabel, three of them wrong; returns their file."""
    rng = random.Random(1)
    corpus = [json.loads(line) for line in write_corpus(folder).open()]
    with (folder / "pairs.jsonl").open("w") as lines:
        for number, passage in enumerate(corpus):
            words = passage["text"].rstrip(".").split()[3:]
            record = {"task": ("docs", "terms")[number % 2], "query_id": f"q{number}"}
            record |= {"query": "which " + " ".join(rng.sample(words, 4))}
            given = [passage]
            if number % 3 == 0:
                given += rng.sample([p for p in corpus if p is not passage], 2)
            if number % 6 == 0:  # Wrong labels: the answer is called a negative.
                given = [given[1], passage, given[2]]
            record |= {"positive": given[0]["text"], "passage_id": given[0]["_id"]}
            record |= {"licence": "CC0-1.0", "src": f"page {number}", "level": number}
            if given[1:]:
                record["negatives"] = [one["text"] for one in given[1:]]
                record["negative_ids"] = [one["_id"] for one in given[1:]]
            lines.write(json.dumps(record) + "\n")
    return folder / "pairs.jsonl"


def load(corpus, url="http://127.0.0.1:9", *overrides):
    """Returns the config of a small run; the file `pairs.jsonl` is relabelled."""
    key = "relabel" if pathlib.Path(corpus).name == "pairs.jsonl" else "passages"
    return flags.load(
        f"{ROOT / 'configs/fret.py'}",
        [
            f"--config.{key}.files={corpus}",
            "--config.passages.shard_rows=4",
            "--config.passages.near_duplicate=0.0",
            f"--config.llm.url={url}",
            "--config.llm.model=fake",
            "--config.llm.concurrency=3",
            "--config.llm.retries=4",
            "--config.llm.retry_seconds=0.01",
            "--config.generate.shots=2",
            "--config.retrieve.num_candidates=3",
            "--config.calibrate.num_seeds=2",
            *(f"--config.{override}" for override in overrides),
        ],
    )


def contents(workdir):
    """Every file that a run is judged by, with its bytes."""
    return {
        path.relative_to(workdir).as_posix(): path.read_bytes()
        for path in sorted(workdir.rglob("*"))
        if path.is_file()
        and not {request_log.FOLDER, records.LOCKS} & set(path.parts)
        and path.name != "config.json"
        and path.suffix != ".tmp"  # of a process that was killed
    }


def repeated(fake):
    """Requests answered more than once, those of the canary left out."""
    return set(fake.repeated) - fake_llm.canary_keys(fake)
