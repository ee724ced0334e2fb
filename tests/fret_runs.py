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
    """Writes 17 passages of random words and returns the file."""
    rng = random.Random(0)
    with (folder / "corpus.jsonl").open("w") as lines:
        for number in range(17):
            words = " ".join(rng.sample(WORDS, 12))
            record = {"_id": f"d{number}", "text": f"Passage {number} about {words}."}
            lines.write(json.dumps(record | {"licence": "CC0-1.0"}) + "\n")
    return folder / "corpus.jsonl"


def load(corpus, url="http://127.0.0.1:9", *overrides):
    return flags.load(
        f"{ROOT / 'configs/fret.py'}",
        [
            f"--config.passages.files={corpus}",
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
    """Returns the bytes of every result file of a run."""
    return {
        path.relative_to(workdir).as_posix(): path.read_bytes()
        for path in sorted(workdir.rglob("*"))
        if path.is_file()
        and not {request_log.FOLDER, records.LOCKS} & set(path.parts)
        and path.name != "config.json"
        and path.suffix != ".tmp"  # left by a killed process
    }


def repeated(fake):
    """Returns the requests with more than one response, except the canary's."""
    return set(fake.repeated) - fake_llm.canary_keys(fake)
