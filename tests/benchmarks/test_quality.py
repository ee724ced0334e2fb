"""The parts of the quality benchmark: configs, times, texts, plots."""

import argparse
import json
import pathlib
import re

import numpy as np
import pytest
import sentencepiece

import gecko_jax.config
from gecko_jax.cli import flags
from gecko_jax.inference import embedding

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def benchmarks(monkeypatch):
    """Makes the scripts importable."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def data_folder(tmp_path):
    """A folder with six pairs, a judged folder for each split, and labelled texts."""

    def write(path, records):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    root = tmp_path / "small"
    pairs = [
        {"task": "t", "query": f"query {n}", "passage": f"passage {n}", "src": "x"}
        for n in range(6)
    ]
    write(root / "train.jsonl", pairs)
    for split in ("dev", "test"):
        folder = root / "eval" / split / "t"
        write(folder / "corpus.jsonl", [{"_id": "p", "text": f"{split} passage"}])
        write(folder / "queries.jsonl", [{"_id": "q", "text": f"{split} query"}])
        write(folder / "qrels.jsonl", [{"query-id": "q", "corpus-id": "p", "score": 1}])
    texts = ["a red one", "test passage", "two reds", "a blue one", "two blues"]
    labelled = [
        {"text": text, "label": "red" if "red" in text else "blue"} for text in texts
    ]
    for part in ("train", "test"):
        rows = [row for row in labelled if part == "train" or row["text"] == "two reds"]
        write(root / "eval" / "test" / "labels" / f"{part}.jsonl", rows)
    return root


def _options(tmp_path, data="quickstart"):
    return argparse.Namespace(
        output=tmp_path, data=data, steps=0, second_steps=0, batch_size=0
    )


def test_every_row_is_a_valid_and_distinct_config(benchmarks, data_folder, tmp_path):
    import quality_data
    import quality_makers
    import quality_rows

    data = quality_data.find(str(data_folder))

    def configs(row):
        return quality_makers.configs(row, data, 0, _options(tmp_path))

    made = set()
    rows = quality_rows.ABLATIONS | quality_rows.SEARCH
    for name, row in rows.items():
        *stages, _, second = configs(row)
        for config in stages:
            gecko_jax.config.check(config)
        assert second not in made, name
        made.add(second)


def test_the_best_row_is_the_recipe_that_the_configs_name(benchmarks, tmp_path):
    import quality_data
    import quality_makers
    import quality_rows

    row = quality_rows.LADDER["bag-1024-32k"]
    data = quality_data.find("quickstart")
    stages = quality_makers.configs(row, data, 0, _options(tmp_path))[:2]
    # Paths, and the intervals of checkpoints and evaluations.
    places = (
        r"data\.(files|vocabulary|teacher|cache_dir)$|init\.checkpoint|checkpoint\."
    )
    places += r"|evaluation\.|train\.compilation_cache"
    for name, made in zip(("prefinetune", "finetune"), stages, strict=True):
        named = flags.load(f"{ROOT / 'configs' / name}.py:local,taught")
        gecko_jax.config.check(named)
        ours, theirs = (
            {
                key: value
                for key, value in gecko_jax.config.flatten(
                    json.loads(gecko_jax.config.to_json(config))
                ).items()
                if not re.match(places, key)
            }
            for config in (named, made)
        )
        assert ours == theirs


def test_rows_that_differ_in_the_second_stage_share_the_first(benchmarks, tmp_path):
    import quality_data
    import quality_makers
    import quality_rows

    data = quality_data.find("quickstart")
    rows = quality_rows.ABLATIONS
    firsts = {
        name: quality_makers.configs(rows[name], data, 0, _options(tmp_path))[2]
        for name in ("base", "negatives-3", "no-format")
    }
    assert firsts["base"] == firsts["negatives-3"] != firsts["no-format"]


def test_classes_exclude_judged_texts(benchmarks, data_folder):
    import quality_data

    data = quality_data.find(str(data_folder), split="dev")
    assert list(data.evals) == ["dev"]
    for kind in quality_data.CLASSES:
        lines = list(quality_data.class_triples(data, kind))
        texts = {text for line in lines for text in (line["query"], line["positive"])}
        # "test passage" is judged; "two reds" is a labelled test text.
        assert not any("passage" in text or "reds" in text for text in texts)
        groups = {line.get("negative_group") for line in lines}
        assert len(groups) == (len(lines) if kind == "mask" else 1)


def test_a_subset_is_always_the_same(benchmarks, data_folder):
    import quality_data

    data = quality_data.find(str(data_folder), subset=4)
    chosen = quality_data.choose(data)
    assert len(chosen) == 4
    assert chosen == quality_data.choose(data)
    assert quality_data.find(str(data_folder)).name != data.name
    with pytest.raises(SystemExit, match="--subset=9"):
        quality_data.choose(quality_data.find(str(data_folder), subset=9))


def test_a_killed_run_counts_to_its_last_checkpoint(benchmarks, tmp_path):
    import measured

    # Killed before the first checkpoint, killed after the one at 230, then finished.
    (tmp_path / "times.txt").write_text("began 100\nbegan 200\nsaved 230\nbegan 300\n")
    assert measured.spent(tmp_path) == 30
    with measured.timed(tmp_path):
        pass
    assert measured.spent(tmp_path) == pytest.approx(30, abs=1)
    checkpoint = tmp_path / "checkpoints" / "1"
    checkpoint.mkdir(parents=True)
    with measured.timed(tmp_path):
        pass
    assert "saved" in (tmp_path / "times.txt").read_text().splitlines()[-3]
    # Killed after its last checkpoint: no later run records that time.
    (tmp_path / "times.txt").write_text(f"began {checkpoint.stat().st_mtime - 7}\n")
    assert measured.spent(tmp_path) == pytest.approx(7)


def test_the_table_of_ablations_has_a_plot(benchmarks, tmp_path):
    import quality_rows
    import quality_table

    (tmp_path / "rows").mkdir()
    for name in ("base", "no-mask"):
        for seed in (0, 1):
            row = {
                "row": name,
                "data": "small-dev",
                "seed": seed,
                "steps": [10, 5],
                "batch_size": 8,
                "date": "2026-11-24",
                "commit": "abc",
                "machine": "m",
                "peak_gib": 1.0,
                "train_seconds": 9.0,
                "pairs_per_second": 8.0,
                "accuracy": 0.5 + seed / 4,
                "scores": {
                    "dev": {"t": {"64": 0.2, "128": 0.3, "256": 0.4 + seed / 10}}
                },
            }
            path = tmp_path / "rows" / f"{name}-{seed}.json"
            path.write_text(json.dumps(row))
    quality_table.write(
        tmp_path / "rows", tmp_path / "r.md", quality_rows.ROWS, quality_rows.GROUPS
    )
    page = (tmp_path / "r.md").read_text()
    title = "## Ablations on `small-dev`: 10 steps in the first stage, 5 steps in the "
    assert f"{title}second stage, batches of 8\n" in page
    assert "| duplicates not masked | 256 | 0.450 (0.400 to 0.500) |" in page
    assert "0.625 (0.500 to 0.750)" in page  # classes
    assert "## Ladder" not in page
    (picture,) = tmp_path.glob("*.png")
    assert f"({picture.name})" in page
    # Another command writes the last part.
    kept = "\n## The bundled model\n\nIts scores.\n"
    (tmp_path / "r.md").write_text(page + kept)
    quality_table.write(
        tmp_path / "rows", tmp_path / "r.md", quality_rows.ROWS, quality_rows.GROUPS
    )
    assert (tmp_path / "r.md").read_text() == page + kept


@pytest.mark.parametrize(
    ("row", "judged"),
    [
        ({"src": "wn30-noun", "task": "wordnet"}, ("WordNet-3.0", "")),
        ({"src": "keras/keras/a.py:f"}, ("Apache-2.0", "")),
        ({"src": "jax/jax/a.py:f"}, ("", "the package by which")),
        ({"src": "own", "licence": "MIT"}, ("MIT", "")),
        # A described package is not the source of that name.
        ({"src": "sphinx"}, ("", "licence not known")),
        ({"src": "jargon", "task": "deb"}, ("", "licence not known")),
        ({"src": "foldoc", "task": "term"}, ("GFDL-1.1-or-later", "GFDL-1.1-or-later")),
        ({"src": "docutils/docutils/a.py:f"}, ("", "several licences, the GPL among")),
        ({"src": "pip/pip/_vendor/a.py:f"}, ("", "third-party code inside a package")),
        ({"src": "git-man/git.1.gz"}, ("GPL-2.0-only", "GPL-2.0-only does not let it")),
    ],
)
def test_only_text_with_a_permissive_licence_trains_the_bundled_model(
    benchmarks, row, judged
):
    import text_licences

    licence, reason = text_licences.Sources.load().judge({"task": "code", **row})
    assert licence == judged[0]
    assert reason.startswith(judged[1])
    assert bool(reason) == bool(judged[1])


def test_every_package_of_text_has_a_permissive_licence_and_its_evidence(benchmarks):
    import text
    import text_licences

    permissive = text_licences.Sources.load().permissive
    packages = json.loads(text.SOURCES.read_text())
    for entries in packages.values():
        for name, entry in entries.items():
            assert entry["licence"] in permissive, name
            assert entry["evidence"], name
    # Only the prose of the package is under CC-BY-SA-4.0.
    assert packages["deb"]["rust-doc"]["skip"] == ["*/embedded-book/*"]


def test_a_skipped_part_of_a_package_is_not_read(benchmarks, tmp_path):
    import text_readers

    for part in ("book", "embedded-book"):
        (tmp_path / "doc" / part).mkdir(parents=True)
        page = f"<h2>About {part}</h2><p>This is a long passage about the {part}.</p>"
        (tmp_path / "doc" / part / "index.html").write_text(page)
    rows = text_readers.read_package(tmp_path, "html", ["*/embedded-book/*"])
    assert list(rows) == [("About book", "This is a long passage about the book.")]


def test_a_distilled_table_becomes_a_bag_of_weighted_tokens(benchmarks, tiny_files):
    import distilled

    rows = tiny_files.encoder_config.vocab_size
    table = np.random.default_rng(0).normal(size=(rows, 8)).astype(np.float32)
    proto = tiny_files.vocabulary_proto
    gecko = embedding.Gecko(distilled.to_model(table, proto, [4, 8], 0, {}))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    tokens = [*pieces.EncodeAsIds("a small lizard"), pieces.eos_id()]
    expected = table[tokens].sum(0)
    expected /= np.linalg.norm(expected)
    vector = gecko.encode_queries(["a small lizard"])[0]
    np.testing.assert_allclose(vector, expected, atol=1e-5)
