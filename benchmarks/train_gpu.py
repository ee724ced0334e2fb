"""Training on a GPU: steps/s, utilisation and memory, beside sentence-transformers.

    python benchmarks/train_gpu.py --size=base --batch=256 --microbatch=64
    python benchmarks/train_gpu.py --size=xl --batch=128 --microbatch=16 --only=gecko

Random tokens at full length, the same for both: queries of 64, passages of 512, one
hard negative, bfloat16, MRL 256 and full width. The other side is the same T5 encoder
of Hugging Face, CachedMultipleNegativesRankingLoss in a MatryoshkaLoss, and Adafactor;
each runs in a process of its own, and says on what.

Needs a GPU and the extra `cuda`; the other side a CUDA build of PyTorch and the extra
`torch`. Without a GPU both run on the CPU, which tries the script and measures nothing:

    python benchmarks/train_gpu.py --size=mini --batch=8 --microbatch=4 --steps=1
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
QUERY, PASSAGE, WARMUP = 64, 512, 3


def gecko(options: argparse.Namespace) -> dict[str, str | float]:
    """Times the step that `gecko train` runs."""
    import jax
    import numpy as np

    from gecko_jax import chips, flags, model, sharding
    from gecko_jax import step as step_lib

    keys = {
        "data.batch_size": options.batch,
        "data.packing": False,
        "train.microbatch_size": options.microbatch,
        "model.remat": options.remat,
        "model.dropout_rate": 0.0,
    }
    config = flags.load(
        f"{ROOT / 'configs/finetune.py'}:{options.size}",
        [f"--config.{key}={value}" for key, value in keys.items()],
    )
    mesh = sharding.build_mesh(devices=jax.devices()[:1])
    step = step_lib.build(config, mesh, num_segments=1, num_tasks=1)
    init = jax.jit(
        lambda key: model.init_params(step.encoder.config, key),
        out_shardings=step.shardings.params,
    )
    params = init(jax.random.key(0))
    opt_state = jax.jit(step.tx.init, out_shardings=step.shardings.opt_state)(params)
    state = step_lib.TrainState(params, opt_state, np.int32(0))
    rng = np.random.default_rng(0)
    batch = {}
    for name, leaf in step_lib.abstract_batch(config, mesh).items():
        if name.endswith("_tokens"):
            batch[name] = rng.integers(2, config.model.vocab_size, leaf.shape, np.int32)
        elif name.endswith("_index") and name != "task_index":
            rows = np.arange(leaf.shape[0], dtype=np.int32)
            batch[name] = np.stack([rows, np.zeros_like(rows)], axis=1)
        elif name.endswith(("_segment_ids", "_mask")):
            batch[name] = np.ones(leaf.shape, leaf.dtype)
        else:
            batch[name] = np.zeros(leaf.shape, leaf.dtype)
    placed = sharding.place_batch(batch, mesh)
    key = jax.random.key(0)
    for _ in range(WARMUP):
        state, summary = step.run(state, placed, key)
    jax.block_until_ready(summary)
    began = time.perf_counter()
    for _ in range(options.steps):
        state, summary = step.run(state, placed, key)
    jax.block_until_ready(summary)
    seconds = (time.perf_counter() - began) / options.steps
    device = jax.devices()[0]
    chip = chips.of(device)
    found = {
        "device": device.device_kind,
        "steps_per_second": 1 / seconds,
        "examples_per_second": options.batch / seconds,
    }
    if chip is not None:
        flops = step_lib.model_flops(config) / seconds
        found["model_flops_utilisation"] = flops / chip.flops_per_second
    memory = device.memory_stats()
    if memory is not None:
        found["peak_gib"] = memory["peak_bytes_in_use"] / 2**30
    return found


def sbert(options: argparse.Namespace) -> dict[str, str | float]:
    """Times a plain loop around sentence-transformers' losses."""
    try:
        import torch
        import transformers
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import losses, modules
    except ImportError as error:
        raise SystemExit(
            f'{error}: the other side needs pip install "gecko-jax[torch]"; '
            "--only=gecko does without"
        ) from error

    from gecko_jax import model as gecko_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = gecko_model.PRESETS[options.size]
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
        """A T5 encoder on tokens, as a module of sentence-transformers."""

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

    for _ in range(WARMUP):
        step()
    wait()
    began = time.perf_counter()
    for _ in range(options.steps):
        step()
    wait()
    seconds = (time.perf_counter() - began) / options.steps
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "steps_per_second": 1 / seconds,
        "examples_per_second": options.batch / seconds,
    }
    if device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="base")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--microbatch", type=int, default=0)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", choices=("gecko", "sbert"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.here:
        run = {"gecko": gecko, "sbert": sbert}[options.only]
        print(json.dumps(run(options)))
        return
    for name in ("gecko", "sbert"):
        if options.only in (None, name):
            found = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], f"--only={name}", "--here"],
                check=False,
                stdout=subprocess.PIPE,
                text=True,
            )
            if found.returncode:
                raise SystemExit(f"{name}: ended with {found.returncode}, see above")
            values = json.loads(found.stdout.splitlines()[-1])
            device = values.pop("device")
            numbers = " ".join(f"{key}={value:.3g}" for key, value in values.items())
            print(f"{name} on {device}: {numbers}", flush=True)


if __name__ == "__main__":
    main()
