"""`gecko import` and `gecko export`: conversion from and to other libraries."""

import argparse
import pathlib
from typing import Any

from gecko_jax.cli import parsing

_IMPORT = """\
Converts a T5X, Hugging Face or sentence-transformers checkpoint into a model folder.

SOURCE is a T5X checkpoint (its folder, or a model_dir with several; a path, gs:// or
https://), a folder with config.json or modules.json, or a name on the Hugging Face hub.
The encoder may be a T5, EmbeddingGemma (1 and 2), T5Gemma 2 or Qwen3-Embedding. Only
the encoder, its embeddings and its projection are read, one tensor at a time.

examples:
  gecko import t5_1_1_base/checkpoint_1000000 --output=t5-base \\
      --vocabulary=sentencepiece.model --extra-ids=100
  gecko import google/flan-t5-base --output=flan-t5-base
  gecko import sentence-transformers/gtr-t5-base --output=gtr --query-length=64
  gecko import google/embeddinggemma-300m --output=embeddinggemma \\
      --mrl-dims=128,256,512"""


_EXPORT = """\
Writes a trained model, without its training state, in one of four formats.

  --to=gecko                  model folder: settings, weights, vocabulary (the default)
  --to=sentence-transformers  for SentenceTransformer(DIR), with prompts and model card
  --to=t5x                    legacy T5X checkpoint, for t5x and t5x_retrieval
  --to=onnx                   one graph from tokens to embeddings, and a tokenizer

The last two write T5 encoders only.

examples:
  gecko export runs/finetune --output=my-gecko
  gecko export runs/finetune --output=my-gecko-st --to=sentence-transformers \\
      --results=results/results.json --push=my-lab/my-gecko
  gecko export runs/finetune --output=my-gecko-onnx --to=onnx --dim=256"""


def add_parser(verbs: Any) -> None:
    """Adds the parsers of `gecko import` and `gecko export`."""
    parser = parsing.add_verb(verbs, "gecko import", _IMPORT, import_)
    add = parser.option
    add("source", "path, URL or hub name", "SOURCE")
    add("--output", "folder for the model", "DIR", required=True)
    text = "SentencePiece model; T5X checkpoints do not contain one"
    add("--vocabulary", text, "FILE")
    text = "number of sentinel ids after the vocabulary (default: 0; T5 has 100)"
    add("--extra-ids", text, parsing.count, 0)
    for side in ("query", "passage"):
        text = f"maximum {side} length in tokens (default: the source's, or 512)"
        add(f"--{side}-length", text, parsing.length)
    text = "trained MRL dims that the source does not name, such as 128,256,512"
    add("--mrl-dims", text, parsing.positives, ())
    text = "max_distance of the relative bias, which T5X does not store (default: 128)"
    add("--relpos-max-distance", text, parsing.positive)

    parser = parsing.add_verb(verbs, "gecko export", _EXPORT, export)
    add = parser.option
    add("model", "workdir of a run, or model folder", "DIR")
    add("--output", "folder for the export", "DIR", required=True)
    formats = ("gecko", "sentence-transformers", "t5x", "onnx")
    add("--to", "output format", formats, "gecko")
    text = "output dimension, for sentence-transformers and ONNX"
    add("--dim", text, parsing.positive)
    text = "precision of the stored weights, for --to=gecko"
    add("--dtype", text, ("float32", "float16"), "float32")
    add("--results", "evaluation results.json, for the model card", "FILE")
    add("--push", "upload to this Hugging Face repository", "OWNER/NAME")


def import_(options: argparse.Namespace) -> None:
    """Converts a checkpoint of another library into a model folder."""
    from gecko_jax.formats import detection, model_folder, parameters

    opened = detection.open_model(
        options.source,
        vocabulary=options.vocabulary,
        extra_ids=options.extra_ids,
        query_length=options.query_length,
        passage_length=options.passage_length,
        mrl_dims=options.mrl_dims,
        relpos_max_distance=options.relpos_max_distance,
    )
    written = model_folder.save_model(options.output, opened)
    config = written.encoder_config
    leaves = parameters.flatten(written.params).values()
    size = sum(leaf.size for leaf in leaves)
    parsing.say(
        f"{options.output}: {size / 1e6:,.1f}M parameters, {config.num_layers} layers, "
        f"{config.embedding_dim} dims, revision {written.revision}. Load it with "
        f"gecko_jax.load({options.output!r})"
    )


def export(options: argparse.Namespace) -> None:
    """Writes a trained model in the requested format."""
    from gecko_jax import evaluation
    from gecko_jax.formats import hub, model_card, model_folder

    output = pathlib.Path(options.output)
    if options.push:
        hub.check_upload(options.push)
    model_files = model_folder.open_model(options.model)
    _check_export(options, model_files.mrl_dims)
    meta = ""
    if options.to == "sentence-transformers":
        from gecko_jax.formats import to_sentence_transformers

        scores = None
        if options.results:
            scores = evaluation.read(options.results).check_model(model_files).to_dict()
        to_sentence_transformers.save(
            output, model_files, truncate_dim=options.dim, scores=scores
        )
        use = f"SentenceTransformer({options.output!r})"
        meta = model_card.mteb_meta(model_files, options.push or "OWNER/NAME")
    elif options.to == "t5x":
        from gecko_jax.formats import to_t5x

        to_t5x.save(output, model_files)
        use = f"t5x: {output / f'checkpoint_{model_files.step}'}"
    elif options.to == "onnx":
        from gecko_jax.formats import to_onnx

        to_onnx.save(output, model_files, dim=options.dim)
        use = f"onnxruntime.InferenceSession({str(output / to_onnx.MODEL)!r})"
    else:
        model_folder.save_model(output, model_files, dtype=options.dtype)
        use = f"gecko_jax.load({options.output!r})"
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    parsing.say(
        f"{output}: step {model_files.step} of {options.model}, {size / 1e6:,.1f} MB. "
        f"Load it with {use}"
    )
    if options.push:
        parsing.say(hub.upload(output, options.push))
    if meta:
        parsing.say(f"\nTo list the model in mteb, complete this entry:\n\n{meta}")


def _check_export(options: argparse.Namespace, mrl_dims: tuple[int, ...]) -> None:
    """Raises ValueError for an option that the output format does not support."""
    stores = "stores the full embedding, and encoding truncates it"
    for name, default, formats, reason in (
        ("dim", None, ("sentence-transformers", "onnx"), stores),
        ("dtype", "float32", ("gecko",), "is always written in float32"),
        ("results", None, ("sentence-transformers",), "has no model card"),
    ):
        value = getattr(options, name)
        if value != default and options.to not in formats:
            flag = f"--{name}={value}: the format {options.to}"
            raise ValueError(f"{flag} {reason}; leave --{name} out")
    if options.dim and options.dim not in mrl_dims:
        raise ValueError(
            f"--dim={options.dim}: the model was not trained for this dimension; "
            f"choose one of {', '.join(map(str, sorted(mrl_dims)))}"
        )
