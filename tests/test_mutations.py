"""A folder with one randomly changed file opens correctly or raises one clear error.

The folders have no checksums, as in earlier versions: checksums would detect every
change before it reaches the readers.
"""

import copy
import dataclasses
import json
import pathlib
import random
import shutil

import mutations
import numpy as np
import pytest
import samples
import unigram_json
from sentencepiece import sentencepiece_model_pb2

import gecko_jax
from gecko_jax.data import cache, jsonl, prepare, seqio_cache, teacher_vectors
from gecko_jax.evaluation import mteb_suites, sets, tables, vector_store
from gecko_jax.formats import (
    checkpoints,
    detection,
    model_card,
    model_folder,
    tokenizer,
)
from gecko_jax.inference import (
    embedding,
    quantization,
    ranking,
    vector_files,
    vector_index,
)
from gecko_jax.training import metrics, workdirs

DATA = pathlib.Path(__file__).parent / "testdata"
TRAINED = pathlib.Path(gecko_jax.__file__).parent / "quickstart" / "vocabulary.model"
VOCABULARY = DATA / "model_v1" / "vocabulary.model"


def _model(folder, small_files):
    facts = {
        "config": {"loss": {"temperature": 0.05}},
        "tasks": {"docs": {"licence": "CC0", "num_examples": 3}},
        "started_from": "r",
    }
    made = dataclasses.replace(small_files, provenance=facts)
    model_folder.save_model(folder, made, shard_bytes=1_000)

    def read():
        opened = samples.load_model(folder)
        card = model_card.write(opened, CONTENTS)
        assert "\n# INJECTED" not in card
        return opened

    return read, ["gecko.json", "model-00001*", "*.index.json", "vocabulary.model"]


CONTENTS = {
    "config_sentence_transformers.json": {"prompts": {"query": "q: "}},
    "sentence_bert_config.json": {"max_seq_length": 64},
}


def _hugging_face(folder, _):
    shutil.copytree(DATA / "t5x_tiny" / "hf", folder)
    shutil.rmtree(folder / "2_Dense")
    shutil.copy(VOCABULARY, folder / "spiece.model")
    return _import(folder), ["config.json", "model.safetensors", "spiece.model"]


def _import(folder):
    return lambda: model_folder.read_params(detection.open_model(folder))


def _chain(folder, _):
    _hugging_face(folder, None)
    shutil.copytree(DATA / "t5x_tiny" / "hf" / "2_Dense", folder / "2_Dense")
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(
            (path, f"sentence_transformers.models.{kind}")
            for path, kind in (
                ("", "Transformer"),
                ("1_Pooling", "Pooling"),
                ("2_Dense", "Dense"),
                ("3_Normalize", "Normalize"),
            )
        )
    ]
    contents = {
        "modules.json": modules,
        "1_Pooling/config.json": {
            "word_embedding_dimension": 16,
            "pooling_mode_mean_tokens": True,
            "include_prompt": True,
        },
        "sentence_bert_config.json": {"max_seq_length": 40, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": "q: ", "document": "", "sts": "s: "},
            "default_prompt_name": "query",
            "similarity_fn_name": "cosine",
        },
    }
    for name, values in contents.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values))
    return _import(folder), [*contents, "2_Dense/*"]


def _tokenizer(folder, _):
    folder.mkdir()
    trained = sentencepiece_model_pb2.ModelProto.FromString(TRAINED.read_bytes())
    del trained.pieces[400:]
    values = unigram_json.contents(trained.SerializeToString())
    added = {str(token["id"]): token for token in values["added_tokens"]}
    contents = {
        "tokenizer.json": values,
        "tokenizer_config.json": {
            "tokenizer_class": "T5Tokenizer",
            "eos_token": "</s>",
            "model_max_length": 512,
            "added_tokens_decoder": added,
        },
        "special_tokens_map.json": {"eos_token": {"content": "</s>"}},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return lambda: tokenizer.read(folder), list(contents)


def _index(precision):
    def build(folder, _):
        rng = np.random.default_rng(0)
        array = rng.standard_normal((9, 16), dtype=np.float32)
        codes = quantization.encode(array, precision)
        ids = [f"p{i}" for i in range(9)]
        vector_index.Index(codes, ids, titles=ids, texts=ids, revision="r").save(folder)

        def read():
            loaded = vector_index.load(folder)
            _, found = loaded.search(array[:2], 3)
            return [loaded.text(one) for row in found for one in row]

        return read, ["index.json", "passages.jsonl", "*.npy"]

    return build


def _vectors(folder, tiny_files):
    source = folder.parent / "texts.txt"
    source.write_text("one text\nanother text\na third\n")
    gecko = embedding.Gecko(tiny_files)
    vector_files.embed_file(gecko, source, folder, precision="int8", shard_rows=2)
    return lambda: vector_index.from_embeddings(folder), [
        "embeddings.json",
        "shard-00000.npz",
    ]


def _teacher(folder, _):
    blocks = [np.random.default_rng(0).standard_normal((7, 4), dtype=np.float32)]
    teacher_vectors.write(folder, [9, 3, 5, 1, 7, 2, 8], blocks, made_by="test")
    keys = np.arange(10, dtype=np.uint64)
    return lambda: teacher_vectors.Teacher(folder, 4).look_up(keys), [
        "teacher.json",
        "*.npy",
    ]


def _cache(folder, _):
    samples.write_cache(folder)
    (folder / "info.json").write_text(json.dumps({"task": "t", "num_examples": 5}))
    return lambda: cache.Reader(folder).records(range(5)), ["info.json", "order.npy"]


def _results(folder, _):
    rows = [
        tables.Row(name, "model", 16, task, 3, {"ndcg_at_10": 0.25, "mrr_at_10": 0.5})
        for name in ("a", "b")
        for task in ("all", "docs")
    ]
    about = {"revision": "r", "num_passages": {"a": 4}, "num_own_left_out": {"a": 1}}
    tables.save(tables.Results(tuple(rows), about), folder)

    def read():
        found = tables.read(folder / "results.json")
        model_card._scores(found.to_dict())
        return tables.format_table(found)

    return read, ["results.json"]


def _board(folder, tiny_files):
    gecko = embedding.Gecko(tiny_files)
    about = {"model": "n", "revision": gecko.revision, "query_length": 64}
    mteb_suites._claim(folder, about)
    return lambda: mteb_suites._claim(folder, about) or True, ["*.json"]


def _prepared(folder, _):
    task = samples.TABLE["gooaq"]
    folder.mkdir()
    source = samples.write_source(folder, task.source, samples.RECORDS["gooaq"])

    def read():
        return prepare.prepare(task, folder, source=source)

    read()
    return read, ["gooaq/prepared.json"]


def _half_prepared(folder, _):
    task = samples.TABLE["gooaq"]
    folder.mkdir()
    source = samples.write_source(folder, task.source, samples.RECORDS["gooaq"])
    kept = folder / ".gooaq.work"

    def read():
        return prepare.prepare(task, folder, source=source)

    with pytest.MonkeyPatch.context() as patch:
        # The state of a run that was killed before its last step.
        remove = pathlib.Path.unlink
        patch.setattr(
            pathlib.Path,
            "unlink",
            lambda path, **options: (
                _kill() if path.name.startswith("pairs-") else remove(path, **options)
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            read()
    assert kept.is_dir()
    return read, [".gooaq.work/*.json"]


def _seqio_cache(folder, _):
    stored = DATA / "seqio_cache" / "seqio" / "docs" / "60df1ff6de0b7490"
    shutil.copytree(stored, folder / "seqio" / "docs" / "60df1ff6de0b7490")
    task = dataclasses.replace(samples.TABLE["gooaq"], name="docs")

    def read():
        return seqio_cache.find(task, "60df1ff6de0b7490", folder)

    return read, ["seqio/docs/*/*.json"]


def _source_note(folder, _):
    source = samples.write_lines(
        folder.parent / "a.jsonl", {"task": "t", "query": "q", "positive": "p"}
    )
    folder.mkdir()

    def read():
        return cache.summarize_source(str(source), folder)

    read()
    return read, ["sources/*.json"]


def _workdir(folder, small_files):
    folder.mkdir()
    model_folder.write_model_json(folder, small_files)
    checkpointer = checkpoints.Checkpointer(folder, keep=3, keep_every_steps=0)
    checkpointer.save(2, small_files.params, {"count": np.int32(2)}, {"seed": 2})
    checkpointer.close()
    names = ["checkpoints/2/position/metadata", "checkpoints/2/params/_METADATA"]
    return lambda: samples.load_model(folder), ["gecko.json", *names]


def _config(folder, _):
    import gecko_jax.config
    from gecko_jax.cli import flags

    config = flags.load("configs/finetune.py:local", [], flags.TRAIN)
    folder.mkdir()
    (folder / workdirs.CONFIG).write_text(gecko_jax.config.to_json(config))
    return lambda: workdirs.check_config(folder, config) or True, [workdirs.CONFIG]


def _metrics(folder, _):
    lines = [{"step": step, "loss": 0.5, "time": 1.0} for step in range(4)]
    path = samples.write_lines(folder / "metrics.jsonl", *lines)
    return lambda: metrics.read(path), ["metrics.jsonl"]


def _set(folder, _):
    folder.mkdir()
    samples.beir_folder(folder)
    rows = [{"query-id": "q", "corpus-id": "d1", "score": 1}]
    shutil.rmtree(folder / "qrels")
    samples.write_lines(folder / "qrels.jsonl", *rows)

    def read():
        (found,) = sets.load(folder)
        return ranking.Bm25Retriever(list(zip(found.titles, found.texts, strict=True)))

    return read, ["*.jsonl"]


def _pairs(folder, _):
    line = {
        "task": "t",
        "query": "who",
        "positive": "a gecko",
        "title": "A",
        "negatives": ["a newt", "a toad"],
        "negative_titles": ["", "B"],
        "task_description": "d",
        "query_id": 1,
        "passage_id": "p",
        "negative_ids": [3, 4],
        "negative_group": 5,
        "licence": "CC0",
    }
    path = samples.write_lines(folder / "pairs.jsonl", line)
    return lambda: list(jsonl.read_pairs(path)), ["pairs.jsonl"]


def _teacher_vectors(folder, _):
    path = samples.write_lines(
        folder / "pairs.jsonl", {"task": "t", "query": "q", "positive": "p"}
    )
    texts = list(teacher_vectors.list_texts([path]))
    np.save(folder / "vectors.npy", np.eye(len(texts), 4, dtype=np.float32))
    lines = [{"_id": text.id, "vector": [1.0, 0.0]} for text in texts]
    samples.write_lines(folder / "vectors.jsonl", *lines)

    def read():
        for name in ("vectors.npy", "vectors.jsonl"):
            blocks = teacher_vectors.read_vectors(folder / name, texts)
            keys = [text.key for text in texts]
            teacher_vectors.write(folder.parent / "t", keys, blocks, made_by="test")
        return True

    return read, ["vectors.*"]


def _store(folder, tiny_files):
    gecko = embedding.Gecko(tiny_files)
    texts = ["one", "two", "three"]

    def read():
        opened = vector_store.Store(folder, gecko, 1.0)
        found = opened.encode(texts, side="query", max_length=16)
        assert np.isfinite(found).all()
        return found

    read()
    return read, ["*/*.npy", "*/*.json"]


def _kill():
    raise KeyboardInterrupt


# Name -> (function that writes a folder, function that reads it, mutators by file).
FOLDERS = {
    "model": (_model, 40),
    "Hugging Face": (_hugging_face, 25),
    "sentence-transformers": (_chain, 10),
    "tokenizer": (_tokenizer, 40),
    "index": (_index("float32"), 40),
    "int8 index": (_index("int8"), 40),
    "vectors": (_vectors, 60),
    "teacher": (_teacher, 40),
    "cache": (_cache, 40),
    "results": (_results, 100),
    "board": (_board, 40),
    "prepared": (_prepared, 60),
    "half prepared": (_half_prepared, 30),
    "seqio cache": (_seqio_cache, 30),
    "source note": (_source_note, 40),
    "workdir": (_workdir, 20),
    "config": (_config, 40),
    "metrics": (_metrics, 30),
    "set": (_set, 40),
    "pairs": (_pairs, 100),
    "vectors of a teacher": (_teacher_vectors, 40),
    "store": (_store, 30),
}
ERRORS = (ValueError, OSError)


@pytest.mark.parametrize("name", FOLDERS)
def test_mutants_are_read_or_refused(name, tmp_path, small_files, tiny_files):
    build, count = FOLDERS[name]
    folder = tmp_path / "folder"
    is_tiny = name in ("vectors", "board", "store")
    read, patterns = build(folder, tiny_files if is_tiny else small_files)
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    assert len(paths) >= len(patterns)
    for path in folder.rglob("*.json"):
        if b"xxh128" in path.read_bytes():
            samples.forget_checksums(path)
    good = tmp_path / "good"
    shutil.copytree(folder, good)
    assert read() is not None
    shutil.rmtree(folder)
    shutil.copytree(good, folder)
    for path in paths:
        rng = random.Random(f"{name} {path.name}")
        for number in range(count):
            mutations.mutate_file(path, rng)
            what = (path.name, number, path.read_bytes()[:3_000])
            mutations.end_well(read, what, ERRORS)
            shutil.rmtree(folder)
            shutil.copytree(good, folder)


# Readers of folders, each of which opens all of its files by name.
LINKED = ("index", "int8 index", "vectors", "teacher", "cache", "tokenizer")
LINKED += ("Hugging Face", "sentence-transformers")


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_a_folder_is_refused(name, tmp_path, small_files, tiny_files):
    folder = tmp_path / "folder"
    made_from = tiny_files if name == "vectors" else small_files
    read, patterns = FOLDERS[name][0](folder, made_from)
    read()
    for path in [p for pattern in patterns for p in folder.glob(pattern)]:
        outside = tmp_path / "outside"
        path.rename(outside)
        path.symlink_to(outside)
        with pytest.raises(ValueError, match=f"{path.name}: leads out of its folder"):
            read()
        path.unlink()
        outside.rename(path)


def test_a_module_that_is_a_link_out_of_its_folder_is_refused(tmp_path):
    read, _ = _chain(tmp_path / "folder", None)
    (tmp_path / "folder" / "2_Dense").rename(tmp_path / "outside")
    (tmp_path / "folder" / "2_Dense").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="2_Dense: leads out of its folder"):
        read()


def _shape(card):
    """Returns the headings, rows and fences that a Markdown parser finds in a card."""
    begins = ("#", "|", "```", "---", "<")
    return [line[:1] for line in card.splitlines() if line.startswith(begins)]


def test_no_text_of_gecko_json_is_markup_in_a_card(tmp_path, small_files):
    folder = tmp_path / "folder"
    _model(folder, small_files)
    path = folder / "gecko.json"
    values = json.loads(path.read_text())
    values = {k: v for k, v in values.items() if k not in ("files", "xxh128")}
    values["provenance"]["imported"] = {"source": "s", "format": "f"}
    path.write_text(json.dumps(values))

    def card():
        opened = samples.load_model(folder)
        prompts = {"query": "q: ", opened.text_format.no_title: "p: "}
        names = {"config_sentence_transformers.json": {"prompts": prompts}}
        return model_card.write(opened, CONTENTS | names)

    expected = _shape(card())
    written = 0
    for place in list(mutations.places(values))[1:]:
        changed = copy.deepcopy(values)
        parent = changed
        for step in place[:-1]:
            parent = parent[step]
        if isinstance(parent[place[-1]], str):
            parent[place[-1]] = mutations.HOSTILE
        elif place[0] == "provenance" and len(place) > 2:
            parent[mutations.HOSTILE] = parent.pop(place[-1])
        else:
            continue
        path.write_text(json.dumps(changed))
        try:
            found = card()
        except ValueError:
            continue
        written += "INJECTED" in found
        assert _shape(found) == expected, place
        for markup in ("<script", "](javascript", "\x1b", "\x9b", "\u202e"):
            assert markup not in found, place
    assert written > 6
