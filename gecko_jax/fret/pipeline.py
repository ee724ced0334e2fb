"""The pipeline: its stages, what decides their content, and how a shard is made.

A `Pipeline` is one pass over a list of seed passages: all of them in `gecko fret run`,
the held-out ones in `gecko fret calibrate`. Shard s of a stage needs shard s of the
stages before it, and retrieval needs all embeddings. Workers that share the folder take
any shard that is ready and not locked.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

import gecko_jax.config
from gecko_jax.fret import answers, records, relabelling, retrieval, settings, stages
from gecko_jax.inference import ranking
from gecko_jax.io import progress, writing
from gecko_jax.llm import protocol, request_log
from gecko_jax.text import overlap

# Raised whenever the records that a stage writes for equal inputs change.
CODE_VERSION = {"passages": 2, "pairs": 1, "generate": 2, "embed": 1, "retrieve": 1}
CODE_VERSION |= {"likelihood": 1, "relevance": 1, "fuse": 1}
_LLM_STAGES = ("generate", "likelihood", "relevance")

_ById = dict[int, stages.Record]


@dataclasses.dataclass
class Step:
    """A stage of a pipeline."""

    stage: records.Stage
    make: Callable[[int], list[stages.Record] | None]  # None: it wrote the shard
    count: int  # of shards
    needs: tuple[records.Stage, ...] = ()  # whose shard of the same number must exist
    needs_all: "Step | None" = None  # whose shards must all exist

    def missing(self, worker: tuple[int, int] = (0, 1)) -> list[int]:
        """Returns the unfinished shards of worker i of n."""
        shards = range(worker[0], self.count, worker[1])
        return [shard for shard in shards if not self.stage.has(shard)]


@dataclasses.dataclass(eq=False)
class Source(contextlib.AbstractContextManager["Source"]):
    """What all pipelines of a run share; on exit, closes the model if it was used."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    stage: records.Stage  # the finished passages
    contamination: overlap.Contamination  # texts of evaluation sets
    model_facts: dict[str, Any]  # what identifies the model
    connect: Callable[[], protocol.LanguageModel]  # opens the model
    pair_files: Sequence[pathlib.Path] = ()  # to relabel; else queries are generated

    def __post_init__(self):
        self.prompts = settings.Prompts(self.config)
        done = self.stage.done()
        assert done is not None
        self.num_shards = done["shards"]
        shards = map(self.stage.read, range(self.num_shards))
        passages = list(itertools.chain.from_iterable(shards))
        if [record["id"] for record in passages] != list(range(len(passages))):
            raise ValueError(
                f"{self.stage.folder}: its passages are not numbered from 0 on; a "
                "shard was changed: restore it, or begin again in another workdir"
            )
        self.store = stages.Passages(passages)
        self.embed: records.Stage | None = None
        if self.config.retrieve.model:
            facts = {"code": CODE_VERSION["embed"], "passages": self.stage.hash}
            facts |= {"model": self.gecko.revision, "dim": self.config.retrieve.dim}
            self.embed = records.Stage(self.workdir, "embed", facts, ".npy")

    def __exit__(self, *unused: object) -> None:
        if "model" in vars(self):
            self.model.close()

    @functools.cached_property
    def model(self) -> protocol.LanguageModel:
        """The language model, opened and checked."""
        return self.connect()

    @functools.cached_property
    def gecko(self) -> Any:
        """The embedding model of retrieval."""
        from gecko_jax.inference import embedding

        return embedding.load(self.config.retrieve.model)

    @functools.cached_property
    def retriever(self) -> ranking.Retriever:
        """The retriever of candidates."""
        if self.embed is None:
            return ranking.Bm25Retriever(self.store.texts)
        paths = [self.embed.shard_path(s) for s in range(self.num_shards)]
        return retrieval.GeckoRetriever(self.gecko, retrieval.read_vectors(paths))

    @functools.cached_property
    def pairs(self) -> list[stages.Record]:
        """The record of every line that is relabelled, dropped ones included."""
        return relabelling.read_pairs(self.pair_files, self.store, self.contamination)

    def generate(self, seeds: Sequence[int]) -> list[stages.Record]:
        """Generates a query for each of these seed passages."""
        return stages.generate(
            seeds,
            self.store,
            self.model,
            self.prompts.generate,
            settings.fill(answers.Rules, self.config.generate),
            settings.sampling(self.config, self.prompts.generate),
            self.contamination,
            shots=self.config.generate.shots,
            seed=self.config.seed,
        )


class Pipeline:
    """One pass of a list of seed passages, or of lines, through the stages."""

    def __init__(
        self,
        source: Source,
        shards: Sequence[Sequence[int]],  # numbers of each shard's passages or lines
        folder: str,  # of the stages, in the workdir
        facts: dict[str, Any],  # what identifies the seeds
        *,
        scores_all: bool = False,  # by QL and RC even without a weight
    ):
        self.source = source
        self.shards = shards
        self._folder = folder
        config, prompts = source.config, source.prompts
        self.has_likelihood = bool(config.fuse.likelihood_weight) or (
            scores_all and not config.llm.chat and config.llm.scoring != "none"
        )
        self.has_relevance = bool(config.fuse.relevance_weight) or scores_all
        if source.pair_files:
            self.queries = self._stage("pairs", passages=source.stage.hash, **facts)
        else:
            sampling = settings.sampling(config, prompts.generate)
            self.queries = self._stage(
                "generate",
                passages=source.stage.hash,
                decontaminate=config.passages.decontaminate,
                prompt=prompts.generate.facts,
                model=source.model_facts,
                sampling=dataclasses.asdict(sampling),
                rules=dataclasses.asdict(settings.fill(answers.Rules, config.generate)),
                shots=config.generate.shots,
                seed=config.seed,
                **facts,
            )
        self.retrieve = self._stage(
            "retrieve",
            generate=self.queries.hash,
            retriever=source.embed.hash if source.embed else "bm25",
            num_candidates=config.retrieve.num_candidates,
            **settings.agreement(config),
        )
        self.likelihood = self._stage(
            "likelihood",
            retrieve=self.retrieve.hash,
            prompt=prompts.likelihood.facts,
            model=source.model_facts,
            generic_passage=config.likelihood.generic_passage,
        )
        before = self.likelihood if self.has_likelihood else self.retrieve
        judge = {"prompt": prompts.relevance.facts, "model": source.model_facts}
        self.relevance = self._stage("relevance", after=before.hash, **judge)
        judged = [self.likelihood] * self.has_likelihood
        judged += [self.relevance] * self.has_relevance
        self.fuse = self._stage(
            "fuse",
            after=[stage.hash for stage in judged],
            settings=settings.fusion_facts(config),
            seed=config.seed,
            # Since then, a candidate above a seed positive is no negative.
            **({"code": 2} if config.fuse.positive == "seed" else {}),
        )
        num, embed, needs = len(shards), None, (self.queries, self.retrieve)
        self.steps = [Step(self.queries, self._queries, num)]
        if source.embed:
            embed = Step(source.embed, self._embed, source.num_shards)
            self.steps.append(embed)
        self.steps.append(Step(self.retrieve, self._retrieve, num, needs[:1], embed))
        if self.has_likelihood:
            self.steps.append(Step(self.likelihood, self._likelihood, num, needs[1:]))
        if self.has_relevance:
            self.steps.append(Step(self.relevance, self._relevance, num, (before,)))
        self.steps.append(Step(self.fuse, self._fuse, num, (*needs, *judged)))

    def done(self) -> dict[str, dict[str, Any] | None]:
        """Returns `records.Stage.done` of every stage, by name."""
        steps = [self.source.stage, *(step.stage for step in self.steps)]
        return {stage.name: stage.done() for stage in steps}

    def judged(self, shard: int) -> tuple[_ById, _ById]:
        """Returns the scores by QL and by RC, by id; empty where nothing is scored."""
        likelihoods = self.likelihood.read(shard) if self.has_likelihood else []
        relevances = self.relevance.read(shard) if self.has_relevance else []
        return stages.by_id(likelihoods), stages.by_id(relevances)

    def run(self, until: str = "fuse", worker: tuple[int, int] = (0, 1)) -> None:
        """Makes every missing shard, up to a stage.

        Worker (i, n) makes every n-th shard from the i-th on, and waits for the others
        only where a stage needs all of their shards; (0, 1) makes all shards that are
        not locked. Raises ValueError if a stage was begun with other settings, or the
        model fails too often, and BudgetError at the limit. Finished shards stay.
        """
        names = [step.stage.name for step in self.steps]
        steps = self.steps[: names.index(until) + 1]
        for step in steps:
            step.stage.compare()
            step.stage.done()  # Raises if a shard was changed or lost since.
        # A model that does not open must not leave its facts in the folders.
        if any(s.stage.name in _LLM_STAGES and s.missing(worker) for s in steps):
            _ = self.source.model
        for step in steps:
            step.stage.begin()
        if not self._folder:
            with writing.write_file(self.source.workdir / "config.json") as temporary:
                temporary.write_text(gecko_jax.config.to_json(self.source.config))
        while True:
            moved = [self._run_step(step, worker) for step in steps]
            if not any(step.missing(worker) for step in steps):
                break
            if not any(moved):
                time.sleep(0.2)  # Other workers hold the shards.
        if any(step.missing() for step in steps):
            return
        for step in steps:
            if step.stage.done() is None:
                step.stage.finish(step.count)

    def _run_step(self, step: Step, worker: tuple[int, int]) -> bool:
        """Makes the shards of a stage that are ready; returns whether any was."""
        missing = step.missing(worker)
        if not missing or (step.needs_all and step.needs_all.missing()):
            return False
        moved = False
        title = step.stage.folder.relative_to(self.source.workdir).as_posix()
        # Stages that call the model show rows, the others shards.
        is_slow = step.stage.name in _LLM_STAGES
        sizes = list(map(len, self.shards)) if is_slow else [1] * step.count
        total = sum(sizes[worker[0] : step.count : worker[1]])
        finished = total - sum(sizes[shard] for shard in missing)

        def report(share: float) -> None:
            bar.update(finished + int(share * sizes[shard]))

        with progress.Progress(title, total, finished) as bar:
            for shard in missing:
                if not all(stage.has(shard) for stage in step.needs):
                    continue
                lock = f"{title.replace('/', '-')}-{shard:05}.lock"
                path = self.source.workdir / records.LOCKS / lock
                with records.try_lock(path) as has_lock:
                    if has_lock and not step.stage.has(shard):
                        self._make(step, shard, report)
                        moved = True
                    if has_lock:
                        # Another worker may have removed the file before.
                        path.unlink(missing_ok=True)
                finished += sizes[shard]
                bar.update(finished)
        return moved

    def _make(self, step: Step, shard: int, report: Callable[[float], None]) -> None:
        name = step.stage.name
        if name in _LLM_STAGES:
            root = self.source.workdir / request_log.FOLDER / self._folder
            file = f"shard-{shard:05}.jsonl"
            # QL may have read the questions of RC, too.
            earlier = root / "likelihood" / file if name == "relevance" else None
            with request_log.RequestLog(root / name / file, earlier) as log:
                self.source.model.log, self.source.model.report = log, report
                rows = step.make(shard)
        else:
            rows = step.make(shard)
        if rows is None:
            return
        errors = [row for row in rows if stages.is_error(row)]
        rate = self.source.config.run.max_error_rate
        if len(errors) > math.ceil(rate * len(rows)):
            detail = errors[0].get("detail", "")
            raise ValueError(
                f"{step.stage.folder}, shard {shard}: {len(errors)} of {len(rows)} "
                f"rows had no answer: {errors[0][records.DROPPED]} ({detail}); "
                f"more than run.max_error_rate={rate}. Answers are kept: repair the "
                "server and run the same command again"
            )
        step.stage.write(shard, rows)

    def _stage(self, name: str, **facts: Any) -> records.Stage:
        return records.Stage(
            self.source.workdir / self._folder,
            name,
            {"code": CODE_VERSION[name], **facts},
            seeds=self.shards,
            num_passages=len(self.source.store),
        )

    def _embed(self, shard: int) -> None:
        source, rows = self.source, self.source.config.passages.shard_rows
        assert source.embed is not None
        path, dim = source.embed.shard_path(shard), source.config.retrieve.dim
        texts = source.store.texts[shard * rows : (shard + 1) * rows]
        retrieval.write_vectors(path, source.gecko, texts, dim)

    def _queries(self, shard: int) -> list[stages.Record]:
        if self.source.pair_files:
            return [self.source.pairs[number] for number in self.shards[shard]]
        return self.source.generate(self.shards[shard])

    def _retrieved(self, shard: int) -> tuple[list[stages.Record], _ById]:
        """Returns the records of `retrieve` that are kept, and the queries by id."""
        rows = stages.kept(self.retrieve.read(shard))
        return rows, stages.by_id(self.queries.read(shard))

    def _retrieve(self, shard: int) -> list[stages.Record]:
        config = self.source.config
        return stages.retrieve(
            stages.kept(self.queries.read(shard)),
            self.source.retriever,
            config.retrieve.num_candidates,
            max_seed_rank=config.retrieve.max_seed_rank,
            min_seed_cosine=config.retrieve.min_seed_cosine,
            scores_all=settings.needs_cosines(config),
        )

    def _likelihood(self, shard: int) -> list[stages.Record]:
        source, prompts = self.source, self.source.prompts
        is_same_text = prompts.likelihood.sha256 == prompts.relevance.sha256
        then = prompts.relevance if self.has_relevance and is_same_text else None
        return stages.likelihood(
            *self._retrieved(shard),
            source.store,
            source.model,
            prompts.likelihood,
            source.config.likelihood.generic_passage,
            then,
        )

    def _relevance(self, shard: int) -> list[stages.Record]:
        rows, queries = self._retrieved(shard)
        if self.has_likelihood:  # Rows without a likelihood are dropped anyway.
            scored = stages.by_id(self.likelihood.read(shard))
            rows = [row for row in rows if row["id"] in scored]
        source, prompt = self.source, self.source.prompts.relevance
        return stages.relevance(rows, queries, source.store, source.model, prompt)

    def _fuse(self, shard: int) -> list[stages.Record]:
        return stages.fuse(
            *self._retrieved(shard),
            *self.judged(shard),
            list(self.source.prompts.relevance.labels.values()),
            settings.fusion_settings(self.source.config),
            seed=self.source.config.seed,
        )
