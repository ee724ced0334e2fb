"""T5X checkpoints of every version: the same parameters, or one clear error."""

import dataclasses
import functools
import http.server
import json
import pathlib
import re
import shutil
import threading

import flax.serialization
import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
import tensorstore

import gecko_jax
from gecko_jax.data import task_table
from gecko_jax.formats import (
    detection,
    from_t5x,
    kvstores,
    model_folder,
    msgpack_files,
    parameters,
)
from gecko_jax.inference import embedding
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import sharding

DATA = pathlib.Path(__file__).parents[1] / "testdata"
T5X = DATA / "t5x_tiny"
VOCABULARY = DATA / "model_v1" / "vocabulary.model"
QUICKSTART_VOCABULARY = task_table.QUICKSTART_VOCABULARY
LEGACY = T5X / "legacy_f32" / "checkpoint_1000"
ATOL = 2e-5  # T5X parity in float32


@functools.cache
def reference_params():
    with np.load(T5X / "params.npz") as stored:
        return {name: stored[name] for name in stored}


def load_params(source, **settings):
    opened = detection.open_model(source, vocabulary=VOCABULARY, **settings)
    read = model_folder.read_params(opened)
    return read, parameters.flatten(read.params)


def assert_same(flat, want):
    assert flat.keys() == want.keys()
    for name, leaf in flat.items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, want[name], err_msg=name)


def write_zarr(folder, place, array, dtype=None):
    tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder}/{place}"},
            "metadata": {
                "shape": list(array.shape),
                "chunks": [max(1, size // 2) for size in array.shape],
                "compressor": {"id": "gzip", "level": 1},
                "dtype": dtype or array.dtype.str,
            },
            "create": True,
        }
    ).result().write(array).result()


def write_legacy(
    folder,
    flat,
    *,
    inline=lambda name: False,
    driver="file",
    bits=False,
    target=None,
    optimizer=True,
    version=3,
    step=7,
):
    """Writes a legacy checkpoint as t5x does; `bits` writes bfloat16 as version 2."""
    folder.mkdir(parents=True)
    tree = parameters.unflatten({name: None for name in flat})
    for name, array in flat.items():
        place = f"target.{name.replace('/', '.')}/"
        spec = {
            "driver": "zarr",
            "dtype": "bfloat16" if bits else "float32",
            "kvstore": {"driver": driver, "path": place},
            "metadata": {"shape": list(array.shape)},
        }
        if driver != "file":
            spec["kvstore"]["bucket"] = "t5x-dummy-bucket"
        if inline(name):
            spec = array
        elif bits:
            raw = np.asarray(array, ml_dtypes.bfloat16).view(np.uint16)
            write_zarr(folder, place, raw)
        else:
            write_zarr(folder, place, array)
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = spec
    state = {"step": np.int32(step)}
    if optimizer:
        state["param_states"] = {"encoder": {"v": np.ones(3, np.float32)}}
    content = {"state": state, "target": tree | (target or {})}
    (folder / "checkpoint").write_bytes(
        flax.serialization.msgpack_serialize({"version": version, "optimizer": content})
    )


@pytest.mark.parametrize("form", ["legacy_f32", "orbax_f32"])
@pytest.mark.parametrize("name", ["checkpoint_1000", ""])
def test_what_t5x_wrote_is_read_bit_for_bit(form, name):
    read, flat = load_params(T5X / form / name)
    assert_same(flat, reference_params())
    assert read.step == 1000
    assert read.encoder_config == dual_encoder.EncoderConfig(
        vocab_size=64,
        model_dim=16,
        num_layers=2,
        num_heads=3,
        head_dim=4,
        mlp_dim=24,
        embedding_dim=8,
        l2_epsilon=1e-6,
    )


def test_bfloat16_becomes_float32_without_loss():
    _, flat = load_params(T5X / "legacy_bf16")
    assert_same(
        flat,
        {
            name: leaf.astype(ml_dtypes.bfloat16).astype(np.float32)
            for name, leaf in reference_params().items()
        },
    )


def test_a_checkpoint_gives_what_t5x_retrieval_computes():
    gecko = gecko_jax.load(T5X / "legacy_f32", vocabulary=VOCABULARY)
    config = gecko.files.encoder_config
    encoder = dual_encoder.DualEncoder(config)

    @jax.jit
    def compute(params, tokens, segments):
        variables = {"params": params}
        hidden = encoder.apply(variables, tokens, segments, method="hidden_states")
        projected = encoder.apply(variables, tokens, segments)[:, 0]
        return hidden, dual_encoder.mean_pool(hidden, segments, 1)[:, 0], projected

    with np.load(T5X / "reference.npz") as stored:
        tokens = stored["left_tokens"]
        real = tokens > 0
        hidden, pooled, projected = map(
            np.asarray,
            compute(gecko.files.params, tokens, real.astype(np.int32)),
        )
        np.testing.assert_allclose(hidden[real], stored["left_hidden"][real], atol=ATOL)
        np.testing.assert_allclose(pooled, stored["left_pooled"], atol=ATOL)
        np.testing.assert_allclose(projected, stored["left_projected"], atol=ATOL)
        encodings = embedding.cut(projected, 8, config.l2_epsilon)
        np.testing.assert_allclose(encodings, stored["left_encodings"], atol=ATOL)


def test_leaves_are_inline_or_zarr_one_by_one(tmp_path):
    want = reference_params()
    write_legacy(
        tmp_path / "mixed",
        want,
        inline=lambda name: "scale" in name or "layers_1" in name,
        driver="gfile",
    )
    assert_same(load_params(tmp_path / "mixed")[1], want)
    write_legacy(tmp_path / "inline", want, inline=lambda name: True, version=1)
    assert_same(load_params(tmp_path / "inline")[1], want)
    assert sorted(p.name for p in (tmp_path / "inline").iterdir()) == ["checkpoint"]


def test_version_2_stores_the_bits_of_bfloat16(tmp_path):
    want = {
        name: leaf.astype(ml_dtypes.bfloat16).astype(np.float32)
        for name, leaf in reference_params().items()
    }
    write_legacy(tmp_path / "c", want, bits=True, driver="gcs", version=2)
    assert_same(load_params(tmp_path / "c")[1], want)


def test_arrays_in_chunks_are_joined(tmp_path, monkeypatch):
    want = reference_params()
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 200)
    write_legacy(tmp_path / "c", want, inline=lambda name: True)
    content = (tmp_path / "c" / "checkpoint").read_bytes()
    assert b"__msgpack_chunked_array__" in content
    assert_same(load_params(tmp_path / "c")[1], want)


def test_decoder_and_optimizer_are_not_read(tmp_path):
    """Their specs name missing folders."""
    want = dict(reference_params())
    want.pop("projection_layer/kernel")
    gone = {"kvstore": {"driver": "file", "path": "target.decoder.gone/"}}
    write_legacy(
        tmp_path / "c",
        want,
        target={"decoder": {"logits": gone, "layers_0": {"a": {"kernel": gone}}}},
    )
    read, flat = load_params(tmp_path / "c")
    assert_same(flat, want)
    assert not read.encoder_config.projection
    assert read.encoder_config.embedding_dim == 16


def test_t5_1_0_has_relu(tmp_path):
    want = {
        name.replace("wi_0", "wi"): leaf
        for name, leaf in reference_params().items()
        if "wi_1" not in name
    }
    write_legacy(tmp_path / "c", want, optimizer=False)
    read, flat = load_params(tmp_path / "c")
    assert_same(flat, want)
    assert read.encoder_config.mlp_activations == ("relu",)


@pytest.mark.parametrize("inline", [True, False])
def test_scanned_layers_are_split(tmp_path, inline):
    """umT5: layers on axis 1, separate head axes, a bias for each layer."""
    rng = np.random.default_rng(0)
    d, num_layers, heads, width, mlp = 6, 3, 2, 4, 5
    shapes = {
        "attention/query/kernel": (d, num_layers, heads, width),
        "attention/key/kernel": (d, num_layers, heads, width),
        "attention/value/kernel": (d, num_layers, heads, width),
        "attention/out/kernel": (heads, num_layers, width, d),
        "mlp/wi_0/kernel": (d, num_layers, mlp),
        "mlp/wi_1/kernel": (d, num_layers, mlp),
        "mlp/wo/kernel": (mlp, num_layers, d),
        "pre_attention_layer_norm/scale": (d, num_layers),
        "pre_mlp_layer_norm/scale": (d, num_layers),
        "relpos_bias/rel_embedding": (heads, num_layers, 32),
    }
    stacked = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    rest = {
        "token_embedder/embedding": rng.standard_normal((64, d)).astype(np.float32),
        "encoder/encoder_norm/scale": np.ones(d, np.float32),
    }
    write_legacy(
        tmp_path / "c",
        rest | {f"encoder/encoder/{name}": leaf for name, leaf in stacked.items()},
        inline=lambda name: inline,
    )
    want = dict(rest)
    for layer in range(num_layers):
        for name, leaf in stacked.items():
            one = leaf[:, layer]
            if name.endswith("out/kernel"):
                one = np.concatenate(list(one), axis=0)
            elif one.ndim == 3:
                one = np.concatenate([one[:, head] for head in range(heads)], axis=1)
            want[f"encoder/layers_{layer}/{name}"] = one
    read, flat = load_params(tmp_path / "c")
    assert_same(flat, want)
    config = read.encoder_config
    assert (config.num_layers, config.num_heads, config.head_dim) == (3, 2, 4)
    assert not config.shared_relative_bias
    # Each stack is read once, not once for each of its layers.
    reads = []
    opened = detection.open_model(tmp_path / "c", vocabulary=VOCABULARY)
    original = kvstores._result
    if not inline:
        kvstores._result = lambda future, path: (
            reads.append(path) or original(future, path)
        )
        try:
            model_folder.save_model(tmp_path / "out", opened)
        finally:
            kvstores._result = original
        assert len(reads) == len(set(reads)) == len(shapes) + len(rest)


def test_the_newest_of_several_checkpoints_is_read(tmp_path):
    want = reference_params()
    write_legacy(tmp_path / "checkpoint_999", {k: v + 1 for k, v in want.items()})
    write_legacy(tmp_path / "checkpoint_1000", want, step=1000)
    (tmp_path / "checkpoint_2000.tmp-1700000000").mkdir()
    read, flat = load_params(tmp_path)
    assert read.step == 1000
    assert_same(flat, want)


@pytest.fixture
def server(tmp_path):
    """Serves `tmp_path` on localhost."""
    handler = functools.partial(_QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        """Returns byte ranges, which Orbax's format needs."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = pathlib.Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        first, last = int(wanted[1]), int(wanted[2])
        content = path.read_bytes()
        part = content[first : last + 1]
        self.send_response(206)
        end = first + len(part) - 1
        self.send_header("Content-Range", f"bytes {first}-{end}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *args):
        pass


def test_a_checkpoint_behind_a_web_server_is_read(tmp_path, server):
    shutil.copytree(LEGACY, tmp_path / "model" / "checkpoint_1000")
    read, flat = load_params(f"{server}/model/checkpoint_1000")
    assert_same(flat, reference_params())
    assert read.step == 1000
    # The vocabulary may be remote, too.
    shutil.copy(VOCABULARY, tmp_path / "t5.model")
    opened = detection.open_model(
        f"{server}/model/checkpoint_1000", vocabulary=f"{server}/t5.model"
    )
    assert opened.vocabulary_proto == VOCABULARY.read_bytes()
    with pytest.raises(ValueError, match=r"gone\.model: no such vocabulary"):
        detection.open_model(
            f"{server}/model/checkpoint_1000", vocabulary=f"{server}/gone.model"
        )
    with pytest.raises(ValueError, match="name the checkpoint_N folder itself"):
        load_params(f"{server}/model")


def test_an_orbax_checkpoint_behind_a_web_server_is_read(tmp_path, server):
    shutil.copytree(T5X / "orbax_f32", tmp_path / "model")
    _, flat = load_params(f"{server}/model/checkpoint_1000")
    assert_same(flat, reference_params())


def test_an_export_of_ours_keeps_its_settings(tmp_path):
    shutil.copytree(LEGACY, tmp_path / "checkpoint_1000")
    plain, _ = load_params(tmp_path)
    settings = dataclasses.replace(
        plain, params={}, mrl_dims=(4, 8), query_length=9, revision="ours-5", step=5
    )
    (tmp_path / "gecko").mkdir()
    model_folder.write_model_json(tmp_path / "gecko", settings)
    opened = model_folder.read_params(detection.open_model(tmp_path))
    assert_same(parameters.flatten(opened.params), reference_params())
    assert (opened.mrl_dims, opened.query_length) == ((4, 8), 9)
    # t5x has continued from step 5; step and revision are those of the parameters.
    assert opened.step == 1000
    assert opened.revision not in ("ours-5", plain.revision)
    # The stored vocabulary may be named; another one is refused.
    named, _ = load_params(tmp_path)
    assert named.mrl_dims == (4, 8)
    assert named.revision == opened.revision
    other = tmp_path / "other.model"
    other.write_bytes(QUICKSTART_VOCABULARY.read_bytes())
    with pytest.raises(ValueError, match=r"gecko: holds another vocabulary.*leave"):
        detection.open_model(tmp_path, vocabulary=other)
    with pytest.raises(ValueError, match=r"gecko: holds another vocabulary.*leave"):
        detection.open_model(tmp_path, vocabulary=VOCABULARY, extra_ids=3)


def test_what_t5x_trains_on_has_another_step_and_revision(tmp_path):
    write_legacy(tmp_path / "checkpoint_5", reference_params(), step=5)
    plain, _ = load_params(tmp_path)
    (tmp_path / "gecko").mkdir()
    model_folder.write_model_json(tmp_path / "gecko", plain)
    same = model_folder.read_params(detection.open_model(tmp_path))
    assert (same.revision, same.step) == (plain.revision, 5)
    trained = {name: leaf + 1 for name, leaf in reference_params().items()}
    write_legacy(tmp_path / "checkpoint_9", trained, step=9)
    opened = model_folder.read_params(detection.open_model(tmp_path))
    assert opened.step == 9
    assert opened.revision != plain.revision


def test_a_legacy_checkpoint_in_one_file_is_read(tmp_path, monkeypatch):
    want = reference_params()
    write_legacy(tmp_path / "c", want, inline=lambda name: True, step=12)
    (tmp_path / "c" / "checkpoint").rename(tmp_path / "c" / "checkpoint_0")
    for source in (tmp_path / "c" / "checkpoint_0", tmp_path / "c"):
        read, flat = load_params(source)
        assert_same(flat, want)
        assert read.step == 12
    monkeypatch.chdir(tmp_path / "c")
    assert_same(load_params("../c/checkpoint_0")[1], want)


@pytest.mark.parametrize("form", ["legacy_f32", "orbax_f32"])
def test_a_path_may_lead_upwards(tmp_path, form, monkeypatch):
    shutil.copytree(T5X / form, tmp_path / "m")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for source in ("../m", "../m/checkpoint_1000", "../m/checkpoint_1000/."):
        read, flat = load_params(source)
        assert_same(flat, reference_params())
        assert read.step == 1000


def test_a_bucket_is_read_through_the_driver_for_buckets(monkeypatch):
    folder = kvstores.Folder("gs://bucket/t5x/checkpoint_1000/")
    assert folder.spec == {
        "driver": "gcs",
        "bucket": "bucket",
        "path": "t5x/checkpoint_1000/",
    }
    assert (folder / "target.a").spec["path"] == "t5x/checkpoint_1000/target.a/"
    assert folder.path == "gs://bucket/t5x/checkpoint_1000"

    # The newest checkpoint of a model_dir in the bucket's listing.
    def read(self, name, size=-1):
        return b"\x80" if self.name == "checkpoint_20" else None

    monkeypatch.setattr(kvstores.Folder, "read", read)
    listed = {"checkpoint_3/checkpoint", "checkpoint_20/checkpoint", "config.gin"}
    monkeypatch.setattr(kvstores.Folder, "list", lambda self: listed)
    found = detection.find_format("gs://bucket/t5x")
    assert found == (detection.Format.T5X, "gs://bucket/t5x/checkpoint_20")


def test_parameters_are_placed_on_a_mesh_as_they_are_read():
    mesh = sharding.build_mesh(data=2, fsdp=2, tensor=2)
    gecko = gecko_jax.load(LEGACY, mesh, vocabulary=VOCABULARY)
    alone = gecko_jax.load(LEGACY, vocabulary=VOCABULARY)
    table = gecko.files.params["token_embedder"]["embedding"]
    assert table.sharding.mesh.size == 8
    assert table.sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")
    assert table.addressable_shards[0].data.shape == (32, 8)
    assert gecko.revision == alone.revision
    texts = ["a list of values", "the gecko climbs the wall"]
    np.testing.assert_allclose(
        gecko.encode_passages(texts), alone.encode_passages(texts), atol=1e-5
    )


def test_the_same_weights_have_the_same_revision_in_every_form(tmp_path):
    revisions = {
        load_params(T5X / form)[0].revision for form in ("legacy_f32", "orbax_f32")
    }
    written = model_folder.save_model(
        tmp_path / "m", detection.open_model(LEGACY, vocabulary=VOCABULARY)
    )
    assert revisions == {written.revision}
    assert load_params(T5X / "legacy_bf16")[0].revision not in revisions
    longer = load_params(LEGACY, query_length=33)[0]
    assert longer.query_length == 33
    assert longer.revision not in revisions


# What cannot be read.


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(LEGACY, tmp_path / "checkpoint_1000")


def test_a_missing_chunk_is_an_error_and_not_zeros(copy, tmp_path):
    (copy / "target.encoder.layers_1.mlp.wo.kernel" / "0.0").unlink()
    message = r"layers_1\.mlp\.wo\.kernel: this array cannot be read.*chunk"
    with pytest.raises(ValueError, match=message):
        load_params(copy)
    # The error occurs during writing; no partial folder stays.
    opened = detection.open_model(copy, vocabulary=VOCABULARY)
    with pytest.raises(ValueError, match=message):
        model_folder.save_model(tmp_path / "out", opened)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_1000"]


def test_a_missing_array_is_named(copy):
    shutil.rmtree(copy / "target.encoder.layers_1.mlp.wo.kernel")
    with pytest.raises(ValueError, match=r"wo\.kernel: neither \.zarray nor"):
        load_params(copy)


def test_an_array_of_another_checkpoint_is_named(copy):
    place = "target.encoder.layers_1.mlp.wo.kernel"
    shutil.rmtree(copy / place)
    write_zarr(copy, f"{place}/", np.zeros((48, 16), np.float32))
    with pytest.raises(ValueError, match=r"wo/kernel has the shape \(48, 16\).*two ch"):
        load_params(copy)


@pytest.mark.parametrize("keep", [0, 40, 2000])
def test_a_truncated_tree_is_named(copy, keep):
    path = copy / "checkpoint"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"checkpoint: not a whole msgpack file"):
        load_params(copy)


def test_truncated_inline_arrays_are_named(tmp_path):
    write_legacy(tmp_path / "c", reference_params(), inline=lambda name: True)
    path = tmp_path / "c" / "checkpoint"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"checkpoint: not a whole msgpack file"):
        load_params(tmp_path / "c")


@pytest.mark.parametrize(
    "place", ["/etc/weights/", "../other/", "a/../../b/", "file:///tmp/x/"]
)
def test_a_place_outside_the_checkpoint_is_refused(copy, place):
    path = copy / "checkpoint"
    tree = msgpack.unpackb(path.read_bytes(), strict_map_key=False)
    kernel = tree["optimizer"]["target"]["projection_layer"]["kernel"]
    kernel["kvstore"]["path"] = place
    path.write_bytes(msgpack.packb(tree))
    with pytest.raises(
        ValueError, match=r"projection_layer/kernel has the path .*outside"
    ):
        load_params(copy)


def test_layers_that_do_not_fit_are_listed_together(tmp_path):
    flat = dict(reference_params())
    flat.pop("encoder/layers_0/attention/key/kernel")
    flat["encoder/layers_1/mlp/wi_1/kernel"] = np.zeros((16, 99), np.float32)
    flat["encoder/layers_1/mlp/bias"] = np.zeros(3, np.float32)
    write_legacy(tmp_path / "c", flat)
    with pytest.raises(ValueError, match="do not fit the model") as error:
        load_params(tmp_path / "c")
    assert "missing encoder/layers_0/attention/key/kernel (16, 12)" in str(error.value)
    assert "unexpected encoder/layers_1/mlp/bias (3,)" in str(error.value)
    assert "wi_1/kernel: (16, 99), needs (16, 24)" in str(error.value)


@pytest.mark.parametrize("form", ["legacy", "orbax"])
def test_a_decoder_alone_is_refused(tmp_path, form):
    folder = tmp_path / "c"
    if form == "legacy":
        write_legacy(
            folder,
            {"token_embedder/embedding": np.zeros((64, 4), np.float32)},
            target={"decoder": {"kernel": np.zeros(3, np.float32)}},
        )
    else:
        shutil.copytree(T5X / "orbax_f32" / "checkpoint_1000", folder)
        path = folder / "state" / "_METADATA"
        path.write_text(path.read_text().replace('"encoder"', '"decoder"'))
    with pytest.raises(ValueError, match="a decoder-only model; Gecko needs an enc"):
        load_params(folder)


def test_no_vocabulary_is_an_error_that_says_where_it_is():
    with pytest.raises(ValueError, match=r"holds no vocabulary.*--vocabulary.*cc_all"):
        detection.open_model(LEGACY)


def test_a_vocabulary_that_disagrees_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"70 ids \(30 of them.*table 64 rows"):
        load_params(LEGACY, extra_ids=30)
    flat = dict(reference_params())
    flat["token_embedder/embedding"] = np.zeros((40 + 128, 16), np.float32)
    write_legacy(tmp_path / "c", flat)
    with pytest.raises(ValueError, match=r"40 ids.*table 168 rows.*--extra-ids"):
        load_params(tmp_path / "c")
    assert load_params(tmp_path / "c", extra_ids=1)[0].extra_ids == 1


def test_an_early_orbax_checkpoint_is_refused(tmp_path):
    tree = {"step": 1, "target": {"encoder": {"x": "PLACEHOLDER://encoder.x"}}}
    (tmp_path / "checkpoint").write_bytes(msgpack.packb(tree))
    with pytest.raises(ValueError, match=r"early Orbax \(PLACEHOLDER://"):
        load_params(tmp_path)


@pytest.mark.parametrize(
    "tree",
    [
        {"_optimizer": {"target": {"encoder": {"x": "PLACEHOLDER://encoder.x"}}}},
        {"optimizer": {"target": {"encoder": {"x": "PLACEHOLDER://encoder.x"}}}},
    ],
)
def test_placeholders_are_named_wherever_they_are(tmp_path, tree):
    (tmp_path / "checkpoint").write_bytes(msgpack.packb(tree))
    with pytest.raises(ValueError, match=r"early Orbax \(PLACEHOLDER://"):
        load_params(tmp_path)
    # A subfolder, without the metadata of later versions.
    (tmp_path / "m" / "state").mkdir(parents=True)
    (tmp_path / "checkpoint").rename(tmp_path / "m" / "state" / "checkpoint")
    with pytest.raises(ValueError, match=r"early Orbax \(PLACEHOLDER://"):
        load_params(tmp_path / "m")


def test_another_msgpack_file_is_refused(tmp_path):
    (tmp_path / "checkpoint").write_bytes(msgpack.packb({"params": {"a": 1}}))
    with pytest.raises(ValueError, match=r"msgpack tree, but not T5X's.*params"):
        load_params(tmp_path)


def test_damaged_orbax_metadata_is_named(tmp_path):
    shutil.copytree(T5X / "orbax_f32" / "checkpoint_1000", tmp_path / "c")
    path = tmp_path / "c" / "state" / "_METADATA"
    path.write_text(path.read_text()[:99])
    with pytest.raises(ValueError, match=r"_METADATA: not the metadata.*copy it again"):
        load_params(tmp_path / "c")
    path.write_text(json.dumps({"tree_metadata": [1]}))
    with pytest.raises(ValueError, match=r"_METADATA: not the metadata of an Orbax"):
        load_params(tmp_path / "c")


def test_integers_are_no_weights(tmp_path):
    flat = dict(reference_params())
    write_legacy(tmp_path / "c", flat)
    place = "target.projection_layer.kernel"
    shutil.rmtree(tmp_path / "c" / place)
    write_zarr(tmp_path / "c", f"{place}/", np.zeros((16, 8), np.int32))
    with pytest.raises(ValueError, match=r"projection_layer\.kernel: holds int32"):
        load_params(tmp_path / "c")


def test_unwanted_parts_of_a_tree_are_passed_over(tmp_path):
    path = tmp_path / "tree"
    tree = {"keep": {"a": np.float32(2.5), "b": "text"}, "drop": {"c": np.ones(9)}}
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    read = msgpack_files.read(path, lambda keys: keys[0] != "drop")
    assert read.keys() == {"keep"}
    assert read["keep"]["b"] == "text"
    assert read["keep"]["a"].shape == ()
    assert read["keep"]["a"].read() == 2.5


def test_shapes_of_another_model_are_named():
    with pytest.raises(ValueError, match=r"not a T5 encoder.*query/kernel.*missing"):
        from_t5x.infer_config({}, "here")


@pytest.mark.parametrize(
    ("folder", "file", "step"),
    [
        ("checkpoint_12", "checkpoint", 12),
        ("x", "checkpoint", 0),
        ("x", "checkpoint_3", 3),
    ],
)
def test_steps_are_parsed_from_the_name(tmp_path, folder, file, step):
    path = tmp_path / folder / file
    path.parent.mkdir()
    tree = {"target": parameters.unflatten(reference_params())}
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    opened = from_t5x.open_checkpoint(kvstores.Folder(str(path.parent)), file)
    assert opened.step == step


def test_the_newest_step_is_the_greatest_number():
    assert from_t5x.newest({"checkpoint_2", "checkpoint_10"}) == "checkpoint_10"
    assert from_t5x.newest({"checkpoint_9.tmp"}) is None
