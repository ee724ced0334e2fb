"""What each verb of `gecko` does: options in, calls into the package, results printed.

Results go to stdout, progress and notes to stderr.
"""

import argparse
import json
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from gecko_jax import flags


def train(options: argparse.Namespace) -> None:
    """Trains, or goes on with, the run of a workdir."""
    config = flags.load(options.config, options.overrides)
    from gecko_jax import config as config_lib
    from gecko_jax import train as training

    # A wrong key should be told before anything else can fail.
    config_lib.check(config)
    from gecko_jax import evaluation, plots

    evaluate = evaluation.build_callback(config, options.workdir)
    training.train(config, options.workdir, evaluate=evaluate)
    # The stages of a model in one picture: the run it started from, then its own.
    folders = (config.init.checkpoint or options.workdir, options.workdir)
    runs = [pathlib.Path(folder) / "metrics.jsonl" for folder in folders]
    runs = [run for run in dict.fromkeys(runs) if run.is_file()]
    if runs and _is_first_process():
        plots.plot_training(runs, pathlib.Path(options.workdir) / "training.png")
    print(f"{options.workdir}: load it with gecko_jax.load({options.workdir!r})")


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
    """Judges a model on folders and prints a table of every dimension."""
    from gecko_jax import embedding, evaluation

    model = embedding.load(options.model)
    results = evaluation.evaluate(
        model,
        options.folders,
        dims=options.dims,
        task=options.task,
        baselines=not options.no_baselines,
        untrained=options.untrained,
    )
    width = shutil.get_terminal_size((120, 24)).columns
    print(evaluation.format_table(results, max(width, 80)))
    if options.output:
        for path in evaluation.save(results, options.output):
            print(path)


def embed(options: argparse.Namespace) -> None:
    """Embeds a file of texts into a folder of shards."""
    from gecko_jax import embedding, vectors

    model = embedding.load(options.model)
    folder = vectors.embed_file(
        model,
        options.file,
        options.output,
        side=options.side,
        task=options.task,
        dim=options.dim,
    )
    settings = vectors.read_settings(folder)
    print(f"{folder}: {settings['num_texts']:,} vectors of {settings['dim']} dims")


def index(options: argparse.Namespace) -> None:
    """Builds an index from a folder of shards."""
    from gecko_jax import index as index_lib

    built = index_lib.from_embeddings(options.vectors)
    built.save(options.output)
    print(f"{options.output}: an index of {len(built):,} texts")


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


def export(options: argparse.Namespace) -> None:
    """Writes a trained model into a folder of its own."""
    from gecko_jax import checkpoints

    model_files = checkpoints.load_model(options.model)
    checkpoints.save_model(options.output, model_files)
    size = sum(
        file.stat().st_size
        for file in pathlib.Path(options.output).rglob("*")
        if file.is_file()
    )
    print(
        f"{options.output}: step {model_files.step} of {options.model}, "
        f"{size / 1e6:,.1f} MB. Load it with gecko_jax.load({options.output!r})"
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
