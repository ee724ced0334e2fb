"""The model card of an exported model: what a user needs to know about it."""

import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gecko_jax.formats import model_folder, parameters
from gecko_jax.io import wording

_FRONT_MATTER = """\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- sentence-similarity
- feature-extraction
- gecko
- {family}
---"""

_FAMILIES = {
    "t5": "T5",
    "gemma": "Gemma 3",
    "embeddinggemma2": "EmbeddingGemma 2",
    "qwen3": "Qwen 3",
}
_POOLINGS = {
    "mean": "the mean of its hidden states",
    "last": "the hidden state of the last token",
}

# mteb counts weights, training code, training data and licence as openness.
_META = """\
from mteb.models.model_meta import ModelMeta
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

model = ModelMeta(
    loader=SentenceTransformerEncoderWrapper,
    name={name!r},
    revision=None,  # commit on the hub
    release_date=None,  # "YYYY-MM-DD"
    languages=None,  # such as ["eng-Latn"]
    n_parameters={size:_},
    n_embedding_parameters={embedding_size:_},
    memory_usage_mb={megabytes:.0f},
    max_tokens={max_tokens},
    embed_dim={dims},
    license=None,  # such as "apache-2.0"
    open_weights=True,
    public_training_code=None,  # URL
    public_training_data=None,  # URL, True or False
    training_datasets=None,  # names in mteb
    framework=["Sentence Transformers", "JAX", "safetensors"],
    similarity_fn_name="cosine",
    use_instructions={use_instructions},
    adapted_from={adapted_from},  # name of the base model on the hub
)"""

_USAGE = """\
## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH OR REPOSITORY")
queries = model.encode(["what do geckos eat"], prompt_name="query")
passages = model.encode(["Most geckos eat insects."], prompt_name="document")
print(model.similarity(queries, passages))

small = SentenceTransformer("PATH OR REPOSITORY", truncate_dim={smallest})
```

{default}A cut vector is not of length 1: compare by cosine, or pass
`normalize_embeddings=True`. Always name a prompt; a text without one gets the prompt of
a document. With gecko_jax:
`gecko_jax.load("PATH").encode_queries(texts, task="...")`."""


def write(
    model_files: model_folder.ModelFiles,
    contents: Mapping[str, Any],
    truncate_dim: int | None = None,
    scores: Mapping[str, Any] | None = None,
) -> str:
    """Returns the text of `README.md` for a sentence-transformers export.

    `contents` has the JSON files of the export by name, for its prompts and lengths,
    and `scores` is the results.json of `gecko evaluate`.
    """
    prompts = contents["config_sentence_transformers.json"]["prompts"]
    max_length = contents["sentence_bert_config.json"]["max_seq_length"]
    default = f"By default, vectors have {truncate_dim} entries (`truncate_dim`). "
    versions = ", ".join(f"{name} {v}" for name, v in model_folder.versions().items())
    sections = [
        _FRONT_MATTER.format(family=model_files.encoder_config.family),
        _introduction(model_files),
        _USAGE.format(
            smallest=min(model_files.mrl_dims), default=default if truncate_dim else ""
        ),
        _prompts(model_files, prompts, max_length),
        _training(model_files.provenance),
        _scores(scores) if scores else "",
        f"## Versions\n\nExported with {versions}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def mteb_meta(model_files: model_folder.ModelFiles, name: str) -> str:
    """Returns Python code that describes a sentence-transformers export to mteb."""
    config, text_format = model_files.encoder_config, model_files.text_format
    leaves = parameters.flatten(model_files.params).values()
    size = sum(math.prod(leaf.shape) for leaf in leaves)
    source = str(model_files.provenance.get("imported", {}).get("source", ""))
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    is_on_hub = is_on_hub and not pathlib.Path(source).exists()
    return _META.format(
        name=name,
        size=size,
        embedding_size=config.vocab_size * config.model_dim,
        megabytes=size * 4 / 2**20,
        max_tokens=max(model_files.query_length, model_files.passage_length),
        dims=sorted(model_files.mrl_dims, reverse=True),
        use_instructions=text_format.has_only_prompts or text_format.query != "{text}",
        adapted_from=repr(source) if is_on_hub else None,
    )


def _introduction(model_files: model_folder.ModelFiles) -> str:
    config = model_files.encoder_config
    dims = ", ".join(map(str, sorted(model_files.mrl_dims)))
    return (
        "# Gecko text embeddings\n\n"
        "A dual encoder after [Gecko](https://arxiv.org/abs/2403.20327) (Lee et al. "
        f"2024): one {_FAMILIES[config.family]} encoder for queries and passages, "
        f"{_POOLINGS[config.pooling]}"
        f"{', a projection' if config.projection else ''}, length 1. Made with "
        "gecko_jax; revision "
        f"{wording.markdown_code(model_files.revision)}, step {model_files.step:,}.\n\n"
        f"- {config.num_layers} layers of width {config.model_dim}, "
        f"{config.vocab_size:,} tokens, vectors of {config.embedding_dim} entries\n"
        f"- trained prefixes of the vectors (MRL): {dims}"
    )


def _prompts(
    model_files: model_folder.ModelFiles, prompts: Mapping[str, str], max_length: int
) -> str:
    text_format = model_files.text_format
    rows = [["prompt_name", "written before the text"]]
    for prompt in prompts.items():
        rows.append([wording.markdown_code(text, in_table=True) for text in prompt])
    titled = "`TITLE TEXT`"
    if "{title}" in text_format.passage:
        example = text_format.passage.replace("{title}", "TITLE")
        example = wording.markdown_code(example.replace("{text}", "TEXT"))
        titled = f"{example}, with `prompt=''`"
    query_length, passage_length = model_files.query_length, model_files.passage_length
    lengths = f"Texts are cut to {max_length} tokens, as in training."
    if query_length != passage_length:
        lengths = (
            f"Texts are cut to {max_length} tokens. In training and in gecko_jax, "
            f"queries are cut to {query_length} and passages to {passage_length}; "
            "a longer query gets the same vector here only after "
            f"`model.max_seq_length = {query_length}`."
        )
    parts = [
        "## Prompts\n\nThe prompts are part of the model; scores fall without them.",
        _table(rows),
        f"A passage with a title is written {titled}.",
    ]
    if symmetric := ", ".join(map(wording.markdown_code, text_format.symmetric_tasks)):
        parts.append(f"Both sides of {symmetric} use the prompt of that name.")
    parts.append(lengths)
    epsilon = model_files.encoder_config.l2_epsilon
    if epsilon > 1e-10:
        parts.append(
            "In training, vectors were normalized as x / sqrt(|x|^2 + "
            f"{epsilon:g}); here their length is exactly 1. Cosines are the same."
        )
    return "\n\n".join(parts)


def _training(provenance: Mapping[str, Any]) -> str:
    parts = []
    if tasks := provenance.get("tasks"):
        rows = [["task", "examples", "licence"]]
        for name, facts in tasks.items():
            licence = wording.markdown(facts.get("licence") or "not stated")
            count = f"{facts.get('num_examples') or 0:,}"
            rows.append([wording.markdown(name), count, licence])
        parts.append(_table(rows))
    config = provenance.get("config") or {}
    if loss := config.get("loss"):
        settings = [f"{key}={_json(value)}" for key, value in loss.items()]
        parts.append(f"Loss: {', '.join(map(wording.markdown_code, settings))}.")
    if started_from := provenance.get("started_from"):
        started = wording.markdown_code(str(started_from))
        parts.append(f"Training started from {started}.")
    if config:
        # "<" and "](" occur only in strings, where JSON has escapes for them.
        block = json.dumps(config, indent=2).replace("<", "\\u003c")
        block = block.replace("](", "]\\u0028")
        parts.append(
            "<details><summary>The whole config</summary>\n\n```json\n"
            f"{block}\n```\n\n</details>"
        )
    parts += [
        f"- {wording.markdown(key)}: {wording.markdown_code(_json(value))}"
        for key, value in provenance.items()
        if key not in ("tasks", "config", "started_from")
    ]
    parts = parts or ["Nothing about the training is known."]
    return "\n\n".join(["## Training", *parts])


def _scores(scores: Mapping[str, Any]) -> str:
    rows = [row for row in scores["rows"] if row["task"] == "all"]
    revision = wording.markdown_code(str(scores.get("about", {}).get("revision")))
    parts = [f"## Scores\n\nRevision {revision}, as `gecko evaluate` prints it."]
    for name in dict.fromkeys(row["set"] for row in rows):
        of_set = [row for row in rows if row["set"] == name]
        metrics = list(dict.fromkeys(m for row in of_set for m in row["metrics"]))
        table = [["system", "dims", *map(wording.markdown, metrics)]]
        for row in of_set:
            values = row["metrics"]
            cells = [f"{values[m]:.3f}" if m in values else "" for m in metrics]
            dim = str(row["dim"] or "")
            table.append([wording.markdown(row["system"]), dim, *cells])
        parts.append(
            f"### {wording.markdown(name)}\n\n{of_set[0]['count']:,} queries or pairs."
            f"\n\n{_table(table)}"
        )
    return "\n\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown; the first row is its heading."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
