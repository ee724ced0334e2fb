"""What an opened mixture holds, for people: `gecko data show` prints it."""

from typing import Any

from gecko_jax.data import pipeline


def summarize(batches: pipeline.Batches, examples: int = 2) -> dict[str, Any]:
    """Describes a mixture in plain values.

    Args:
        batches: The opened mixture.
        examples: How many examples of each task to show.

    Returns:
        Plain values: `num_examples`, `mixture_hash` and `tasks`, a list with the name,
        task_description, rate, num_examples, licence, touches and examples of each. An
        example has the texts as the encoder reads them (`query`, `positive`,
        `negatives`, decoded from the tokens) and `query_tokens`, `positive_tokens`.
    """
    decode = batches.vocabulary.decode
    shown = []
    for task_index, task in enumerate(batches.tasks):
        shown.append(
            {
                "name": task.name,
                "task_description": batches.text_format.describe(task.name),
                "rate": batches.rates[task_index],
                "num_examples": batches.task_sizes[task_index],
                "licence": task.licence,
                "touches": task.touches,
                "examples": [
                    {
                        "query": decode(example.query.tolist()),
                        "positive": decode(example.positive.tolist()),
                        "negatives": [decode(n.tolist()) for n in example.negatives],
                        "query_tokens": example.query.tolist(),
                        "positive_tokens": example.positive.tolist(),
                    }
                    for example in batches.examples(task_index, examples)
                ],
            }
        )
    return {
        "num_examples": batches.num_examples,
        "mixture_hash": batches.mixture_hash,
        "tasks": shown,
    }
