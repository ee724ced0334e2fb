"""Training on a GPU: steps/s, utilisation and memory, and sentence-transformers.

    python benchmarks/train_gpu.py --size=base --batch=256 --microbatch=64
    python benchmarks/train_gpu.py --size=xl --batch=128 --microbatch=16 --only=gecko
    python benchmarks/train_gpu.py --only=gecko --variants none:xla none:cudnn

Both train on the same random tokens at full length: queries of 64 tokens, passages of
512, one hard negative, bfloat16, MRL 256 and full width. The other library trains the
same T5 encoder of Hugging Face with CachedMultipleNegativesRankingLoss in a
MatryoshkaLoss, and Adafactor. Each runs in a separate process and prints its device.

Needs a GPU and the extra `cuda`; sentence-transformers needs a CUDA build of PyTorch
and the extra `torch`. Without a GPU both run on the CPU, which only tests the script:

    python benchmarks/train_gpu.py --size=mini --batch=8 --microbatch=4 --steps=1
"""

import argparse
import contextlib
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
QUERY, PASSAGE, WARMUP, PROFILED = 64, 512, 2, 5
BEGAN = time.perf_counter()


def note(message: str) -> None:
    """Prints progress and the time since the start on standard error."""
    print(
        f"{time.perf_counter() - BEGAN:6.1f} s  {message}", file=sys.stderr, flush=True
    )


def gecko(options: argparse.Namespace) -> None:
    """Times the step of `gecko train` in each variant."""
    for variant in options.variants:
        remat, _, attention = variant.partition(":")
        try:
            result = gecko_variant(options, remat, attention or "xla")
        except Exception as error:  # Continue with the other variants.
            result = {"failed": f"{type(error).__name__}: {error}"[:1000]}
        print(json.dumps({"variant": variant, **result}), flush=True)


def gecko_variant(
    options: argparse.Namespace, remat: str, attention: str
) -> dict[str, Any]:
    """Compiles and times one step."""
    import jax
    import numpy as np

    from gecko_jax.cli import flags
    from gecko_jax.models import dual_encoder
    from gecko_jax.parallel import chips, sharding
    from gecko_jax.training import train_step

    keys = {
        "data.batch_size": options.batch,
        "data.packing": False,
        "train.microbatch_size": options.microbatch,
        "model.remat": remat,
        "model.dropout_rate": 0.0,
        "model.attention": attention,
    }
    config = flags.load(
        f"{ROOT / 'configs/finetune.py'}:{options.size}",
        [f"--config.{key}={value}" for key, value in keys.items()],
    )
    mesh = sharding.build_mesh(devices=jax.devices()[:1])
    note(f"{options.size} on {jax.devices()[0].device_kind}")
    step = train_step.build(config, mesh, num_segments=1, num_tasks=1)
    init = jax.jit(
        lambda key: dual_encoder.init_params(step.encoder.config, key),
        out_shardings=step.shardings.params,
    )
    params = init(jax.random.key(0))
    opt_state = jax.jit(step.tx.init, out_shardings=step.shardings.opt_state)(params)
    state = train_step.TrainState(params, opt_state, np.int32(0))
    rng = np.random.default_rng(0)
    batch = {}
    for name, leaf in train_step.abstract_batch(config, mesh).items():
        if name.endswith("_tokens"):
            batch[name] = rng.integers(2, config.model.vocab_size, leaf.shape, np.int32)
        elif name.endswith("_index") and name != "task_index":
            rows = np.arange(leaf.shape[0], dtype=np.int32)
            batch[name] = np.stack([rows, np.zeros_like(rows)], axis=1)
        elif name.endswith(("_segment_ids", "_mask")):
            batch[name] = np.ones(leaf.shape, leaf.dtype)
        elif name.endswith("_id"):
            batch[name] = rng.integers(0, 2**32, leaf.shape, np.uint32)
        else:
            batch[name] = np.zeros(leaf.shape, leaf.dtype)
    placed = sharding.place_batch(batch, mesh)
    key = jax.random.key(0)
    note("parameters are there")
    began = time.perf_counter()
    compiled = step.run.lower(state, placed, key).compile()
    compile_seconds = time.perf_counter() - began
    note("compiled")
    memory = compiled.memory_analysis()
    for _ in range(WARMUP):
        state, summary = compiled(state, placed, key)
    jax.block_until_ready(summary)
    note("warm")
    began = time.perf_counter()
    for _ in range(options.steps):
        state, summary = compiled(state, placed, key)
    jax.block_until_ready(summary)
    seconds = (time.perf_counter() - began) / options.steps
    note("timed")
    device = jax.devices()[0]
    chip = chips.of(device)
    measurements = {
        "device": device.device_kind,
        "steps_per_second": 1 / seconds,
        "examples_per_second": options.batch / seconds,
        "compile_seconds": compile_seconds,
        "loss": float(summary["loss"]),
    }
    if chip is not None:
        flops = train_step.model_flops(config) / seconds
        measurements["model_flops_utilisation"] = flops / chip.flops_per_second
    if memory is not None:
        parts = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        measurements["compiled_gib"] = parts / 2**30
    if options.profile:
        with _trace(f"{options.profile}/{remat}-{attention}"):
            for _ in range(PROFILED):
                state, summary = compiled(state, placed, key)
            jax.block_until_ready(summary)
        note("traced")
    return measurements


@contextlib.contextmanager
def _trace(folder: str) -> Iterator[None]:
    """Traces the device only: calls of the host would fill the file."""
    import jax

    settings = jax.profiler.ProfileOptions()
    settings.python_tracer_level = 0
    settings.host_tracer_level = 1
    with jax.profiler.trace(folder, profiler_options=settings):
        yield


def sbert(options: argparse.Namespace) -> None:
    """Times a plain loop with the losses of sentence-transformers."""
    try:
        import torch
        import transformers
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import losses, modules
    except ImportError as error:
        raise SystemExit(
            f'{error}: sentence-transformers needs pip install "gecko-jax[torch]"; '
            "use --only=gecko without it"
        ) from error

    from gecko_jax.models import dual_encoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = dual_encoder.PRESETS[options.size]
    config = transformers.T5Config(
        vocab_size=sizes["vocab_size"],
        d_model=sizes["model_dim"],
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        d_kv=sizes["head_dim"],
        d_ff=sizes["mlp_dim"],
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )

    class Tower(torch.nn.Module):
        """A T5 encoder of token ids, as a module of sentence-transformers."""

        def __init__(self):
            super().__init__()
            self.encoder = transformers.T5EncoderModel(config)

        def forward(self, features):
            output = self.encoder(features["input_ids"], features["attention_mask"])
            return features | {"token_embeddings": output.last_hidden_state}

    width = sizes["model_dim"]
    dense = modules.Dense(
        width,
        sizes["embedding_dim"],
        bias=False,
        activation_function=torch.nn.Identity(),
    )
    tower = SentenceTransformer(modules=[Tower(), modules.Pooling(width), dense])
    tower = tower.to(device)
    inner = losses.CachedMultipleNegativesRankingLoss(
        tower, scale=100.0, mini_batch_size=options.microbatch or options.batch
    )
    dims = sorted({256, sizes["embedding_dim"]})
    loss = losses.MatryoshkaLoss(tower, inner, matryoshka_dims=dims)
    adafactor = transformers.Adafactor(
        tower.parameters(), lr=1e-3, relative_step=False, scale_parameter=True
    )

    def features(length: int) -> dict[str, torch.Tensor]:
        shape = (options.batch, length)
        tokens = torch.randint(2, sizes["vocab_size"], shape, device=device)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    texts = [features(QUERY), features(PASSAGE), features(PASSAGE)]

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            value = loss([dict(side) for side in texts], None)
        value.backward()
        adafactor.step()
        adafactor.zero_grad()

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    note(f"{options.size} on {device}")
    for _ in range(WARMUP):
        step()
    wait()
    note("warm")
    began = time.perf_counter()
    for _ in range(options.steps):
        step()
    wait()
    seconds = (time.perf_counter() - began) / options.steps
    measurements = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "steps_per_second": 1 / seconds,
        "examples_per_second": options.batch / seconds,
    }
    if device == "cuda":
        measurements["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(measurements), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="base")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--microbatch", type=int, default=0)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["full"],
        metavar="REMAT[:ATTENTION]",
        help="model.remat and model.attention of gecko_jax (full:xla)",
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", help="folder for a trace of each variant")
    parser.add_argument("--only", choices=("gecko", "sbert"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.here:
        {"gecko": gecko, "sbert": sbert}[options.only](options)
        return
    for name in ("gecko", "sbert"):
        if options.only in (None, name):
            process = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], f"--only={name}", "--here"],
                check=False,
                stdout=subprocess.PIPE,
                text=True,
            )
            if process.returncode:
                raise SystemExit(f"{name}: exit status {process.returncode}, see above")
            print(f"{name}: {process.stdout}", end="", flush=True)


if __name__ == "__main__":
    main()
