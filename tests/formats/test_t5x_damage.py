"""Damaged and hostile T5X checkpoints: correct parameters or a prompt ValueError."""

import json
import pathlib
import random
import shutil
import time

import flax.serialization
import msgpack
import mutations
import numpy as np
import pytest

from gecko_jax.formats import from_t5x, kvstores, msgpack_files, parameters

T5X = pathlib.Path(__file__).parents[1] / "testdata" / "t5x_tiny"
SCALE = ("optimizer", "target", "encoder", "encoder_norm", "scale")

# Seconds for one error, on a busy machine.
SOON = 20


@pytest.fixture(scope="module")
def expected():
    with np.load(T5X / "params.npz") as stored:
        return {name: stored[name] for name in stored}


@pytest.fixture
def inline(expected, tmp_path):
    """A checkpoint in one file."""
    path = tmp_path / "checkpoint_7" / "checkpoint"
    path.parent.mkdir()
    tree = {
        "version": 3,
        "optimizer": {
            "state": {"step": np.int32(7)},
            "target": parameters.unflatten(expected),
        },
    }
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    return path


def _read(folder):
    """Reads everything an import does, without tracing the model."""
    opened = from_t5x.open_checkpoint(kvstores.Folder(str(folder)))
    from_t5x.infer_config(opened.params, str(folder))
    return {name: leaf.read() for name, leaf in opened.params.items()}


def _unpack(path):
    return msgpack.unpackb(path.read_bytes(), strict_map_key=False)


def _put(tree, path, value):
    *parents, last = path
    for key in parents:
        tree = tree[key]
    tree[last] = value


def _array(shape, dtype, content):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, content)))


def _chunks(shape, *chunks):
    return {
        "__msgpack_chunked_array__": True,
        "shape": shape,
        "chunks": {str(number): chunk for number, chunk in enumerate(chunks)},
    }


SIXTEEN = _array((16,), "float32", bytes(64))
BAD_LEAVES = {
    "chunk_short": _chunks({"0": 16}, _array((9,), "float32", bytes(36))),
    "chunk_long": _chunks({"0": 16}, SIXTEEN, SIXTEEN),
    "chunk_mixed": _chunks(
        {"0": 16},
        _array((8,), "float32", bytes(32)),
        _array((8,), "float16", bytes(16)),
    ),
    "chunk_no_shape": _chunks(None, SIXTEEN),
    "chunk_other_key": _chunks({"1": 16}, SIXTEEN),
    "chunk_text": _chunks({"0": 16}, "text"),
    "chunk_none": _chunks({"0": 16}),
    "shape_float": _array((16.0,), "float32", bytes(64)),
    "shape_bool": _array((True,), "float32", bytes(4)),
    "shape_negative": _array((-4, -4), "float32", bytes(64)),
    "shape_huge": _array((2**62, 4), "float32", bytes(64)),
    "shape_zero": _array((0,), "float32", b""),
    "shape_text": _array("16", "float32", bytes(64)),
    "int8": _array((16,), "int8", bytes(16)),
    "bool": _array((16,), "bool", bytes(16)),
    "uint16": _array((16,), "uint16", bytes(32)),
    "datetime": _array((16,), "datetime64[s]", bytes(128)),
    "object": _array((16,), "object", bytes(128)),
    "structured": _array((16,), "f4,f4", bytes(128)),
    "dtype_number": _array((16,), 7, bytes(64)),
    "numbers_missing": _array((16,), "float32", bytes(60)),
    "no_array": msgpack.ExtType(1, b"\x00"),
    "complex": msgpack.ExtType(2, b"\x00"),
    "number": 3,
    "null": None,
    "text": "text",
    "list": [1, 2],
    "kvstore_text": {"kvstore": "text"},
    "place_number": {"kvstore": {"path": 3}},
    "place_long": {"kvstore": {"path": "x" * 5_000}},
    "place_null": {"kvstore": {"path": "a\0b/"}},
    "metadata_text": {"kvstore": {"path": "a/"}, "metadata": "text"},
    "key_path": {"../x": SIXTEEN},
    "key_empty": {"": SIXTEEN},
}


@pytest.mark.parametrize("name", BAD_LEAVES)
def test_a_leaf_that_is_no_weight_is_refused_by_name(inline, name):
    tree = _unpack(inline)
    _put(tree, SCALE, BAD_LEAVES[name])
    inline.write_bytes(msgpack.packb(tree))
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"encoder/encoder_norm/") as error:
        _read(inline.parent)
    assert str(inline) in str(error.value)
    assert time.monotonic() - begin < SOON


BAD_TREES = {
    "map_huge": b"\xdf\xff\xff\xff\xff" + bytes(20_000_000),
    "map_same_keys": b"\xdf\x00\x0f\xff\xff" + b"\xa0\xc0" * 2**20,
    "list_huge": b"\x81\xa1x\xdd\xff\xff\xff\xff" + bytes(1_000),
    "list_long": b"\x81\xa1x\xdd\x00\x0f\xff\xff" + b"\xc0" * 2**20,
    "text_huge": b"\x81\xdb\xff\xff\xff\xff" + bytes(1_000),
    "nested_lists": b"\x81\xa1x" + b"\x91" * 2**20 + b"\xc0",
    "nested_maps": b"\x81\xa6target\x81\xa7encoder" + b"\x81\xa1x" * 20_000 + b"\xc0",
    "list_key": b"\x81\x91\xc0\xc0",
    "number": b"\x07",
    "unused": b"\xc1",
    "more": b"\x80\x80",
    "optimizer_text": msgpack.packb({"optimizer": "text"}),
    "target_text": msgpack.packb({"optimizer": {"target": "text"}}),
    "encoder_text": msgpack.packb({"optimizer": {"target": {"encoder": "text"}}}),
    "empty": b"",
}


@pytest.mark.parametrize("name", BAD_TREES)
def test_a_tree_that_claims_too_much_is_refused_soon(tmp_path, name, monkeypatch):
    # Run-time type checks make tests many times slower.
    monkeypatch.setattr(msgpack_files, "_MAX_OBJECTS", 10_000)
    (tmp_path / "checkpoint").write_bytes(BAD_TREES[name])
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"checkpoint"):
        _read(tmp_path)
    assert time.monotonic() - begin < SOON


@pytest.mark.parametrize("name", ["layers_1000000000", "layers_99999999999999999999"])
def test_layers_that_only_a_name_claims_are_not_built(inline, name):
    tree = _unpack(inline)
    encoder = tree["optimizer"]["target"]["encoder"]
    encoder[name] = encoder.pop("layers_1")
    inline.write_bytes(msgpack.packb(tree))
    begin = time.monotonic()
    if name == "layers_1000000000":
        with pytest.raises(ValueError, match="claims 1,000,000,001 layers"):
            _read(inline.parent)
    else:
        # Not a layer number, so `parameters.check` lists it as unexpected.
        assert any(name in found for found in _read(inline.parent))
    assert time.monotonic() - begin < SOON


def test_a_missing_layer_is_named(inline):
    tree = _unpack(inline)
    encoder = tree["optimizer"]["target"]["encoder"]
    encoder["layers_2"] = encoder.pop("layers_1")
    inline.write_bytes(msgpack.packb(tree))
    with pytest.raises(ValueError, match=r"layers_2 is there.*layers_1 is not"):
        _read(inline.parent)


BAD_ZARR = {
    "chunks": ({"chunks": [10**7]}, "a chunk cannot be larger than its array"),
    "shape": ({"shape": [10**7], "chunks": [10**7]}, "which the .* cannot hold"),
    "many": ({"shape": [10**7], "chunks": [16]}, "which the .* cannot hold"),
    "zero": ({"shape": [0]}, "must be whole numbers above 0"),
    "negative": ({"shape": [-16]}, "cannot be read"),
    "float": ({"shape": [16.5]}, "cannot be read"),
    "rank": ({"shape": [16, 1]}, "cannot be read"),
    "dtype": ({"dtype": "|O"}, "cannot be read"),
    "int": ({"dtype": "<i4"}, "holds int32, and weights must be floats"),
    "long": ({"note": "x" * 2**21}, "takes at most"),
}


@pytest.mark.parametrize("name", BAD_ZARR)
def test_an_array_that_claims_too_much_is_refused(tmp_path, name):
    """TensorStore would abort the process when memory runs out."""
    folder = tmp_path / "checkpoint_1000"
    shutil.copytree(T5X / "legacy_f32" / "checkpoint_1000", folder)
    # An array in a folder of its own.
    place = folder / "target.encoder.layers_0.mlp.wo.kernel"
    changed, message = BAD_ZARR[name]
    path = place / ".zarray"
    about = json.loads(path.read_text())
    rank = len(about["shape"])
    changed = {
        key: value * rank if key in ("shape", "chunks") and len(value) == 1 else value
        for key, value in changed.items()
    }
    if name == "rank":
        changed = {"shape": [16]}
    path.write_text(json.dumps(about | changed))
    with pytest.raises(ValueError, match=message) as error:
        _read(folder)
    assert "layers_0.mlp.wo.kernel" in str(error.value)


def test_memory_is_a_limit(inline, monkeypatch):
    from gecko_jax.formats import tensors

    monkeypatch.setattr(tensors, "_memory", lambda: 100)
    with pytest.raises(ValueError, match="more than the 100 bytes of memory"):
        _read(T5X / "legacy_f32" / "checkpoint_1000")


VALUES = (
    *(None, True, -1, 2**63, 1.5, float("nan"), "", "text", "layers_7", b"\xff"),
    *([], [[]], [2**40], {}, {"kvstore": {}}, {"a": {"b": []}}, 10**6 * "x"),
    *(msgpack.ExtType(1, b""), msgpack.ExtType(3, b"\xc0"), msgpack.ExtType(9, b"x")),
    *BAD_LEAVES.values(),
)


def _mutate_tree(content, random_):
    """Replaces a field, a key, or a part of the array of a leaf."""
    tree = msgpack.unpackb(content, strict_map_key=False)
    node = tree
    while True:
        key = random_.choice(list(node))
        if not isinstance(node[key], dict) or not node[key] or random_.random() < 0.15:
            break
        node = node[key]
    kind = random_.randrange(4)
    if kind == 0 and isinstance(node[key], msgpack.ExtType):
        code, data = node[key]
        parts = msgpack.unpackb(data)
        parts[random_.randrange(3)] = random_.choice(VALUES)
        try:
            node[key] = msgpack.ExtType(code, msgpack.packb(parts))
        except (TypeError, ValueError, OverflowError):
            node[key] = None
    elif kind == 1:
        node[random_.choice(("layers_5", "x/y", "..", "", 3, key))] = node.pop(key)
    elif kind == 2:
        del node[key]
    else:
        node[key] = random_.choice(VALUES)
    return msgpack.packb(tree)


def _check(folder, expected, seed):
    """Reads a mutant; without an error, shapes and dtypes are intact."""
    begin = time.monotonic()
    try:
        found = _read(folder)
    except ValueError as error:
        assert str(folder) in str(error), (seed, error)  # noqa: PT017 - or it is read
        outcome = "error"
    else:
        # Values may be changed, because T5X has no checksums.
        assert all(leaf.dtype == np.float32 for leaf in found.values()), seed
        outcome = "read"
    assert time.monotonic() - begin < SOON, seed
    return outcome


def test_mutants_of_a_file_are_read_or_refused(inline, expected):
    content = inline.read_bytes()
    assert set(_read(inline.parent)) == set(expected)
    outcomes = []
    for seed in range(120):
        random_ = random.Random(seed)
        mutate = _mutate_tree if seed % 2 else mutations.mutate_bytes
        inline.write_bytes(mutate(content, random_))
        outcomes.append(_check(inline.parent, expected, seed))
    assert outcomes.count("error") > 30


@pytest.mark.parametrize("form", ["legacy_f32", "orbax_f32"])
def test_mutants_of_a_folder_are_read_or_refused(form, tmp_path, expected):
    folder = shutil.copytree(T5X / form / "checkpoint_1000", tmp_path / "c")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    # Metadata files are mutated most.
    about = [path for path in paths if path.name in (".zarray", "_METADATA")] or paths
    about += [path for path in paths if path.name in ("checkpoint", "manifest.ocdbt")]
    outcomes = []
    for seed in range(24):
        random_ = random.Random(seed)
        path = random_.choice(about if seed % 3 else paths)
        content = path.read_bytes()
        path.write_bytes(mutations.mutate_bytes(content, random_))
        outcomes.append(_check(folder, expected, seed))
        path.write_bytes(content)
    assert "error" in outcomes
    assert set(_read(folder)) == set(expected)
