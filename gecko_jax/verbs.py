"""What each verb of `gecko` does: options in, calls into the package, results printed.

Results go to stdout, progress and notes to stderr.
"""

import argparse
import contextlib
import json
import pathlib
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from gecko_jax import flags


def train(options: argparse.Namespace) -> None:
    """Trains, or goes on with, the run of a workdir."""
    from gecko_jax import distributed

    peers = distributed.Peers(
        options.coordinator, options.processes, options.process, options.peer_timeout
    )
    distributed.check(peers)
    is_distributed = options.distributed or peers.coordinator is not None
    if is_distributed and not distributed.is_child():
        status = distributed.run_child(options.arguments, peers)
        if status:
            raise SystemExit(status)
        return
    with distributed.join(peers) if is_distributed else contextlib.nullcontext():
        _train(options)


def _train(options: argparse.Namespace) -> None:
    config = flags.load(options.config, options.overrides)
    from gecko_jax import config as config_lib
    from gecko_jax import interruption
    from gecko_jax import train as training

    # A wrong key should be told before anything else can fail.
    config_lib.check(config)
    from gecko_jax import evaluation, plots

    evaluate = evaluation.build_callback(config, options.workdir)
    try:
        training.train(
            config, options.workdir, evaluate=evaluate, profile_steps=options.profile
        )
    except interruption.Interrupted as interrupted:
        print(f"gecko train: {interrupted}", file=sys.stderr)
        # What a shell reports of a process that SIGTERM has ended.
        raise SystemExit(128 + signal.SIGTERM) from None
    # The stages of a model in one picture: the run it started from, then its own.
    folders = (config.init.checkpoint or options.workdir, options.workdir)
    runs = [pathlib.Path(folder) / "metrics.jsonl" for folder in folders]
    runs = [run for run in dict.fromkeys(runs) if run.is_file()]
    if runs and _is_first_process():
        plots.plot_training(runs, pathlib.Path(options.workdir) / "training.png")
    print(f"{options.workdir}: load it with gecko_jax.load({options.workdir!r})")


def compile_step(options: argparse.Namespace) -> None:
    """Compiles the train step of a config for a TPU topology."""
    if options.search and options.slices > 1:
        raise ValueError("--search: looks at one slice; leave out --slices")
    config = flags.load(options.config, options.overrides)
    from gecko_jax import compile as compile_lib

    reports = []
    found = (
        compile_lib.search(config, options.topology)
        if options.search
        else [compile_lib.compile_step(config, options.topology, options.slices)]
    )
    for report in found:
        reports.append(report)
        if options.json:
            print(json.dumps(report.to_dict()), flush=True)
        else:
            print("\n".join(compile_lib.describe(report)) + "\n", flush=True)
    if options.search and not options.json:
        best = compile_lib.recommend(reports)
        if best is None:
            print("None of them leaves enough memory: more chips, or a smaller batch.")
        else:
            sizes = best.settings | {f"mesh.{k}": v for k, v in best.mesh.items()}
            print(
                "The fastest that fits: "
                + " ".join(f"--config.{key}={value}" for key, value in sizes.items())
            )


def data_show(options: argparse.Namespace) -> None:
    """Prints the tasks of a config, and examples as the encoder reads them."""
    if options.mixture:
        _print_mixture(options.mixture, options.prepared_dir)
    if not options.config:
        return
    config = flags.load(options.config, options.overrides)
    from gecko_jax import config as config_lib
    from gecko_jax import text
    from gecko_jax import train as training
    from gecko_jax.data import pipeline

    config_lib.check(config)
    batches = training.build_batches(config, text_format=text.TextFormat())
    summary = pipeline.summarize(batches, options.count)
    batch = batches.batch(0)
    print(
        f"{summary['num_examples']:,} examples, {config.data.batch_size:,} a step; "
        f"mixture {summary['mixture_hash']}"
    )
    for task in summary["tasks"]:
        print(
            f"\n{task['name']}: {task['num_examples']:,} examples, "
            f"{task['rate']:.1%} of the mixture; licence {task['licence']}"
        )
        if task["touches"]:
            print(f"  may hold texts of {', '.join(task['touches'])}")
        for example in task["examples"]:
            print()
            _print_text("query", example["query"], len(example["query_tokens"]))
            _print_text(
                "positive", example["positive"], len(example["positive_tokens"])
            )
            for negative in example["negatives"]:
                _print_text("negative", negative)
    print("\nThe first batch:")
    for side in ("query", "passage"):
        used = batch[f"{side}_segment_ids"] > 0
        rows, length = used.shape
        print(
            f"  {side}: {rows} rows of {length} tokens, {1 - used.mean():.0%} padding, "
            f"{len(batch[f'{side}_index']):,} texts"
        )


def _print_mixture(name: str, prepared_dir: str) -> None:
    """Prints the rows of a mixture of the table, prepared or not."""
    from gecko_jax.data import jsonl, mixtures

    tasks, drawn = mixtures.describe(name)
    located = [mixtures.locate(task, prepared_dir) for task in tasks]
    sizes = []
    for task in located:
        counts = [jsonl.summarize(path).examples for path in task.files]
        size = sum(count.get(task.source_task, 0) for count in counts)
        sizes.append(size or task.published_size)
    known = [size for size in sizes if size]
    rates = drawn.rates(
        [task.name for task, size in zip(located, sizes, strict=True) if size], known
    )
    share = dict(
        zip(
            [t.name for t, size in zip(located, sizes, strict=True) if size],
            [rate / sum(rates) for rate in rates],
            strict=True,
        )
    )
    print(
        f"{name}: {len(tasks)} tasks, temperature {drawn.temperature:g}, cap "
        f"{drawn.cap or 'none'}; rates are ours, among the tasks of known size"
    )
    for task, size in zip(located, sizes, strict=True):
        state = "" if task.files else "; not prepared"
        count = f"{size:,} examples" if size else "unknown size"
        rate = f"{share[task.name]:.1%}" if task.name in share else "-"
        print(f"\n{task.name}: {count}, {rate}; licence {task.licence}{state}")
        form = ", symmetric" if task.symmetric else ""
        print(f"  {task.source or 'JSONL'}; t = {task.task_description!r}{form}")
        if task.restricted:
            print(f"  restricted: {task.restricted}")
        if task.touches:
            print(f"  may hold texts of {', '.join(task.touches)}")


def data_vocabulary(options: argparse.Namespace) -> None:
    """Trains a vocabulary and says what it is."""
    from gecko_jax.data import pieces

    trained = pieces.train_vocabulary(options.files, options.output, options.size)
    print(
        f"{options.output}: {trained.size:,} pieces, fingerprint "
        f"{trained.fingerprint}. Use it with --config.data.vocabulary={options.output}"
    )


def data_prepare(options: argparse.Namespace) -> None:
    """Prepares a set of the table, or mines hard negatives by BM25."""
    from gecko_jax.data import mining, tasks

    table = {task.name: task for task in tasks.TASKS}
    (name, *others) = options.files
    if not others and name in table and not pathlib.Path(name).exists():
        _prepare_set(table[name], options)
        return
    if not options.output:
        raise ValueError(
            f"{name}: is no set of the table; to mine hard negatives for files, say "
            "where the triples go with --output=FILE"
        )

    summary = mining.mine_negatives(
        options.files, options.output, options.negatives, skip_top=options.skip_top
    )
    print(
        f"{options.output}: {summary.examples:,} examples, {summary.mined:,} negatives "
        f"mined. Train on them with --config.data.files={options.output}"
    )
    if summary.short:
        print(
            f"{summary.short:,} examples have fewer than {options.negatives}: no other "
            "passage shares a word with their query"
        )


def _prepare_set(task: Any, options: argparse.Namespace) -> None:
    from gecko_jax.data import prepare

    summary = prepare.prepare(
        task,
        options.prepared_dir,
        source=options.source,
        accepted_licences=tuple(options.accept_licence),
        tfds_data_dir=options.tfds_data_dir,
    )
    print(f"{summary.folder}: {summary.examples:,} examples; licence {task.licence}")
    for reason, count in sorted(summary.dropped.items(), key=lambda item: -item[1]):
        print(f"  left out {count:,}: {reason}")
    if task.mine and summary.without_negative:
        print(f"  {summary.without_negative:,} have no hard negative")


def evaluate(options: argparse.Namespace) -> None:
    """Judges a model on folders, or runs a config, and prints every dimension."""
    if options.config:
        _evaluate_suites(options)
        return
    if options.overrides:
        options.parser.error(f"{options.overrides[0]} needs a --config")
    if not options.folders:
        options.parser.error("name folders to judge on, or a --config")
    from gecko_jax import embedding, evaluation

    model = embedding.load(options.model)
    results = evaluation.evaluate(
        model,
        options.folders,
        dims=options.dims,
        task=options.task,
        precisions=options.precision,
        baselines=not options.no_baselines,
        untrained=options.untrained,
    )
    width = shutil.get_terminal_size((120, 24)).columns
    print(evaluation.format_table(results, max(width, 80)))
    if options.output:
        for path in evaluation.save(results, options.output):
            print(path)


def _evaluate_suites(options: argparse.Namespace) -> None:
    """Runs the suites of a config; raises at the end if a task did not run."""
    unused = {
        "folders": options.folders,
        "--dims": options.dims,
        "--task": options.task,
        "--untrained": options.untrained,
        "--no-baselines": options.no_baselines,
    }
    for name, value in unused.items():
        if value:
            options.parser.error(
                f"{name} does not go with --config, which has keys of its own, such as "
                "--config.folders and --config.dims"
            )
    if not options.output:
        options.parser.error("--config needs --output, the folder of the results")
    config = flags.load(options.config, options.overrides)
    from gecko_jax import config as config_lib

    config_lib.check_evaluation(config)
    from gecko_jax import embedding
    from gecko_jax.evaluation import scoreboard, suites

    model = embedding.load(options.model)
    name = pathlib.Path(options.model).resolve().name
    board = suites.run(model, config, options.output, name)
    print(scoreboard.format_board(board))
    for path in scoreboard.save(board, options.output):
        print(path)
    if board.failures:
        count = len({task.name for tasks in board.suites.values() for task in tasks})
        raise ValueError(
            f"{len(board.failures)} of {count} tasks did not run, as told above; the "
            "same command runs them and nothing else"
        )


def embed(options: argparse.Namespace) -> None:
    """Embeds a file of texts into a folder of shards."""
    from gecko_jax import embedding, quantization, vectors

    model = embedding.load(options.model)
    folder = vectors.embed_file(
        model,
        options.file,
        options.output,
        side=options.side,
        task=options.task,
        dim=options.dim,
        precision=options.precision,
    )
    settings = vectors.read_settings(folder)
    size = quantization.bytes_per_vector(options.precision, settings["dim"])
    print(
        f"{folder}: {settings['num_texts']:,} vectors of {settings['dim']} dims, "
        f"{options.precision}, {size:,} bytes each"
    )


def index(options: argparse.Namespace) -> None:
    """Builds an index from a folder of shards."""
    from gecko_jax import index as index_lib

    built = index_lib.from_embeddings(options.vectors)
    built.save(options.output)
    print(
        f"{options.output}: an index of {len(built):,} texts, {built.codes.precision}, "
        f"{built.codes.bytes_per_vector:,} bytes each"
    )


def search(options: argparse.Namespace) -> None:
    """Answers the queries given, or those on standard input."""
    from gecko_jax import embedding
    from gecko_jax import index as index_lib

    model = embedding.load(options.model)
    loaded = index_lib.load(options.index)
    loaded.check_model(model)

    def answer(queries: list[str]) -> None:
        task = options.task or embedding.DEFAULT_TASK
        vectors = model.encode_queries(queries, task, dim=loaded.dim)
        scores, ids = loaded.search(vectors, options.count)
        for row, query in enumerate(queries):
            hits = [
                {"id": i, "score": round(float(s), 4), "text": loaded.text(i)}
                for s, i in zip(scores[row], ids[row], strict=True)
            ]
            if options.json:
                print(json.dumps({"query": query, "hits": hits}, ensure_ascii=False))
            else:
                _print_hits(query, hits)
        sys.stdout.flush()

    if options.queries:
        answer(options.queries)
    else:
        # Compiled before the first question, whose answer then takes no longer.
        for text in ("short", "long " * model.files.query_length):
            model.encode_queries([text], dim=loaded.dim)
        _answer_lines(answer)


def import_(options: argparse.Namespace) -> None:
    """Turns a checkpoint of another library into a model folder."""
    from gecko_jax import model_folder, parameters, tensors
    from gecko_jax.convert import formats

    opened = formats.open_model(
        options.source,
        vocabulary=options.vocabulary,
        extra_ids=options.extra_ids,
        query_length=options.query_length,
        passage_length=options.passage_length,
    )
    written = model_folder.save_model(options.output, opened)
    config = written.encoder_config
    leaves = parameters.flatten(written.params).values()
    size = sum(tensors.num_values(leaf.shape) for leaf in leaves)
    print(
        f"{options.output}: {size / 1e6:,.1f}M parameters, {config.num_layers} layers, "
        f"{config.embedding_dim} dims, revision {written.revision}. Load it with "
        f"gecko_jax.load({options.output!r})"
    )


def export(options: argparse.Namespace) -> None:
    """Writes a trained model into a folder of its own, in the format asked for."""
    from gecko_jax import evaluation, model_folder
    from gecko_jax.convert import to_hub

    output = pathlib.Path(options.output)
    if options.push:
        to_hub.check(options.push)
    model_files = model_folder.load_model(options.model)
    _check_export(options, model_files.mrl_dims)
    if options.to == "sentence-transformers":
        from gecko_jax.convert import to_sentence_transformers

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
        from gecko_jax.convert import to_t5x

        to_t5x.save(output, model_files)
        use = f"t5x: {output / f'checkpoint_{model_files.step}'}"
    elif options.to == "onnx":
        from gecko_jax.convert import to_onnx

        to_onnx.save(output, model_files, dim=options.dim)
        use = f"onnxruntime.InferenceSession({str(output / to_onnx.MODEL)!r})"
    else:
        model_folder.save_model(output, model_files)
        use = f"gecko_jax.load({options.output!r})"
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(
        f"{output}: step {model_files.step} of {options.model}, {size / 1e6:,.1f} MB. "
        f"Load it with {use}"
    )
    if options.push:
        print(to_hub.push(output, options.push))


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
    if options.results and options.to != "sentence-transformers":
        raise ValueError(
            f"--results={options.results}: the format {options.to} has no model card; "
            "leave --results out, or use --to=sentence-transformers"
        )


def _is_first_process() -> bool:
    import jax

    return jax.process_index() == 0


def _answer_lines(answer: Callable[[list[str]], None]) -> None:
    """Answers each line of standard input; a bad one is told and passed over."""
    for line in _read_lines():
        try:
            answer([line])
        except ValueError as error:
            print(f"gecko search: {error}", file=sys.stderr)


def _read_lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401  (gives the prompt its editing and history)

    print("One query a line; an empty line or Ctrl-D ends.")
    try:
        while line := input("query> ").strip():
            yield line
    except EOFError:
        print()


def _print_hits(query: str, hits: list[dict[str, Any]]) -> None:
    width = max(shutil.get_terminal_size((100, 24)).columns, 60)
    print(f"\n{query}")
    for rank, hit in enumerate(hits, 1):
        head = f"{rank:>3}  {hit['score']:.3f}  {hit['id']}  "
        text = textwrap.shorten(hit["text"] or "", max(width - len(head), 20))
        print(f"{head}{text}".rstrip())


def _print_text(name: str, text: str, tokens: int | None = None) -> None:
    note = f" ({tokens} tokens)" if tokens is not None else ""
    body = textwrap.shorten(text, 400, placeholder=" ...")
    print(
        textwrap.fill(
            f"{name}{note}: {body}",
            width=88,
            initial_indent="  ",
            subsequent_indent="      ",
        )
    )
