"""The pipeline: which stages there are, what decides each, and how a shard is made.

A `Pipeline` is one pass over a list of seed passages: all of them in `gecko fret run`,
those held out in `gecko fret calibrate`. Shard s of a stage needs shard s of the stages
before it, and retrieval all vectors; so workers that share the folder take whatever
shard is ready and nobody else holds.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

import gecko_jax.config
from gecko_jax.fret import records, retrieval, settings, stages
from gecko_jax.inference import ranking
from gecko_jax.io import progress, writing
from gecko_jax.llm import protocol, request_log
from gecko_jax.text import overlap

# Raised whenever what a stage writes for the same input changes.
CODE_VERSION = {
    "passages": 2,
    "generate": 2,
    "embed": 1,
    "retrieve": 1,
    "likelihood": 1,
    "relevance": 1,
    "fuse": 1,
}
_LLM_STAGES = ("generate", "likelihood", "relevance")
# Between two looks at shards that another worker holds.
_WAIT_SECONDS = 0.2


@dataclasses.dataclass
class Step:
    """A stage within a pipeline.

    Attributes:
        stage: Its folder.
        make: Returns the records of a shard; None for a stage of arrays.
        needs: Stages whose shard of the same number comes first.
        needs_all: A stage of which every shard comes first.
    """

    stage: records.Stage
    make: Callable[[int], list[stages.Record] | None]
    needs: tuple[records.Stage, ...] = ()
    needs_all: records.Stage | None = None


class Source:
    """What every pipeline of a run shares: passages, prompts, model, retriever.

    A context manager, which lets go of the model.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: pathlib.Path,
        stage: records.Stage,
        contamination: overlap.Contamination,
        model_facts: dict[str, Any],
        connect: Callable[[], protocol.LanguageModel],
    ):
        """Reads the finished passages; the model is asked for when it is needed."""
        self.config = config
        self.workdir = workdir
        self.stage = stage
        self.contamination = contamination
        self.prompts = settings.Prompts(config)
        self.model_facts = model_facts
        self._connect = connect
        self._model: protocol.LanguageModel | None = None
        self._gecko: Any = None
        self._retriever: ranking.Retriever | None = None
        done = stage.done()
        assert done is not None
        self.num_shards = done["shards"]
        found = [record for s in range(self.num_shards) for record in stage.read(s)]
        if [record["id"] for record in found] != list(range(len(found))):
            raise ValueError(
                f"{stage.folder}: its passages are not numbered from 0 on; a shard was "
                "changed: restore it, or begin again in another workdir"
            )
        self.store = stages.Passages(found)
        self.embed: records.Stage | None = None
        if config.retrieve.model:
            facts = {
                "code": CODE_VERSION["embed"],
                "passages": stage.hash,
                "model": self.gecko.revision,
                "dim": config.retrieve.dim,
            }
            self.embed = records.Stage(workdir, "embed", facts, ".npy")

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *unused: object) -> None:
        if self._model is not None:
            self._model.close()

    @property
    def model(self) -> protocol.LanguageModel:
        """The language model, connected and checked at the first use."""
        if self._model is None:
            self._model = self._connect()
        return self._model

    @property
    def gecko(self) -> Any:
        """The initial embedding model."""
        if self._gecko is None:
            from gecko_jax.inference import embedding

            self._gecko = embedding.load(self.config.retrieve.model)
        return self._gecko

    @property
    def retriever(self) -> ranking.Retriever:
        """Finds the candidates; built at the first use."""
        if self._retriever is None:
            if self.embed is None:
                self._retriever = ranking.Bm25Retriever(self.store.texts)
            else:
                paths = [self.embed.shard_path(s) for s in range(self.num_shards)]
                self._retriever = retrieval.GeckoRetriever(
                    self.gecko, retrieval.read_vectors(paths)
                )
        return self._retriever

    def make_vectors(self, shard: int) -> None:
        """Embeds the passages of a shard."""
        assert self.embed is not None
        rows = self.config.passages.shard_rows
        retrieval.write_vectors(
            self.embed.shard_path(shard),
            self.gecko,
            self.store.texts[shard * rows : (shard + 1) * rows],
            self.config.retrieve.dim,
        )


class Pipeline:
    """One pass of a list of seed passages through the stages.

    Attributes:
        source: What all pipelines share.
        shards: The seed passages of each shard.
        steps: The stages, in order.
        has_likelihood: Whether candidates are scored by QL.
        has_relevance: Whether candidates are scored by RC.
    """

    def __init__(
        self,
        source: Source,
        shards: Sequence[Sequence[int]],
        folder: str,
        facts: dict[str, Any],
        *,
        scores_all: bool = False,
    ):
        """Describes the stages; nothing is read or written yet.

        Args:
            source: What all pipelines share.
            shards: The seed passages of each shard.
            folder: Within the workdir; "" for the workdir itself.
            facts: Which seeds they are; part of the first stage's facts.
            scores_all: Scores by QL and RC even where one has no weight.
        """
        self.source = source
        self.shards = shards
        self._folder = folder
        config, prompts = source.config, source.prompts
        self.has_likelihood = bool(config.fuse.likelihood_weight) or (
            scores_all and not config.llm.chat and config.llm.scoring != "none"
        )
        self.has_relevance = bool(config.fuse.relevance_weight) or scores_all
        sampling = settings.sampling(config, prompts.generate)
        rules = settings.query_rules(config)
        self.generate = self._stage(
            "generate",
            passages=source.stage.hash,
            decontaminate=config.passages.decontaminate,
            prompt=prompts.generate.facts,
            model=source.model_facts,
            sampling=dataclasses.asdict(sampling),
            rules=dataclasses.asdict(rules),
            shots=config.generate.shots,
            seed=config.seed,
            **facts,
        )
        self.retrieve = self._stage(
            "retrieve",
            generate=self.generate.hash,
            retriever=source.embed.hash if source.embed else "bm25",
            num_candidates=config.retrieve.num_candidates,
        )
        self.likelihood = self._stage(
            "likelihood",
            retrieve=self.retrieve.hash,
            prompt=prompts.likelihood.facts,
            model=source.model_facts,
            generic_passage=config.likelihood.generic_passage,
        )
        before = self.likelihood if self.has_likelihood else self.retrieve
        self.relevance = self._stage(
            "relevance",
            after=before.hash,
            prompt=prompts.relevance.facts,
            model=source.model_facts,
        )
        judged = [self.likelihood] * self.has_likelihood
        judged += [self.relevance] * self.has_relevance
        self.fuse = self._stage(
            "fuse",
            after=[stage.hash for stage in judged],
            settings=dataclasses.asdict(settings.fusion_settings(config)),
            seed=config.seed,
        )
        self.steps = [Step(self.generate, self._generate)]
        if source.embed:
            self.steps.append(Step(source.embed, source.make_vectors))
        self.steps.append(
            Step(self.retrieve, self._retrieve, (self.generate,), source.embed)
        )
        if self.has_likelihood:
            self.steps.append(Step(self.likelihood, self._likelihood, (self.retrieve,)))
        if self.has_relevance:
            self.steps.append(Step(self.relevance, self._relevance, (before,)))
        self.steps.append(Step(self.fuse, self._fuse, (self.retrieve, *judged)))

    def run(self, until: str = "fuse", worker: tuple[int, int] = (0, 1)) -> None:
        """Makes every shard that is missing, up to a stage.

        Args:
            until: Name of the last stage.
            worker: (i, n) makes every n-th shard from the i-th on, and waits for the
                others only where a stage needs all of theirs; (0, 1) makes all that
                nobody else is making.

        Raises:
            ValueError: A stage was begun with other settings, or the model fails too
                often.
            requests.BudgetError: The limit is reached; finished shards stay.
        """
        names = [step.stage.name for step in self.steps]
        steps = self.steps[: names.index(until) + 1]
        for step in steps:
            step.stage.compare()
            step.stage.done()  # Raises where a shard was changed or lost since.
        # A model that cannot answer must not decide what the folders are made with.
        if any(
            step.stage.name in _LLM_STAGES and not self._has_all(step, worker)
            for step in steps
        ):
            _ = self.source.model
        for step in steps:
            step.stage.begin()
        if not self._folder:
            with writing.write_file(self.source.workdir / "config.json") as temporary:
                temporary.write_text(gecko_jax.config.to_json(self.source.config))
        while True:
            moved = False
            for step in steps:
                moved |= self._run_step(step, worker)
            if not self._is_missing(steps, worker):
                break
            if not moved:
                time.sleep(_WAIT_SECONDS)  # Others hold what is left, or come first.
        if self._is_missing(steps, (0, 1)):
            return
        for step in steps:
            if step.stage.done() is None:
                step.stage.finish(len(self._numbers(step, (0, 1))))

    def _is_missing(self, steps: Sequence[Step], worker: tuple[int, int]) -> bool:
        return not all(self._has_all(step, worker) for step in steps)

    def _has_all(self, step: Step, worker: tuple[int, int]) -> bool:
        return all(map(step.stage.has, self._numbers(step, worker)))

    def _numbers(self, step: Step, worker: tuple[int, int]) -> range:
        is_embed = step.stage is self.source.embed
        count = self.source.num_shards if is_embed else len(self.shards)
        return range(worker[0], count, worker[1])

    def _run_step(self, step: Step, worker: tuple[int, int]) -> bool:
        """Makes the shards of a stage that are ready; returns whether there was one."""
        numbers = self._numbers(step, worker)
        waiting = [shard for shard in numbers if not step.stage.has(shard)]
        if not waiting or not self._is_ready(step):
            return False
        moved = False
        title = step.stage.folder.relative_to(self.source.workdir).as_posix()
        finished = len(numbers) - len(waiting)
        bar = progress.Progress(title, len(numbers), finished)
        with bar:
            for shard in waiting:
                if not all(stage.has(shard) for stage in step.needs):
                    continue
                lock = f"{title.replace('/', '-')}-{shard:05}.lock"
                path = self.source.workdir / records.LOCKS / lock
                with records.try_lock(path) as got:
                    if got and not step.stage.has(shard):
                        self._make(step, shard)
                        moved = True
                    if got:
                        # Gone where another had opened it before we were done.
                        path.unlink(missing_ok=True)
                finished += 1
                bar.update(finished)
        return moved

    def _is_ready(self, step: Step) -> bool:
        stage = step.needs_all
        return stage is None or all(map(stage.has, range(self.source.num_shards)))

    def _make(self, step: Step, shard: int) -> None:
        name = step.stage.name
        if name not in _LLM_STAGES:
            made = step.make(shard)
        else:
            root = self.source.workdir / request_log.FOLDER / self._folder / name
            model = self.source.model
            with request_log.RequestLog(root / f"shard-{shard:05}.jsonl") as log:
                model.log = log
                made = step.make(shard)
        if made is None:
            return
        errors = [record for record in made if stages.is_error(record)]
        rate = self.source.config.run.max_error_rate
        if len(errors) > math.ceil(rate * len(made)):
            detail = errors[0].get("detail", "")
            raise ValueError(
                f"{step.stage.folder}, shard {shard}: {len(errors)} of {len(made)} "
                f"rows had no answer, such as {errors[0][records.DROPPED]} ({detail}); "
                f"more than run.max_error_rate={rate}. Answers are kept: mend the "
                "server and run the same command again"
            )
        step.stage.write(shard, made)

    def _stage(self, name: str, **facts: Any) -> records.Stage:
        return records.Stage(
            self.source.workdir / self._folder,
            name,
            {"code": CODE_VERSION[name], **facts},
            seeds=self.shards,
            num_passages=len(self.source.store),
        )

    def _generate(self, shard: int) -> list[stages.Record]:
        source, config = self.source, self.source.config
        return stages.generate(
            self.shards[shard],
            source.store,
            source.model,
            source.prompts.generate,
            settings.query_rules(config),
            settings.sampling(config, source.prompts.generate),
            source.contamination,
            shots=config.generate.shots,
            seed=config.seed,
        )

    def _retrieve(self, shard: int) -> list[stages.Record]:
        rows = stages.kept(self.generate.read(shard))
        count = self.source.config.retrieve.num_candidates
        return stages.retrieve(rows, self.source.retriever, count)

    def _likelihood(self, shard: int) -> list[stages.Record]:
        return stages.likelihood(
            stages.kept(self.retrieve.read(shard)),
            stages.by_id(self.generate.read(shard)),
            self.source.store,
            self.source.model,
            self.source.prompts.likelihood,
            self.source.config.likelihood.generic_passage,
        )

    def _relevance(self, shard: int) -> list[stages.Record]:
        rows = stages.kept(self.retrieve.read(shard))
        if self.has_likelihood:  # What has no likelihood is not paid for again.
            scored = stages.by_id(self.likelihood.read(shard))
            rows = [row for row in rows if row["id"] in scored]
        return stages.relevance(
            rows,
            stages.by_id(self.generate.read(shard)),
            self.source.store,
            self.source.model,
            self.source.prompts.relevance,
        )

    def _fuse(self, shard: int) -> list[stages.Record]:
        return stages.fuse(
            stages.kept(self.retrieve.read(shard)),
            stages.by_id(self.likelihood.read(shard)) if self.has_likelihood else {},
            stages.by_id(self.relevance.read(shard)) if self.has_relevance else {},
            list(self.source.prompts.relevance.labels.values()),
            settings.fusion_settings(self.source.config),
            seed=self.source.config.seed,
        )
