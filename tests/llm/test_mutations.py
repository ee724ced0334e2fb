"""Randomly changed files lead to the right result or to one clear error.

A seeded mutator changes JSON values, JSON text or bytes. Readers may return or raise a
`ValueError`, quickly, and without allocating the memory that a file claims to need.
"""

import dataclasses
import json
import random
import resource
import shutil
import struct
import time

import fake_llm
import fret_runs
import numpy as np
import pytest
from mutations import end_well, mutate, mutate_text

from gecko_jax.fret import html_report, measure, runs
from gecko_jax.llm import (
    decoder_files,
    decoder_tokenizer,
    decoder_weights,
    gguf,
    protocol,
    request_log,
    safetensors_folder,
    wire,
)
from tests import tiny_decoder

# --- Answers ------------------------------------------------------------------------

PROMPT, TEXT, LABELS = "Passage: geckos climb\nQuery:", " geckos climb", ("Good", "Bad")


def _replies():
    fake = fake_llm.FakeServer()
    tokens = {
        t: fake.reply("/tokenize", {"prompt": t})["tokens"] for t in (PROMPT, TEXT)
    }
    head, tail = tokens[PROMPT], tokens[TEXT]
    top = {"top_logprobs": [{" Good": -0.5, " B": -1.5, "x": -3.0}]}
    label = {"choices": [{"text": "x", "logprobs": top}], "usage": {"prompt_tokens": 9}}
    listed = [{"token": t, "logprob": v} for t, v in top["top_logprobs"][0].items()]
    chat = {"choices": [{"logprobs": {"content": [{"top_logprobs": listed}]}}]}
    text = {"choices": [{"index": 0, "text": " a", "finish_reason": "stop"}]}
    return {
        "echo": (
            fake.reply("/v1/completions", wire.echo_body(PROMPT + TEXT)),
            lambda r: wire.read_echo(r, PROMPT, TEXT),
        ),
        "echo_tokens": (
            fake.reply("/v1/completions", wire.echo_body([*head, *tail])),
            lambda r: wire.read_echo(r, PROMPT, TEXT, len(head)),
        ),
        "forced": (
            fake.reply("/completion", wire.forced_body(head, tail)),
            lambda r: wire.read_forced(r, head, tail, TEXT),
        ),
        "labels": (label, lambda r: wire.read_labels(r, LABELS, PROMPT)),
        "chat labels": (chat, lambda r: wire.read_labels(r, LABELS, PROMPT)),
        "text": (text, lambda r: wire.read_generation(r, False, PROMPT)),
        "tokens": (
            fake.reply("/tokenize", {"prompt": TEXT}),
            lambda r: wire.read_tokens(r, TEXT),
        ),
    }


@pytest.mark.parametrize("mode", _replies())
def test_answers(mode):
    reply, read = _replies()[mode]
    right = read(reply)
    rng = random.Random(f"answers {mode}")
    refused = 0
    for _ in range(300):
        changed = mutate(reply, rng)
        begin = time.monotonic()
        found, told = None, ""
        try:
            found = read(changed)
        except wire.NoAnswer as error:
            refused += 1
            told = f"{error.reason}: {error.detail}"
        assert (found is None) == bool(told)
        assert "\x1b" not in told
        if found is not None:
            numbers = str(found)
            assert "nan" not in numbers, changed
            assert "inf" not in numbers, changed
            if mode in ("echo", "echo_tokens"):
                assert found[1] == right[1], changed
        read_tokens, written = wire.tokens_used(changed, 5, 500, 1)
        assert 5 <= read_tokens <= 10**9
        assert 0 <= written <= 10**9
        assert time.monotonic() - begin < 2.0, changed
    assert refused > 20


def test_recorded_answers(tmp_path):
    with fake_llm.FakeServer() as fake:
        answers = {
            "generate": protocol.Generation(" a b", False, protocol.Usage(3, 2)),
            "score": protocol.Score(-3.5, 2, protocol.Usage(3, 1)),
            "labels": protocol.LabelScores((-0.5, -2.0), protocol.Usage(3, 1)),
        }
    assert fake.received == 0
    facts = {"backend": "server", "model": "m"}
    bodies = {
        "generate": {"prompt": "p", "seed": 1, "temperature": 0.0}
        | {"top_p": 1.0, "max_tokens": 4, "stop": []},
        "score": {"prompt": "p", "continuation": " c"},
        "labels": {"prompt": "p", "labels": ["a", "b"]},
    }
    lines = [
        {
            "key": protocol.request_key(kind, facts, body),
            "answer": dataclasses.asdict(answers[kind]),
        }
        for kind, body in bodies.items()
    ]
    sampling = protocol.Sampling(0.0, 1.0, 4, ())

    def replay(folder):
        model = protocol.recorded(folder)
        return [
            *model.generate(["p"], [1], sampling),
            *model.score(["p"], [" c"]),
            *model.label_log_probs(["p"], ["a", "b"]),
        ]

    about = {"name": "m", "facts": facts}

    def write(folder, about, texts):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "model.json").write_text(about)
        (folder / "answers.jsonl").write_text("\n".join(texts) + "\n")

    plain = list(map(json.dumps, lines))
    write(tmp_path / "a", json.dumps(about), plain)
    assert replay(tmp_path / "a") == list(answers.values())
    rng = random.Random("recorded")
    for number in range(150):
        texts, name = list(plain), json.dumps(about)
        if number % 5 == 0:
            name = mutate_text(about, rng)
        else:
            place = rng.randrange(len(texts))
            texts[place] = mutate_text(lines[place], rng)
        write(tmp_path / "a", name, texts)
        found = end_well(lambda: replay(tmp_path / "a"), (name, texts)) or []
        for answer in found:
            if isinstance(answer, protocol.Score):
                assert -1e300 < answer.log_prob <= 0
        log = tmp_path / "a" / "answers.jsonl"
        end_well(lambda log=log: request_log.RequestLog(log).close(), texts)


# --- Records of a run ---------------------------------------------------------------


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    root = tmp_path_factory.mktemp("mutations")
    corpus = fret_runs.write_corpus(root)
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(corpus, fake.url)
        runs.run(config, root / "run")
        measure.calibrate(config, root / "run", budget=request_log.Budget())
    return config, root / "run"


def test_records_and_their_counts(made, tmp_path):
    config, workdir = made
    rng = random.Random("records")
    paths = sorted(
        path.relative_to(workdir)
        for pattern in (
            "*/shard-00001.jsonl",
            "*/.done.json",
            "calibration/*/.done.json",
        )
        for path in workdir.glob(pattern)
    )
    assert len(paths) > 10
    copied = tmp_path / "run"
    shutil.copytree(workdir, copied)
    refused = 0
    for number in range(33):
        path = copied / paths[number % len(paths)]
        before = path.read_bytes()
        if path.suffix == ".json":
            path.write_text(mutate_text(json.loads(before), rng))
        else:
            lines = before.decode().splitlines()
            place = rng.randrange(len(lines))
            lines[place] = mutate_text(json.loads(lines[place]), rng)
            path.write_text("\n".join(lines) + "\n")
            # A careful hand keeps the size that the stage has counted.
            done = path.parent / ".done.json"
            counted = json.loads(done.read_text())
            counted["bytes"][1] = path.stat().st_size
            kept_done = done.read_bytes()
            done.write_text(json.dumps(counted))
        what = (str(path), path.read_text()[:2_000])

        def use():
            runs.run(config, copied)
            source = runs.prepare(config, copied, request_log.Budget())
            measure.read_calibration(runs.calibration_pipeline(source))
            html_report.write(config, copied, 5)
            return True

        refused += end_well(use, what) is None
        if path.suffix != ".json":
            done.write_bytes(kept_done)
        path.write_bytes(before)
        shutil.rmtree(copied / "export", ignore_errors=True)
        shutil.copytree(workdir / "export", copied / "export")
    assert refused > 10


# --- Models -------------------------------------------------------------------------


def _config_json():
    config = tiny_decoder.LLAMA
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 128,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        "tie_word_embeddings": True,
        "attention_bias": False,
    }


def test_settings_of_a_decoder(tmp_path):
    from safetensors import numpy as safetensors_numpy

    shapes = {
        "embedding": (300, 16),
        "attention_norm": (16,),
        "query": (32, 16),
        "key": (16, 16),
        "value": (16, 16),
        "out": (16, 32),
        "mlp_norm": (16,),
        "gate": (32, 16),
        "up": (32, 16),
        "down": (16, 32),
        "final_norm": (16,),
    }
    names = decoder_weights.file_names(tiny_decoder.LLAMA, "hugging_face")
    tensors = {
        name: np.zeros(shape, np.float32)
        for parameter, shape in shapes.items()
        for name in names[parameter]
    }
    safetensors_numpy.save_file(tensors, tmp_path / "model.safetensors")
    path, settings = tmp_path / "config.json", _config_json()
    path.write_text(json.dumps(settings))
    right = safetensors_folder.SafetensorsFolder(tmp_path).config
    assert right.rope_factors is not None
    rng = random.Random("settings")
    for _ in range(150):
        path.write_text(mutate_text(settings, rng))
        found = end_well(
            lambda: safetensors_folder.SafetensorsFolder(tmp_path).config,
            path.read_text()[:2_000],
        )
        if found is not None:  # Shapes are those of the tensors, whatever is claimed.
            assert (
                dataclasses.replace(
                    right,
                    rope_base=found.rope_base,
                    rope_factors=found.rope_factors,
                    norm_epsilon=found.norm_epsilon,
                    context_length=found.context_length,
                )
                == found
            )


def test_tokenizers(tmp_path):
    import tokenizers

    pieces, merges = tiny_decoder.pieces()
    vocab = {piece: number for number, piece in enumerate(pieces)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=pairs))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    settings = json.loads(built.to_str())
    path = tmp_path / "tokenizer.json"
    rng = random.Random("tokenizers")

    def use():
        tokenizer = decoder_tokenizer.from_folder(tmp_path)
        ids = tokenizer.encode("the cat <|im_end|>", begin=True)
        assert all(0 <= number < tokenizer.num_ids for number in ids)
        tokenizer.decode(ids)
        return ids

    path.write_text(json.dumps(settings))
    assert use()
    for _ in range(150):
        path.write_text(mutate_text(settings, rng))
        end_well(use, path.read_text()[:500])


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path):
    small = dataclasses.replace(tiny_decoder.LLAMA, vocab_size=300)
    path = tiny_decoder.write_gguf(tmp_path / "a.gguf", config=small)
    opened = decoder_files.open_model(path)
    assert opened.tokenizer.num_ids == opened.config.vocab_size == 300
    more = dataclasses.replace(tiny_decoder.LLAMA, vocab_size=310)
    path = tiny_decoder.write_gguf(tmp_path / "b.gguf", config=more)
    with pytest.raises(ValueError, match="310 tokens, the model 300"):
        decoder_files.open_model(path)


def _header_end(content):
    return content.index(b"output_norm.weight") + 200


def test_gguf_headers(tmp_path):
    path = tiny_decoder.write_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    end = _header_end(whole)
    rng = random.Random("gguf")
    gguf.Gguf(path)

    def use():
        file = gguf.Gguf(path)
        file.tokenizer.encode("the cat")
        return file.config

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(60):
        content = bytearray(whole)
        place = rng.randrange(4, end)
        if number % 3 == 0:
            content[place] = rng.randrange(256)
        elif number % 3 == 1:
            value = rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))
            content[place : place + 8] = struct.pack("<Q", value)
        else:
            content = content[:place]
        path.write_bytes(bytes(content))
        end_well(use, (number, place))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 1 << 18  # KiB: 256 MiB


@pytest.mark.parametrize(
    ("offset", "claim"),
    [(8, 2**60), (16, 2**60), (24, 2**60)],
    ids=["tensors", "settings", "length of a name"],
)
def test_a_size_that_a_file_only_claims_is_not_allocated(tmp_path, offset, claim):
    path = tiny_decoder.write_gguf(tmp_path / "tiny.gguf")
    content = bytearray(path.read_bytes())
    content[offset : offset + 8] = struct.pack("<Q", claim)
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="not a complete GGUF file"):
        gguf.Gguf(path)


def test_a_list_longer_than_the_file_is_not_read(tmp_path):
    path = tiny_decoder.write_gguf(tmp_path / "tiny.gguf")
    content = bytearray(path.read_bytes())
    place = content.index(b"tokenizer.ggml.tokens") + 21 + 4 + 4
    content[place : place + 8] = struct.pack("<Q", 2**40)
    path.write_bytes(bytes(content))
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"claims 1,099,511,627,776 entries"):
        gguf.Gguf(path)
    assert time.monotonic() - begin < 2.0
