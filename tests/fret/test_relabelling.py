"""Existing pairs, judged anew."""

import argparse
import json

import fake_llm
import fret_runs
import numpy as np
import pytest

from gecko_jax.cli import entry, fret_command
from gecko_jax.data import jsonl
from gecko_jax.fret import fusion, measure, passages, pipeline, runs, settings


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return fret_runs.write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def made(pairs):
    """The summary of a run with all that a line may hold."""
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(
            pairs,
            fake.url,
            *("retrieve.num_candidates=6", "fuse.num_negatives=2"),
            *("export.candidates=True", "export.scores=relevance"),
        )
        return runs.run(config, pairs.parent / "made")


def read(path):
    return [json.loads(line) for line in path.open()]


def records(workdir, stage):
    rows = [
        row for path in sorted((workdir / stage).glob("*.jsonl")) for row in read(path)
    ]
    return {row["id"]: row for row in rows}


def test_wrong_labels_are_found_and_lines_keep_the_rest(pairs, made):
    given, lines = read(pairs), read(made.output)
    assert len(lines) == len(given) == 17
    wrong = [n for n in range(17) if n % 6 == 0]
    assert [n for n, line in enumerate(lines) if line["moved"]] == wrong
    assert made.stages["export"]["moved"] == 3
    rows, judged = records(made.output.parents[1], "pairs"), []
    for number, row in records(made.output.parents[1], "retrieve").items():
        fused = records(made.output.parents[1], "fuse")[number]["fused"]
        scores = dict(zip(row["candidates"], fused, strict=True))
        own = scores[row["seed"]]
        judged += [scores[passage] > own for passage in rows[number]["negatives"]]
    assert made.stages["export"]["false_negatives"] == sum(judged) >= 3
    for before, after in zip(given, lines, strict=True):
        for name in ("task", "query", "query_id", "level"):
            assert after[name] == before[name]
        if not after["moved"]:
            for name in ("positive", "passage_id", "src", "licence"):
                assert after[name] == before[name]
            continue
        assert after["positive"] == before["negatives"][0]
        assert after["passage_id"] == before["negative_ids"][0]
        # What the line says whose positive this passage is; of a negative, nothing is
        # known.
        known = {line["passage_id"]: line for line in reversed(given)}
        known = known.get(after["passage_id"], {})
        assert after.get("src") == known.get("src")
        assert after.get("licence") == known.get("licence")
        assert after["seed_source_id"] == before["passage_id"]
        assert after["seed_licence"] == "CC0-1.0"
    assert len(list(jsonl.read_pairs(made.output))) == 17


def test_no_answer_of_a_line_is_a_negative(pairs, made):
    for before, after in zip(read(pairs), read(made.output), strict=True):
        assert len(after["negatives"]) == 2
        assert not {before["positive"], after["positive"]} & {*after["negatives"]}


def test_the_own_positive_and_negatives_are_candidates(pairs, made):
    workdir = pairs.parent / "made"
    queries, found = records(workdir, "pairs"), records(workdir, "retrieve")
    assert len(found) == 17
    for number, row in found.items():
        own = {queries[number]["positive"], *queries[number]["negatives"]}
        assert own <= {*row["candidates"]}
        assert len(row["candidates"]) <= 6
        assert row["seed"] == queries[number]["positive"]


def test_the_scores_are_those_of_the_stages(pairs, made):
    workdir = pairs.parent / "made"
    texts = {row["id"]: row["text"] for row in records(workdir, "passages").values()}
    likelihoods = records(workdir, "likelihood")
    relevances, fused = records(workdir, "relevance"), records(workdir, "fuse")
    for number, line in enumerate(read(made.output)):
        row = records(workdir, "retrieve")[number]
        scored = {}
        for place, (passage, one) in enumerate(
            zip(row["candidates"], line["candidates"], strict=True)
        ):
            assert one["text"] == texts[passage]
            log_probs = likelihoods[number]["log_probs"]
            assert one["ql"] == pytest.approx(log_probs[place], abs=1e-4)
            perfect = relevances[number]["label_log_probs"][place][0]
            assert one["rc"] == pytest.approx(perfect, abs=1e-4)
            assert one["rrf"] == pytest.approx(fused[number]["fused"][place], abs=1e-4)
            scored[one["text"]] = one["rc"]
        parts = {one["text"]: one["part"] for one in line["candidates"]}
        assert parts[line["positive"]] == "positive"
        assert {parts[text] for text in line["negatives"]} == {"negative"}
        chosen = [line["positive"], *line["negatives"]]
        assert line["scores"] == [scored[text] for text in chosen]


def test_what_ranks_nearly_as_high_is_a_further_positive(pairs, tmp_path):
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(
            pairs, fake.url, "fuse.positive=seed", "fuse.near=positive"
        )
        summary = runs.run(config, tmp_path / "run")
    lines = read(summary.output)
    # Of each wrong line, the answer is judged above the positive that stays.
    assert summary.stages["export"]["moved"] == 0
    assert summary.stages["export"]["further_positives"] == len(lines) - 17 > 0
    answers = {line["query_id"]: [] for line in lines}
    for line in lines:
        answers[line["query_id"]].append(line["positive"])
    for line in read(pairs):
        assert answers[line["query_id"]][0] == line["positive"]
    assert read(pairs)[0]["negatives"][0] in answers["q0"]
    for line in lines:
        assert not {*answers[line["query_id"]]} & {*line.get("negatives", ())}


def test_lines_that_cannot_be_judged_are_counted(tmp_path):
    path = fret_runs.write_pairs(tmp_path)
    lines = read(path)
    lines += [lines[0], lines[1] | {"positive": "word " * 50, "passage_id": "long"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(path, fake.url, "passages.max_characters=200")
        done = runs.run(config, tmp_path / "run").stages
    assert done["pairs"]["dropped"] == {"duplicate": 1, "no_passage": 1}
    assert done["export"]["records"] == 17


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "a", "positive": "b"}', "no field 'task'"),
        ('{"task": "t", "query": " ", "positive": "b"}', "field 'query' is empty"),
        ('{"task": "t", "query": "a", "positive": 3}', "'positive' is a number"),
        ('{"task": "t", "query": "a", "positive": "b", "negatives": "c"}', "be a list"),
        ('{"task": "t", "query": "a"', "not JSON"),
    ],
)
def test_a_wrong_line_is_refused_by_its_place(tmp_path, line, message):
    path = fret_runs.write_pairs(tmp_path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"pairs\.jsonl:18: .*{message}"):
        runs.run(fret_runs.load(path), tmp_path / "run")


def test_verbs_and_keys_must_fit_each_other(pairs, tmp_path, capsys):
    options = [f"--config={fret_runs.ROOT / 'configs/fret.py'}", "--workdir=x"]
    options += ["--config.llm.model=m"]
    for verb, file, message in (
        ("run", str(pairs), "use `gecko fret relabel`"),
        ("relabel", "", "name a file or more"),
    ):
        key = [f"--config.relabel.files={file}"] * bool(file)
        assert entry.main(["fret", verb, *options, *key]) != 0
        assert message in capsys.readouterr().err
    for override, message in (
        ("fuse.max_negative_share=0.95", "BM25 has no cosines"),
        ("retrieve.min_seed_cosine=0.3", "BM25 has no cosines"),
        ("export.scores=likelihood", "set fuse.likelihood_weight above 0"),
    ):
        config = fret_runs.load(
            pairs, "http://a", override, "fuse.likelihood_weight=0.0"
        )
        with pytest.raises(ValueError, match=message):
            settings.check(config)
    with pytest.raises(ValueError, match="only lines that are relabelled have neg"):
        settings.check(fret_runs.load("x", "http://a", "fuse.negative=given"))


def test_the_lines_of_a_limit_are_drawn_and_planned(pairs, tmp_path):
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(
            pairs, fake.url, "relabel.limit=7", "calibrate.num_seeds=1"
        )
        plan = measure.plan(config, tmp_path / "run", 2)
        found = measure.calibrate(config, tmp_path / "run")
        summary = runs.run(config, tmp_path / "run")
    chosen = [line["level"] for line in read(summary.output)]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 7
    assert chosen != list(range(7))
    # Passages of all lines are candidates.
    assert summary.stages["passages"]["kept"] == 17
    sent = {n: done["usage"].get("requests") for n, done in summary.stages.items()}
    assert {kind.name: kind.requests for kind in plan.kinds} == {
        name: sent[name] for name in ("likelihood", "relevance")
    }
    assert found.seeds == 1


def test_the_plan_of_lines_reports_no_written_queries(monkeypatch, capsys):
    result = measure.Plan(passages=7, kept=1.0, kinds=(), cost=0.0, hours=0.0, sample=2)
    monkeypatch.setattr(measure, "plan", lambda *_: result)
    for argument, size in (
        ("local,relabel", "7 lines (2"),
        ("local", "7 passages; 100% of the sample gave a query (2"),
    ):
        config = f"{fret_runs.ROOT / 'configs/fret.py'}:{argument}"
        options = argparse.Namespace(config=config, overrides=[], workdir="", sample=1)
        fret_command.plan(options)
        assert capsys.readouterr().out.startswith(f"{size} requests sent)\n")


def test_seeds_that_rank_or_score_too_low_are_not_judged(
    pairs, tmp_path, tiny_gecko, monkeypatch
):
    monkeypatch.setattr(pipeline.Source, "gecko", property(lambda self: tiny_gecko))
    overrides = ["retrieve.model=tiny", "retrieve.dim=8"]
    found = {}

    def make(name, override):
        config = fret_runs.load(pairs, fake.url, *overrides, override)
        runs.run(config, tmp_path / name, until="fuse")
        found[name] = records(tmp_path / name, "retrieve")

    with fake_llm.FakeServer() as fake:
        make("all", "fuse.max_negative_share=0.95")
        own = [row["candidates"].index(row["seed"]) for row in found["all"].values()]
        rows = zip(found["all"].values(), own, strict=True)
        least = float(np.median([row["scores"][place] for row, place in rows])) + 1e-4
        make("rank", "retrieve.max_seed_rank=2")
        make("cosine", f"retrieve.min_seed_cosine={least}")
    queries = records(tmp_path / "all", "pairs")
    texts = [row["text"] for row in records(tmp_path / "all", "passages").values()]
    vectors = tiny_gecko.encode_passages(texts, dim=8)
    dropped = {"rank": 0, "cosine": 0}
    for number, row in found["all"].items():
        query = queries[number]
        encoded = tiny_gecko.encode_queries([query["query"]], query["task"], dim=8)
        cosines = vectors @ encoded[0]
        expected = [cosines[passage] for passage in row["candidates"]]
        np.testing.assert_allclose(row["scores"], expected, atol=2e-6)
        rank = 1 + int((cosines > cosines[row["seed"]]).sum())
        for name, fails in (
            ("rank", rank > 2),
            ("cosine", cosines[row["seed"]] < least),
        ):
            assert found[name][number].get("dropped") == (
                f"low_{name}" if fails else None
            )
            dropped[name] += fails
    assert 0 < dropped["rank"] < 17
    assert 0 < dropped["cosine"] < 17
    for number, fused in records(tmp_path / "all", "fuse").items():
        row = found["all"][number]
        scores = dict(zip(row["candidates"], row["scores"], strict=True))
        if fused["negative"] is not None:
            positive = scores[fused["positive"]]
            assert scores[fused["negative"]] < positive - 0.05 * abs(positive)


def choose(fused, position=0, **changes):
    values = {"k": 0.0, "likelihood_weight": 1.0, "relevance_weight": 1.0}
    values |= {"relevance": "log_prob", "positive": "relabelled"}
    values |= {"negative": "lowest", "min_information": 0.0}
    names = fusion.Settings.__dataclass_fields__
    chosen = fusion.Settings(
        **values | {n: v for n, v in changes.items() if n in names}
    )
    rest = {name: value for name, value in changes.items() if name not in names}
    rng = np.random.default_rng(0)
    return fusion.choose(np.array(fused), position, chosen, rng, **rest)


def test_no_candidate_near_the_positive_is_a_negative():
    fused = [1.5, 1.5, 0.9, 0.4]
    assert choose(fused).negatives == [3]
    assert choose(fused, num_negatives=9).negatives == [3, 2, 1]
    near = choose(fused, num_negatives=9, margin=0.01)
    assert (near.others, near.negatives) == ([], [3, 2])
    near = choose(fused, num_negatives=9, margin=0.5, near="positive")
    assert (near.others, near.negatives) == ([1, 2], [3])
    seed = choose(fused, 2, positive="seed", num_negatives=9)
    assert (seed.positive, seed.negatives) == (2, [3])
    assert choose(fused, 3, positive="seed").negatives == []


def test_given_negatives_above_the_own_positive_are_false():
    fused = [0.5, 1.5, 0.9, 0.4]
    found = choose(fused, negative="given", given=[2, 3], answers=[0])
    assert (found.positive, found.negatives) == (1, [3])
    assert found.false_negatives == [2]
    assert choose(fused, given=[2, 3], answers=[0, 3]).negatives == []


def test_a_negative_has_less_than_the_share_of_the_positives_similarity():
    fused, share = (
        [2.0, 0.4, 0.3, 0.6],
        {"max_negative_share": 0.95, "num_negatives": 9},
    )
    found = choose(fused, similarities=[0.8, 0.77, 0.75, None], **share)
    assert found.negatives == [2, 3]
    # A share of a negative number would allow more than the positive has.
    found = choose(fused, similarities=[-0.8, -0.81, -0.85, 0.0], **share)
    assert found.negatives == [2]
    assert choose(fused, similarities=[None, 0.1, 0.1, 0.1], **share).negatives == []


def test_passages_of_pairs_may_be_short_and_alike():
    rules = passages.Rules(5, 1000, 0.5, 1)
    text = "one two three four five six seven eight nine ten eleven twelve"
    of_pairs = [{"title": "", "text": one} for one in ("ab", text, text + " more")]
    from gecko_jax.text import overlap

    kept, dropped = passages.read([], rules, overlap.Contamination(), of_pairs)
    assert [one["text"] for one in kept] == ["ab", text, text + " more"]
    assert dropped == {}
