"""The model card: what a stranger must know to use an exported Gecko rightly."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gecko_jax.formats import model_folder
from gecko_jax.io import wording


def write(
    model_files: model_folder.ModelFiles,
    contents: Mapping[str, Any],
    truncate_dim: int | None = None,
    scores: Mapping[str, Any] | None = None,
) -> str:
    """Returns the text of `README.md` beside a sentence-transformers export.

    Args:
        model_files: The model.
        contents: The JSON files of the export by name, for its prompts and lengths.
        truncate_dim: The dim that `encode` gives unless told otherwise.
        scores: What `gecko evaluate` wrote to results.json.
    """
    settings = contents["config_sentence_transformers.json"]
    max_length = contents["sentence_bert_config.json"]["max_seq_length"]
    sections = [
        _front_matter(model_files),
        _introduction(model_files),
        _usage(model_files, settings["prompts"], truncate_dim),
        _format(model_files, settings["prompts"], max_length),
        _training(model_files),
        _scores(scores),
        _versions(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(model_files: model_folder.ModelFiles) -> str:
    lines = [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "tags:",
        *(
            f"- {tag}"
            for tag in (
                "sentence-transformers",
                "sentence-similarity",
                "feature-extraction",
                "gecko",
                "t5",
            )
        ),
    ]
    return "\n".join([*lines, "---"])


def _introduction(model_files: model_folder.ModelFiles) -> str:
    config = model_files.encoder_config
    dims = ", ".join(map(str, sorted(model_files.mrl_dims)))
    return (
        "# Gecko text embeddings\n\n"
        "A dual encoder after [Gecko](https://arxiv.org/abs/2403.20327) (Lee et al. "
        "2024): one T5 encoder for queries and passages, the mean of its hidden states"
        f"{', a projection' if config.projection else ''}, length 1. Made with "
        "gecko_jax; revision "
        f"{wording.markdown_code(model_files.revision)}, step {model_files.step:,}.\n\n"
        f"- {config.num_layers} layers of width {config.model_dim}, "
        f"{config.vocab_size:,} tokens, vectors of {config.embedding_dim} entries\n"
        f"- prefixes trained to stand alone (MRL): {dims}"
    )


def _usage(
    model_files: model_folder.ModelFiles,
    prompts: Mapping[str, str],
    truncate_dim: int | None,
) -> str:
    smallest = min(model_files.mrl_dims)
    default = (
        f"This folder gives {truncate_dim} entries unless told otherwise "
        "(`truncate_dim`). "
        if truncate_dim
        else ""
    )
    return f"""## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH OR REPOSITORY")
queries = model.encode(["what do geckos eat"], prompt_name="query")
passages = model.encode(["Most geckos eat insects."], prompt_name="document")
print(model.similarity(queries, passages))

small = SentenceTransformer("PATH OR REPOSITORY", truncate_dim={smallest})
```

{default}A cut vector is not of length 1: compare by cosine, or pass
`normalize_embeddings=True`. Always name a prompt; without one a text is taken for a
document. With gecko_jax:
`gecko_jax.load("PATH").encode_queries(texts, task="...")`."""


def _format(
    model_files: model_folder.ModelFiles, prompts: Mapping[str, str], max_length: int
) -> str:
    text_format = model_files.text_format
    rows = [
        f"| {wording.markdown_code(name, in_table=True)} | "
        f"{wording.markdown_code(text, in_table=True)} |"
        for name, text in prompts.items()
    ]
    if "{title}" in text_format.passage:
        written = text_format.passage.replace("{title}", "TITLE")
        written = wording.markdown_code(written.replace("{text}", "TEXT"))
        written = f"{written}, with `prompt=''`"
    else:
        written = "`TITLE TEXT`"
    lengths = (
        f"Texts are cut to {max_length} tokens. In training, queries had "
        f"{model_files.query_length} and passages {model_files.passage_length}, and "
        "gecko_jax cuts them so; a longer query gets the same vector here only after "
        f"`model.max_seq_length = {model_files.query_length}`."
        if model_files.query_length != model_files.passage_length
        else f"Texts are cut to {max_length} tokens, as in training."
    )
    symmetric = ", ".join(map(wording.markdown_code, text_format.symmetric_tasks))
    parts = [
        "## Prompts\n\nWhat stands before a text belongs to the model; scores fall "
        "without it.",
        "\n".join(["| prompt_name | written before the text |", "|---|---|", *rows]),
        f"A passage with a title is written {written}.",
        f"Both sides of {symmetric} use the prompt of that name." if symmetric else "",
        lengths,
    ]
    if model_files.encoder_config.l2_epsilon > 1e-10:
        parts.append(
            "While training, lengths were normalized as x / sqrt(|x|^2 + "
            f"{model_files.encoder_config.l2_epsilon:g}); here they are exactly 1. "
            "Cosines are the same."
        )
    return "\n\n".join(part for part in parts if part)


def _training(model_files: model_folder.ModelFiles) -> str:
    provenance = model_files.provenance
    parts = []
    tasks: Mapping[str, Any] = provenance.get("tasks") or {}
    if tasks:
        rows = [
            f"| {wording.markdown(name)} | {facts.get('num_examples') or 0:,} | "
            f"{wording.markdown(facts.get('licence') or 'not stated')} |"
            for name, facts in tasks.items()
        ]
        parts.append(
            "\n".join(["| task | examples | licence |", "|---|---|---|", *rows])
        )
    config = provenance.get("config") or {}
    loss = config.get("loss")
    if loss:
        listed = ", ".join(
            wording.markdown_code(f"{key}={_json(value)}")
            for key, value in loss.items()
        )
        parts.append(f"Loss: {listed}.")
    if provenance.get("started_from"):
        started = wording.markdown_code(str(provenance["started_from"]))
        parts.append(f"Training started from {started}.")
    if config:
        parts.append(
            "<details><summary>The whole config</summary>\n\n```json\n"
            f"{_json_block(config)}\n```\n\n</details>"
        )
    others = {
        key: value
        for key, value in provenance.items()
        if key not in ("tasks", "config", "started_from")
    }
    parts += [
        f"- {wording.markdown(key)}: {wording.markdown_code(_json(value))}"
        for key, value in others.items()
    ]
    if not parts:
        parts = ["Nothing about the training is known."]
    return "## Training\n\n" + "\n\n".join(parts)


def _scores(scores: Mapping[str, Any] | None) -> str:
    if not scores:
        return ""
    rows = [row for row in scores["rows"] if row["task"] == "all"]
    parts = []
    for name in dict.fromkeys(row["set"] for row in rows):
        found = [row for row in rows if row["set"] == name]
        metrics = list(dict.fromkeys(m for row in found for m in row["metrics"]))
        table = [
            ["system", "dims", *map(wording.markdown, metrics)],
            ["---"] * (len(metrics) + 2),
            *(
                [
                    wording.markdown(row["system"]),
                    str(row["dim"] or ""),
                    *(
                        f"{row['metrics'][m]:.3f}" if m in row["metrics"] else ""
                        for m in metrics
                    ),
                ]
                for row in found
            ),
        ]
        count = found[0]["count"]
        parts.append(
            f"### {wording.markdown(name)}\n\n{count:,} queries or pairs.\n\n"
            f"{_table(table)}"
        )
    about = scores.get("about", {})
    revision = wording.markdown_code(str(about.get("revision")))
    evaluated = f"Revision {revision}, as `gecko evaluate` prints it."
    return "\n\n".join(["## Scores", evaluated, *parts])


def _versions() -> str:
    found = ", ".join(f"{name} {v}" for name, v in model_folder.versions().items())
    return f"## Versions\n\nExported with {found}."


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _json_block(value: Any) -> str:
    """Returns JSON for a fenced block, where a string holds no HTML and no link."""
    written = json.dumps(value, indent=2)
    # Both come inside of strings only, where JSON has escapes for them.
    return written.replace("<", "\\u003c").replace("](", "]\\u0028")
