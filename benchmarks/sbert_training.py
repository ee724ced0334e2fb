"""Training with the usual API of sentence-transformers."""

import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import sbert
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

import gecko_jax.config
from gecko_jax.io import reading
from gecko_jax.text import text_formats
from gecko_jax.training import train_step


def train(
    stages: tuple[Any, Any], seed: int, folder: pathlib.Path
) -> tuple[SentenceTransformer, float]:
    """Trains on the pairs of the first config, then on the triples of the second.

    Batch size, steps, lengths, MRL dims, temperature, optimizer and schedule are those
    of the configs. The loss is MatryoshkaLoss with CachedMultipleNegativesRankingLoss.
    The encoder is initialized by transformers.

    Returns:
        The model and the seconds of both loops.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    first = stages[0]
    built = sbert.build(
        gecko_jax.config.encoder_config(first),
        pathlib.Path(first.data.vocabulary),
        first.data.passage_length,
        str(folder),
    )
    seconds = 0.0
    for config in stages:
        lines = [record for _, record in reading.read_records(config.data.files[0])]
        contrast = losses.CachedMultipleNegativesRankingLoss(
            built,
            scale=1 / config.loss.temperature,
            mini_batch_size=config.data.batch_size,
        )
        order = _endless(random, len(lines))
        batches = (
            _columns(
                built,
                [lines[next(order)] for _ in range(config.data.batch_size)],
                config,
            )
            for _ in range(config.train.num_steps)
        )
        run = steps(built, contrast, batches, config)
        began = time.perf_counter()
        for _ in run:
            pass
        seconds += time.perf_counter() - began
    built.eval()
    return built, seconds


def steps(
    built: SentenceTransformer,
    contrast: torch.nn.Module,
    batches: Iterable[list[Any]],
    config: Any,
) -> Iterator[torch.Tensor]:
    """Returns the loss of each step, which trains when it is taken.

    Args:
        built: The model.
        contrast: Loss of one MRL dim.
        batches: Tokens of queries, positives and possibly hard negatives of each step.
        config: MRL dims, number of steps, optimizer and schedule.
    """
    built.train()
    loss = losses.MatryoshkaLoss(built, contrast, list(config.loss.mrl_dims))
    schedule, _ = train_step.build_optimizer(config)
    settings = config.optimizer
    tokens = built[0].auto_model.get_input_embeddings().weight
    other_weights = [weight for weight in built.parameters() if weight is not tokens]
    optimizer = torch.optim.AdamW(
        [
            {"params": other_weights, "factor": 1.0},
            {"params": [tokens], "factor": settings.token_rate},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
    rates = [float(schedule(step)) for step in range(config.train.num_steps)]

    def run() -> Iterator[torch.Tensor]:
        for rate, columns in zip(rates, batches, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            value = loss(columns, None)
            value.backward()
            torch.nn.utils.clip_grad_norm_(built.parameters(), settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            yield value.detach()

    return run()


def _endless(random: np.random.Generator, number: int) -> Any:
    while True:
        yield from random.permutation(number).tolist()


def _columns(built: Any, batch: list[dict[str, Any]], config: Any) -> list[Any]:
    """Returns tokens of queries, positives and, if any line has one, hard negatives."""
    text_format = text_formats.TextFormat()
    columns = [
        [text_format.format_query(line["query"], line["task"]) for line in batch],
        [
            text_format.format_passage(
                line.get("positive") or line["passage"], line.get("title")
            )
            for line in batch
        ],
    ]
    if config.data.num_negatives:
        # The loss needs a negative per line. A line without one gets another line's.
        spare = next((n for line in batch for n in line.get("negatives") or ()), "")
        columns.append(
            [
                text_format.format_passage((line.get("negatives") or [spare])[0])
                for line in batch
            ]
        )
    return tokenize(built, columns, config)


def tokenize(
    built: SentenceTransformer, columns: list[list[str]], config: Any
) -> list[Any]:
    """Returns tokens of formatted queries, and of each column of passages."""
    built.max_seq_length = config.data.query_length
    tokens = [built.preprocess(columns[0])]
    built.max_seq_length = config.data.passage_length
    return tokens + [built.preprocess(column) for column in columns[1:]]


def encode(
    built: SentenceTransformer, dataset: Any, tasks: list[str], config: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the vectors of queries and passages in the format of training."""
    text_format = text_formats.TextFormat()
    built.max_seq_length = config.data.query_length
    queries = built.encode(
        [
            text_format.format_query(query, task)
            for query, task in zip(dataset.queries, tasks, strict=True)
        ],
        show_progress_bar=False,
    )
    built.max_seq_length = config.data.passage_length
    passages = zip(dataset.texts, dataset.titles, strict=True)
    corpus = built.encode(
        [text_format.format_passage(text_, title) for text_, title in passages],
        show_progress_bar=False,
    )
    return np.asarray(queries), np.asarray(corpus)
