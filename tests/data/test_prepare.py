"""Preparing a set: from its source to triples, resumably, or a clear error."""

import dataclasses

import numpy as np
import pytest
import samples

from gecko_jax.cli import entry
from gecko_jax.data import (
    jsonl,
    load_seqio,
    mixtures,
    prepare,
    registration,
    selection,
    sources,
    task_table,
)
from gecko_jax.text import text_formats, vocabularies


def test_a_prepared_set_is_a_seqio_task(tmp_path):
    source = samples.write_source(tmp_path, "jsonl", samples.RECORDS["fever"])
    prepare.prepare(samples.TABLE["fever"], tmp_path / "p", source=source)
    chosen = selection.select(
        mixture="fever",
        files=(),
        vocabulary=vocabularies.load(task_table.QUICKSTART_VOCABULARY),
        text_format=text_formats.TextFormat(),
        cache_dir=tmp_path / "cache",
        prepared_dir=tmp_path / "p",
    )
    (task,) = chosen.tasks
    registered = registration.register_task(task, chosen.text_format, chosen.vocabulary)
    assert registered.name.startswith("fever:")
    assert registered.num_input_examples("train") == 1


@pytest.mark.parametrize("name", samples.RECORDS)
def test_every_set_of_files_is_prepared(tmp_path, name):
    task = samples.TABLE[name]
    source = samples.write_source(tmp_path, task.source, samples.RECORDS[name])
    summary = prepare.prepare(task, tmp_path / "p", source=source)
    located = mixtures.locate(task, tmp_path / "p")
    pairs = [p for path in located.files for p in jsonl.read_pairs(path, name)]
    assert len(pairs) == summary.examples > 0
    again = prepare.prepare(task, tmp_path / "p", source=source)
    assert again == summary


def test_a_set_gets_as_many_negatives_as_are_asked_for(tmp_path):
    words = ("lizard", "gecko", "snake", "bird")
    records = [
        {"question": f"animal named {w}", "answer": f"a {w} is an animal that moves"}
        for w in words
    ]
    task = dataclasses.replace(samples.TABLE["gooaq"], mine=True)
    source = samples.write_source(tmp_path, task.source, records)
    one, two = tmp_path / "one", tmp_path / "two"
    prepare.prepare(task, one, source=source)
    prepare.prepare(task, two, source=source, negatives=2)
    for folder, wanted in ((one, 1), (two, 2)):
        located = mixtures.locate(task, folder)
        pairs = [p for path in located.files for p in jsonl.read_pairs(path)]
        mined = [len(pair.negatives) for pair in pairs]
        assert mined == [wanted] * 4
    with pytest.raises(ValueError, match="with other settings"):
        prepare.prepare(task, one, source=source, negatives=2)


@pytest.mark.parametrize(
    "name", [n for n, t in samples.TABLE.items() if t.source.startswith("tfds:")]
)
def test_every_tfds_set_is_prepared(tmp_path, name, monkeypatch):
    load_seqio()
    import tensorflow_datasets as tfds

    def as_dataset(self, *args, **kwargs):
        import tensorflow as tf

        rng = np.random.default_rng(0)

        def four(item):
            if isinstance(item, dict):
                # Ragged within ragged is more than a generator can give.
                return {k: four(v) for k, v in item.items() if k != "short_answers"}
            return [item] * 4

        def value(feature, path, n):
            if isinstance(feature, tfds.features.FeaturesDict):
                return {k: value(f, k, n) for k, f in feature.items()}
            if isinstance(feature, tfds.features.Sequence):
                return four(value(feature.feature, path, n))
            dtype = feature.np_dtype
            if dtype == np.bool_:
                return path == ("joy" if n % 2 else "anger")
            if path == "start_token":
                return 0
            if path == "end_token":
                return 4
            if np.issubdtype(dtype, np.integer):
                return n % 2 * (2 if "premise" in self.info.features else 1)
            if np.issubdtype(dtype, np.floating):
                return float(n % 2)
            if path == "intent_name":
                return f"intent {n % 2}"
            if path == "premise":
                return f"premise {n // 2}"
            return f"{path} {n} {rng.integers(9)}"

        records = [value(self.info.features, "", n) for n in range(8)]
        spec = self.info.features.get_tensor_spec()
        spec.get("annotations", {}).pop("short_answers", None)
        return tf.data.Dataset.from_generator(lambda: records, output_signature=spec)

    with tfds.testing.mock_data(as_dataset_fn=as_dataset):
        summary = prepare.prepare(
            samples.TABLE[name], tmp_path, accepted_licences=(name,), part=3
        )
    assert summary.examples > 0
    assert len(list(summary.folder.glob("part-*"))) == -(-summary.examples // 3)


@pytest.mark.parametrize("stop", [3, 6])
def test_interrupted_preparation_goes_on(tmp_path, monkeypatch, stop):
    task = samples.TABLE["fever"]
    records = [
        {
            **samples.FEVER,
            "claim": f"q {n}",
            "evidence": [[f"P{n % 5}", 0, f"a q {n % 7}"]],
        }
        for n in range(10)
    ]
    source = samples.write_source(tmp_path, "jsonl", records)
    write, calls = prepare.mining.write_lines, []

    def fail(path, lines):
        calls.append(path)
        if len(calls) == stop:
            raise KeyboardInterrupt
        write(path, lines)

    monkeypatch.setattr(prepare.mining, "write_lines", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(task, tmp_path / "a", source=source, part=3)
    assert not mixtures.locate(task, tmp_path / "a").files
    summary = prepare.prepare(task, tmp_path / "a", source=source, part=3)
    # Four parts are read and four are mined: what was there is not written again.
    assert len(calls) == 4 + 4 + 1
    monkeypatch.undo()
    whole = prepare.prepare(task, tmp_path / "b", source=source, part=3)
    assert summary.dropped == whole.dropped
    for one, other in zip(
        sorted(summary.folder.glob("part-*")),
        sorted(whole.folder.glob("part-*")),
        strict=True,
    ):
        assert one.read_bytes() == other.read_bytes()


def test_a_source_that_changed_meanwhile_is_refused(tmp_path, monkeypatch):
    task, target = samples.TABLE["gooaq"], tmp_path / "p"
    records = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(4)]
    source = samples.write_source(tmp_path, "parquet", records)
    with monkeypatch.context() as patched:
        patched.setattr(prepare.mining, "extend", None)
        with pytest.raises(TypeError):
            prepare.prepare(task, target, source=source, part=3)
    samples.write_source(
        tmp_path, "parquet", [{"question": "q", "answer": "other"}] * 4
    )
    with pytest.raises(ValueError, match="the source has changed since"):
        prepare.prepare(task, target, source=source, part=3)
    folder = samples.beir_folder(tmp_path / "beir")
    assert sources.stamps(folder)[f"{folder}/qrels/train.tsv"][0] == 38
    assert sources.stamps("tfds:snli:train") == {}


def test_a_source_that_was_mended_is_prepared(tmp_path):
    task, target = samples.TABLE["gooaq"], tmp_path / "p"
    source = samples.write_source(tmp_path, "parquet", [{"question": "q"}])
    with pytest.raises(ValueError, match="no field 'answer'"):
        prepare.prepare(task, target, source=source)
    samples.write_source(tmp_path, "parquet", [{"question": "q", "answer": "a"}])
    assert prepare.prepare(task, target, source=source).examples == 1


def test_restricted_licence_must_be_accepted(tmp_path):
    with pytest.raises(ValueError, match="--accept-licence=imdb_sentiment"):
        prepare.prepare(samples.TABLE["imdb_sentiment"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_drops_are_counted_and_empty_sets_refused(tmp_path):
    records = [
        {"question": "q", "answer": "a"},
        {"question": "q", "answer": "a"},
        {"question": "q", "answer": None},
        {"question": "same", "answer": "same"},
    ]
    task = samples.TABLE["gooaq"]
    source = samples.write_source(tmp_path, "parquet", records)
    summary = prepare.prepare(task, tmp_path / "p", source=source)
    assert summary.examples == 1
    assert summary.dropped == {
        "duplicate": 1,
        "empty text": 1,
        "positive equals query": 1,
    }
    with pytest.raises(ValueError, match="gives no example"):
        prepare.prepare(
            task,
            tmp_path / "q",
            source=samples.write_source(tmp_path, "parquet", records[2:3]),
        )


def test_negatives_are_mined_from_the_whole_source(tmp_path):
    evidence = [
        {
            **samples.FEVER,
            "claim": "Honey of bees",
            "evidence": [["A", 0, "Honey is food"]],
        },
        {
            **samples.FEVER,
            "claim": "Sea of salt",
            "evidence": [["C", 0, "Salty water"]],
        },
        {
            **samples.FEVER,
            "claim": "Bees make food",
            "evidence": [["B", 0, "Bees make honey"]],
        },
        {
            **samples.FEVER,
            "claim": "A word alone",
            "evidence": [["D", 0, "Xyzzy"]],
        },
    ]
    source = samples.write_source(tmp_path, "jsonl", evidence)
    for part in (1, 2, 9):
        target = tmp_path / f"p{part}"
        summary = prepare.prepare(
            samples.TABLE["fever"], target, source=source, part=part
        )
        assert (summary.examples, summary.without_negative) == (4, 2)
        lines = [
            pair
            for path in mixtures.locate(samples.TABLE["fever"], target).files
            for pair in jsonl.read_pairs(path)
        ]
        assert [pair.negatives for pair in lines] == [
            ("Bees make honey",),
            (),
            ("Honey is food",),
            (),
        ]
        assert lines[0].negative_titles == ("B",)
        names = {path.name for path in summary.folder.iterdir()}
        assert names == {
            "prepared.json",
            *(f"part-{n:05}.jsonl.gz" for n in range(-(-4 // part))),
        }


def cli_prepare(capsys, *arguments):
    status = entry.main(["data", "prepare", *map(str, arguments)])
    return status, capsys.readouterr()


BAD_RECORDS = {
    "gooaq": [([{"question": "q"}], "record 1: a record has no field 'answer' (it")],
    "medmcqa": [
        (
            [samples.MEDMCQA, {**samples.MEDMCQA, "cop": 4}],
            "record 2: label 4 is out of range",
        ),
        (
            [{**samples.MEDMCQA, "cop": "b"}],
            "record 1: field 'cop' is a string, and must be a number",
        ),
        (
            [{**samples.MEDMCQA, "cop": 0.5}],
            "record 1: field 'cop' is 0.5, and must be a whole number",
        ),
        ([{**samples.MEDMCQA, "cop": None}], "(left out: 1 no answer)"),
    ],
    "fever": [
        ([{**samples.FEVER, "label": "MAYBE"}], "record 1: label 'MAYBE' is out of"),
        ([{**samples.FEVER, "evidence": [["A", 0]]}], "record 1: "),
        ([{**samples.FEVER, "evidence": 3}], "record 1: "),
        (
            [{**samples.FEVER, "claim": 3}],
            "record 1: field 'claim' is a number, and must be text",
        ),
        ([{**samples.FEVER, "id": 3}] * 2, "train.jsonl.gz:2: id '3' was given before"),
        ([{**samples.FEVER, "label": "NOT ENOUGH INFO"}], "(left out: 1 no evidence)"),
        ([], "gives no example; check the split"),
    ],
    "hotpotqa": [
        ([{**samples.HOTPOT, "context": {"x": 1}}], "record 1: a record has no field")
    ],
    "miracl_en": [([{**samples.MIRACL, "positive_passages": ["a"]}], "record 1: ")],
}


@pytest.mark.parametrize(
    ("name", "records", "message"),
    [(name, *case) for name, cases in BAD_RECORDS.items() for case in cases],
)
def test_bad_sources_are_told(tmp_path, capsys, name, records, message):
    source = samples.write_source(tmp_path, samples.TABLE[name].source, records)
    target = tmp_path / "prepared"
    status, printed = cli_prepare(
        capsys, name, f"--source={source}", f"--prepared-dir={target}"
    )
    assert status == 1
    assert message in printed.err
    assert "Traceback" not in printed.err
    # What was begun is hidden, and no set is there.
    assert not mixtures.locate(samples.TABLE[name], target).files
    assert all(path.name.startswith(".") for path in target.glob("*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imdb_sentiment"], "its licence is restricted (IMDb's"),
        (["fever"], "its jsonl files; add --source=PATH (docs/data.md says where"),
        (["fret"], "add --source=PATH (`gecko fret run` writes them)"),
        (["fever", "--source=none.jsonl"], "none.jsonl: no such file"),
        (["fever", "--source=none.csv"], "none.csv: cannot tell its kind"),
        (["fever", "--source=tfds:no_such_set:train"], "TFDS has no such set"),
        (["quickstart_docs"], "is JSONL already"),
        (["nothing"], "nothing: not a known data set"),
    ],
)
def test_bad_requests_are_told(tmp_path, capsys, arguments, message):
    status, printed = cli_prepare(capsys, *arguments, f"--prepared-dir={tmp_path}/p")
    assert status == 1
    assert message in printed.err
    assert not list(tmp_path.glob("p/[!.]*"))
