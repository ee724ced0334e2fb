"""Checksums: a flipped bit is reported with the file's name or changes nothing."""

import json
import logging
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest
import samples

from gecko_jax.data import cache, teacher_vectors
from gecko_jax.evaluation import tables
from gecko_jax.formats import model_folder, parameters
from gecko_jax.inference import embedding, quantization, vector_files, vector_index
from gecko_jax.io import checksums, writing
from gecko_jax.parallel import sharding

FLIPS = 6


def _model(folder, tiny_files):
    model_folder.save_model(folder, tiny_files, shard_bytes=100_000)

    def read():
        opened = samples.load_model(folder)
        return (
            parameters.flatten(opened.params),
            opened.vocabulary_proto,
            model_folder.settings(opened),
            (opened.step, opened.revision, opened.provenance),
        )

    return read


def _export(folder, tiny_files):
    from gecko_jax.formats import detection, to_sentence_transformers

    to_sentence_transformers.save(folder, tiny_files)

    def read():
        opened = model_folder.read_params(detection.open_model(str(folder)))
        return parameters.flatten(opened.params), opened.vocabulary_proto

    return read


def _index(precision):
    def build(folder, _):
        rng = np.random.default_rng(0)
        codes = quantization.encode(
            rng.standard_normal((9, 16), dtype=np.float32), precision
        )
        ids = [f"p{i}" for i in range(9)]
        texts = [f"the text of {i}" for i in ids]
        vector_index.Index(codes, ids, titles=ids, texts=texts, revision="r").save(
            folder
        )

        def read():
            loaded = vector_index.load(folder)
            return (
                np.asarray(loaded.codes.values),
                loaded.codes.ranges,
                list(loaded.ids),
                loaded.titles,
                loaded.texts,
                loaded.revision,
            )

        return read

    return build


def _vectors(folder, tiny_files):
    source = folder.parent / "texts.txt"
    source.write_text("one text\nanother text\na third\n")
    gecko = embedding.Gecko(tiny_files)
    vector_files.embed_file(gecko, source, folder, precision="int8", shard_rows=2)

    def read():
        ids, codes = vector_files.read_codes(folder)
        settings = vector_files.read_settings(folder)
        return ids, codes.values, codes.ranges, settings["dim"], settings["revision"]

    return read


def _teacher(folder, _):
    rng = np.random.default_rng(0)
    blocks = [rng.standard_normal((7, 4), dtype=np.float32)]
    teacher_vectors.write(folder, [9, 3, 5, 1, 7, 2, 8], blocks, made_by="test")

    def read():
        opened = teacher_vectors.Teacher(folder, 4)
        vectors = opened.look_up(np.arange(10, dtype=np.uint64))
        return vectors, opened.dim, opened.facts["sha256"]

    return read


def _cache(folder, _):
    samples.write_cache(folder)
    listed = checksums.of_files(folder, ["order.npy"])
    info = {"task": "t", "num_examples": 5, checksums.FILES: listed}
    checksums.write_object(folder / "info.json", info)
    return lambda: cache.Reader(folder).records(range(5))


def _results(folder, _):
    row = tables.Row("set", "model", 16, "all", 3, {"ndcg_at_10": 0.25})
    about = {"revision": "r", "dims": [16], "num_passages": {"set": 4}}
    tables.save(tables.Results((row,), about), folder)
    for name in ("table.txt", "quality.png"):  # Only people read these files.
        (folder / name).unlink()
    return lambda: tables.read(folder / "results.json").to_dict()


KINDS = {
    "model": _model,
    "export": _export,
    "float32 index": _index("float32"),
    "int8 index": _index("int8"),
    "binary index": _index("binary"),
    "vectors": _vectors,
    "teacher": _teacher,
    "cache": _cache,
    "results": _results,
}

# These files are for other libraries and for people.
NOT_READ = ("README.md", "tokenizer", "special_tokens_map", "config", "spiece")


def _flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _are_same(first, second):
    return jax.tree.all(jax.tree.map(np.array_equal, first, second))


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_reported_or_changes_nothing(kind, small_files, tmp_path):
    if kind == "vectors" or kind == "export":
        small_files = small_files_with_vocabulary(small_files)
    folder = tmp_path / "folder"
    read = KINDS[kind](folder, small_files)
    expected = jax.tree.map(np.copy, read())
    good = tmp_path / "good"
    shutil.copytree(folder, good)
    rng = random.Random(kind)
    reported = 0
    for name in sorted(
        path.relative_to(good) for path in good.rglob("*") if path.is_file()
    ):
        if name.name.startswith(NOT_READ):
            continue
        for _ in range(FLIPS):
            _flip(folder / name, rng)
            message, result = None, None
            try:
                result = read()
            except ValueError as error:
                message = str(error)
            if message is None:
                assert _are_same(result, expected), f"{name}: loads something else"
            else:
                assert str(folder) in message, name
                assert name.name in message or name.stem in message, name
                reported += 1
            shutil.copy(good / name, folder / name)
    assert reported > FLIPS / 2
    assert _are_same(read(), expected)


def small_files_with_vocabulary(small_files):
    """The small model with one row for each piece of the bundled vocabulary."""
    import dataclasses

    from gecko_jax.models import dual_encoder

    config = dataclasses.replace(small_files.encoder_config, vocab_size=8_064)
    params = jax.jit(dual_encoder.init_params, static_argnums=0)(
        config, jax.random.key(0)
    )
    return dataclasses.replace(small_files, encoder_config=config, params=params)


def test_a_folder_of_an_earlier_version_loads_with_one_log_line(
    small_files, tmp_path, caplog
):
    model_folder.save_model(tmp_path / "m", small_files)
    samples.forget_checksums(tmp_path / "m" / "gecko.json")
    with caplog.at_level(logging.INFO):
        assert samples.load_model(tmp_path / "m").revision == small_files.revision
    assert caplog.text.count("gecko.json: no checksum, so damage") == 1


def test_an_edited_file_loads_after_removing_its_checksum(small_files, tmp_path):
    model_folder.save_model(tmp_path / "m", small_files)
    path = tmp_path / "m" / "gecko.json"
    values = json.loads(path.read_text()) | {"query_length": 32}
    path.write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"gecko\.json: damaged or edited .*remove xxh128"
    ):
        samples.load_model(tmp_path / "m")
    del values["xxh128"]
    path.write_text(json.dumps(values))
    assert samples.load_model(tmp_path / "m").query_length == 32


def test_the_formatting_of_json_does_not_matter(tmp_path):
    values = {"b": 1, "a": {2: [0.1, None], 10: "é"}}
    path = tmp_path / "x.json"
    checksums.write_object(path, values)
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert checksums.read_object(path, {}, remedy="-") == json.loads(json.dumps(values))


def test_a_listed_file_is_a_file_of_the_folder(tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("../secret", str(tmp_path / "secret")):
        values = {checksums.FILES: {name: {"bytes": 1, "xxh128": "0"}}}
        with pytest.raises(ValueError, match="leads out of its folder"):
            checksums.check_files(folder, values, "-")
    for entry in (3, {"bytes": 1}, None):
        with pytest.raises(ValueError, match="is damaged or edited"):
            checksums.check_files(folder, {checksums.FILES: {"a": entry}}, "-")


ARRAYS = [
    np.random.default_rng(0).standard_normal((24, 70), dtype=np.float32),
    np.arange(6, dtype=np.int32).reshape(1, 2, 3),
    np.ones((5, 3), np.float16),
    np.asarray([True, False, True]),
    np.int32(7),
    np.zeros((0, 3), np.float32),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_the_digest_of_an_array_is_the_sum_of_its_mixed_elements(array):
    array = np.asarray(array)
    words = array.reshape(-1).view(f"u{array.itemsize}").tolist()
    total = 0
    for position, word in enumerate(words):
        word = (word ^ (position * 0x9E3779B1 % 2**32)) * 0x85EBCA6B % 2**32
        total += (word ^ (word >> 15)) * 0xC2B2AE35 % 2**32
    assert checksums.of_host_array(array) == total % 2**32
    on_device = checksums.of_arrays({"a": jax.numpy.asarray(array)})
    assert on_device == {"a": total % 2**32}


def test_the_digest_of_an_array_is_the_same_on_any_mesh():
    array = ARRAYS[0]
    digests = set()
    for sizes, *axes in (
        ((8, 1, 1), "data", None),
        ((2, 2, 2), ("data", "fsdp"), "tensor"),
        ((2, 2, 2), None, None),
        ((1, 1, 1), None, None),
    ):
        mesh = sharding.build_mesh(
            **dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)),
            devices=jax.devices()[: np.prod(sizes)],
        )
        spec = jax.sharding.PartitionSpec(*axes)
        placed = jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))
        digests |= set(checksums.of_arrays({"a": placed}).values())
    assert digests == {checksums.of_host_array(array)}


def test_each_array_has_its_own_digest_in_any_order():
    arrays = {"b": np.arange(6.0, dtype=np.float32), "a": np.ones(3, np.float32)}
    alone = {name: checksums.of_host_array(array) for name, array in arrays.items()}
    assert len(set(alone.values())) == 2
    on_device = {name: jax.numpy.asarray(array) for name, array in arrays.items()}
    assert checksums.of_arrays(on_device) == alone
    assert checksums.of_arrays({**arrays, "b": on_device["b"]}) == alone


def test_every_flip_and_every_swap_changes_the_digest():
    array = ARRAYS[0]
    digest = checksums.of_host_array(array)
    rng = random.Random(0)
    for _ in range(300):
        flipped = array.copy()
        bits = flipped.reshape(-1).view(np.uint32)
        bits[rng.randrange(bits.size)] ^= np.uint32(1 << rng.randrange(32))
        assert checksums.of_host_array(flipped) != digest
    assert checksums.of_host_array(array[::-1]) != digest
    assert checksums.of_host_array(np.zeros_like(array)) != digest


def test_a_link_out_of_a_model_folder_is_refused_by_name(small_files, tmp_path):
    folder = tmp_path / "m"
    model_folder.save_model(folder, small_files)
    for name in ("model.safetensors", "vocabulary.model", "gecko.json"):
        shutil.move(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(ValueError, match=rf"m/{name}: leads out of its folder, to"):
            samples.load_model(folder)
        (folder / name).unlink()
        # A link inside the folder is followed.
        shutil.move(tmp_path / name, folder / f"linked-{name}")
        (folder / name).symlink_to(f"linked-{name}")
        samples.load_model(folder)
        (folder / name).unlink()
        shutil.move(folder / f"linked-{name}", folder / name)


def test_a_snapshot_of_the_hub_links_into_its_cache(small_files, tmp_path):
    root = tmp_path / "models--owner--name"
    folder = root / "snapshots" / "abc"
    model_folder.save_model(folder, small_files)
    (root / "blobs").mkdir()
    for path in list(folder.iterdir()):
        path.rename(root / "blobs" / path.name)
        path.symlink_to(pathlib.Path("../../blobs") / path.name)
    assert samples.load_model(folder).revision == small_files.revision


@pytest.mark.parametrize(
    "name", ["model.safetensors", "vocabulary.model", "gecko.json"]
)
def test_a_pipe_in_a_model_folder_is_refused_without_blocking(
    small_files, tmp_path, name
):
    import os

    folder = tmp_path / "m"
    model_folder.save_model(folder, small_files)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=rf"{name}: not a file"):
        samples.load_model(folder)


def test_a_member_may_be_missing(tmp_path):
    assert writing.member(tmp_path, "nothing") == tmp_path / "nothing"
