"""`gecko import` and `gecko export`: checkpoints of other libraries, in and out."""

import argparse
import pathlib
from typing import Any

from gecko_jax.cli import parsing

_IMPORT = """\
Turns a checkpoint of T5X, Hugging Face or sentence-transformers into a model folder.

SOURCE is a T5X checkpoint (its folder, or the model_dir that holds several; a path,
gs:// or https://), a folder with config.json or modules.json, or a name on the hub.
Only the encoder, its embeddings and its projection are read, one tensor at a time.

examples:
  gecko import t5_1_1_base/checkpoint_1000000 --output=t5-base \\
      --vocabulary=sentencepiece.model --extra-ids=100
  gecko import google/flan-t5-base --output=flan-t5-base
  gecko import sentence-transformers/gtr-t5-base --output=gtr --query-length=64"""


_EXPORT = """\
Writes a trained model into a folder of its own, without the state of training.

  --to=gecko                  settings, weights, vocabulary; the default
  --to=sentence-transformers  SentenceTransformer(DIR), prompts and model card included
  --to=t5x                    a legacy T5X checkpoint, for t5x and t5x_retrieval
  --to=onnx                   one graph from tokens to vectors, and a tokenizer

examples:
  gecko export runs/finetune --output=my-gecko
  gecko export runs/finetune --output=my-gecko-st --to=sentence-transformers \\
      --results=results/results.json --push=my-lab/my-gecko
  gecko export runs/finetune --output=my-gecko-onnx --to=onnx --dim=256"""


def add_parser(verbs: Any) -> None:
    """Adds the parsers of `gecko import` and `gecko export`."""
    parser = parsing.add_verb(verbs, "gecko import", _IMPORT, import_)
    parser.add_argument("source", metavar="SOURCE", help="path, URL or hub name")
    parsing.add_output(parser, "DIR", "the folder to write")
    parser.add_argument(
        "--vocabulary", metavar="FILE", help="SentencePiece model; T5X holds none"
    )
    parser.add_argument(
        "--extra-ids",
        type=parsing.count,
        default=0,
        help="sentinels after it (0; T5: 100)",
    )
    for side in ("query", "passage"):
        parser.add_argument(
            f"--{side}-length",
            type=parsing.length,
            help=f"longest {side} in tokens (the source's, or 512)",
        )
    parser.add_argument(
        "--relpos-max-distance",
        type=parsing.positive,
        metavar="TOKENS",
        help="distance at which the relative bias ends; T5X does not store it (128)",
    )

    parser = parsing.add_verb(verbs, "gecko export", _EXPORT, export)
    parser.add_argument(
        "model", type=parsing.path, metavar="DIR", help="workdir of a run, or an export"
    )
    parsing.add_output(parser, "DIR", "the folder to write")
    parser.add_argument(
        "--to",
        choices=("gecko", "sentence-transformers", "t5x", "onnx"),
        default="gecko",
        help="whose format (gecko)",
    )
    parser.add_argument(
        "--dim",
        type=parsing.positive,
        help="dims that sentence-transformers or the ONNX graph gives, one that was "
        "trained",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of the weights on disk, for gecko: float16 is half as large (float32)",
    )
    parser.add_argument(
        "--results",
        metavar="FILE",
        help="results.json of `gecko evaluate`, for the model card",
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload to this repository of the hub"
    )


def import_(options: argparse.Namespace) -> None:
    """Turns a checkpoint of another library into a model folder."""
    from gecko_jax.formats import detection, model_folder, parameters

    opened = detection.open_model(
        options.source,
        vocabulary=options.vocabulary,
        extra_ids=options.extra_ids,
        query_length=options.query_length,
        passage_length=options.passage_length,
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
    """Writes a trained model into a folder of its own, in the format asked for."""
    from gecko_jax import evaluation
    from gecko_jax.formats import hub, model_folder

    output = pathlib.Path(options.output)
    if options.push:
        hub.check_upload(options.push)
    model_files = model_folder.open_model(options.model)
    _check_export(options, model_files.mrl_dims)
    if options.to == "sentence-transformers":
        from gecko_jax.formats import to_sentence_transformers

        scores = None
        if options.results:
            scores = evaluation.read(options.results).check_model(model_files)
        to_sentence_transformers.save(
            output,
            model_files,
            truncate_dim=options.dim,
            scores=scores.to_dict() if scores else None,
        )
        use = f"SentenceTransformer({options.output!r})"
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


def _check_export(options: argparse.Namespace, mrl_dims: tuple[int, ...]) -> None:
    if options.dim and options.to not in ("sentence-transformers", "onnx"):
        raise ValueError(
            f"--dim={options.dim}: the format {options.to} holds the whole embedding, "
            "which is cut when texts are encoded; leave --dim out"
        )
    if options.dim and options.dim not in mrl_dims:
        raise ValueError(
            f"--dim={options.dim} is not one the model was trained for: choose one of "
            f"{', '.join(map(str, sorted(mrl_dims)))}"
        )
    if options.dtype != "float32" and options.to != "gecko":
        raise ValueError(
            f"--dtype={options.dtype}: the format {options.to} is written in float32; "
            "leave --dtype out"
        )
    if options.results and options.to != "sentence-transformers":
        raise ValueError(
            f"--results={options.results}: the format {options.to} has no model card; "
            "leave --results out, or use --to=sentence-transformers"
        )
