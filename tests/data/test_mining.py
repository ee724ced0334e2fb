"""Mining: hard negatives that are near, and never an answer."""

import gzip
import hashlib
import json

import pytest

from gecko_jax.data import (
    mining,
)


def mine(tmp_path, records, **options):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps(record) for record in records))
    summary = mining.mine_negatives([source], output, **options)
    return summary, [json.loads(line) for line in output.read_text().splitlines()]


def pair(query, positive, task="t", **fields):
    return {"task": task, "query": query, "positive": positive, **fields}


def test_mined_negatives_are_near_and_never_answers(tmp_path):
    summary, mined = mine(
        tmp_path,
        [
            pair("red apple", "apple trees bear red apple fruit", src="kept"),
            pair("red apple", "the red apple of discord"),  # Equal query, other answer.
            pair("green apple", "apple of green colour"),
            pair("apple list", "red  apple"),  # The first query's own text.
            pair("sea", "boats sail the sea"),
            pair("red apple", "red apple of another task", task="other"),
        ],
    )
    negatives = [record.get("negatives") for record in mined]
    assert negatives[0] == negatives[1] == ["apple of green colour"]
    assert negatives[4] is None  # Nothing else shares a word.
    assert negatives[5] is None  # Its task has no other passage.
    assert mined[0]["src"] == "kept"
    assert summary == mining.MiningSummary(examples=6, mined=4, short=2)


def test_mining_tops_up_and_keeps_titles(tmp_path):
    _, mined = mine(
        tmp_path,
        [
            pair("red apple", "a red apple", negative="pear"),
            pair("blue apple", "blue apple", title="Blue"),
            pair("apple", "some apple", negatives=["x", "y"]),
        ],
        num_negatives=2,
    )
    assert mined[0]["negatives"][0] == "pear"
    assert len(mined[0]["negatives"]) == 2
    assert "negative" not in mined[0]
    assert mined[2]["negatives"] == ["x", "y"]
    for record in mined:
        titles = record.get("negative_titles", [""] * len(record["negatives"]))
        for negative, title in zip(record["negatives"], titles, strict=True):
            assert title == ("Blue" if negative == "blue apple" else "")


def test_any_retriever_mines_by_task_and_passes_over_answers(tmp_path):
    asked, indexed = [], []

    class Backwards:
        """Ranks the passages last to first."""

        def __init__(self, passages, task):
            self._passages = passages
            indexed.append(task)

        def search(self, queries, tasks, k):
            asked.extend(zip(queries, tasks, strict=True))
            found = list(range(len(self._passages)))[::-1][:k]
            return [(found, [0.0] * len(found)) for _ in queries]

    records = [
        pair("red", "apple"),
        pair("blue", "sky", title="Above", task_description="own"),
        pair("other", "one", task="u"),
    ]
    summary, mined = mine(tmp_path, records, build=Backwards, num_negatives=2)
    assert [line.get("negatives") for line in mined] == [["sky"], ["apple"], None]
    assert mined[0]["negative_titles"] == ["Above"]
    assert asked == [("red", "t"), ("blue", "own"), ("other", "u")]
    assert indexed == ["t", "u"]
    assert summary == mining.MiningSummary(examples=3, mined=2, short=3)


def test_an_answer_on_any_line_of_any_task_is_no_negative(tmp_path):
    _, mined = mine(
        tmp_path,
        [
            # By the id, in another task.
            pair("lizard food", "crickets", query_id="1"),
            pair("worms as food", "mealworms are lizard food"),
            pair("food", "mealworms are lizard food", task="u", query_id="1"),
            # By the line in between: an id in common with one, the text with the other.
            pair("red apple", "apple a", task="v", query_id="2"),
            pair("green apple", "apple b", task="v", query_id="2"),
            pair("green apple", "apple c", task="v"),
            pair("pear", "apple d", task="v"),
        ],
        num_negatives=9,
    )
    negatives = [line.get("negatives") for line in mined]
    assert negatives[0] is None
    assert negatives[3:6] == [["apple d"]] * 3


def scored(score_of, depths=None):
    """A retriever of hand-made scores, times the factor that a query starts with."""

    class Scored:
        def __init__(self, passages, task):
            self._texts = [text for _, text in passages]

        def search(self, queries, tasks, k):
            if depths is not None:
                depths.append(k)
            rankings = []
            for query in queries:
                factor = float(query.split()[0])
                scores = [factor * score_of[text] for text in self._texts]
                order = sorted(range(len(scores)), key=lambda n: -scores[n])[:k]
                rankings.append((order, [scores[n] for n in order]))
            return rankings

    return Scored


def test_a_passage_nearly_as_similar_as_the_positive_is_no_negative(tmp_path):
    scores = {"best": 0.9, "near": 0.86, "below": 0.85, "far": 0.2, "rival": 0.95}
    records = [
        # 0.95 of 0.9 is 0.855: `rival` and `near` may be unmarked answers.
        pair("1 a", "best"),
        # Of a negative cosine, the limit is lower as well: -0.9 - 0.045.
        pair("-1 b", "best"),
        pair("1 c", "far", negatives=["near", "below", "far", "rival"]),
    ]
    settings = {"num_negatives": 9, "build": scored(scores), "retriever": "hand-made"}
    _, (first, second, _) = mine(tmp_path, records, **settings)
    assert first["negatives"] == ["rival", "near", "below", "far"]
    assert second["negatives"] == ["far", "below", "near", "rival"]
    settings["max_negative_share"] = 0.95
    _, (first, second, third) = mine(tmp_path, records, **settings)
    assert first["negatives"] == ["below", "far"]
    assert second["negatives"] == ["rival"]
    assert third == records[2]  # Its own negatives stay, and none ranks lower.
    note = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert note["max_negative_share"] == 0.95
    assert (note["retriever"], note["skip_top"], note["mined"]) == ("hand-made", 0, 3)
    output = (tmp_path / "out.jsonl").read_bytes()
    assert note["sha256"] == hashlib.sha256(output).hexdigest()
    _, (first, _, _) = mine(tmp_path, records, **settings, skip_top=3)
    assert first["negatives"] == ["far"]


def test_negatives_below_the_limit_are_found_however_deep_they_rank(tmp_path):
    near = {f"near {n}": 0.88 + n / 1e5 for n in range(600)}
    scores, depths = {"best": 0.9, "far": 0.2, **near}, []
    records = [pair("1 a", "best"), pair("1 b", "far")]
    records += [pair(f"1 {text}", text, negatives=["best"]) for text in near]
    settings = {"build": scored(scores, depths), "max_negative_share": 0.95}
    _, (first, second, *_) = mine(tmp_path, records, **settings)
    assert first["negatives"] == ["far"]
    assert "negatives" not in second  # Nothing ranks below its positive.
    assert depths[:3] == [64, 512, 4096]


def test_bm25_has_no_similarities_to_limit(tmp_path):
    with pytest.raises(ValueError, match=r"max_negative_share=0\.9.*BM25 only counts"):
        mine(tmp_path, [pair("a", "b")], max_negative_share=0.9)
    with pytest.raises(ValueError, match=r"max_negative_share=1\.0: must be in \[0, 1"):
        mine(tmp_path, [pair("a", "b")], build=scored({}), max_negative_share=1.0)


def test_a_bad_output_is_found_before_mining(tmp_path):
    def build(passages, task):
        raise AssertionError("searched")

    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(pair("a", "b")))
    with pytest.raises(ValueError, match="not a file"):
        mining.mine_negatives([source], tmp_path, build=build)


def test_mining_leaves_nothing_half_written(tmp_path):
    with pytest.raises(ValueError, match=r"in\.jsonl:2: no field 'query'"):
        mine(tmp_path, [pair("a", "b"), {"task": "t"}])
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    with pytest.raises(ValueError, match="no files: no examples"):
        mining.mine_negatives([], tmp_path / "x")


def test_a_packed_file_holds_the_same_lines_and_characters(tmp_path):
    source = tmp_path / "in.jsonl"
    lines = [pair("gecko é", "a gecko é"), pair("gecko", "one gecko é")]
    source.write_text("\n".join(map(json.dumps, lines)))
    plain, *packed = (tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.gz"))
    for path in (plain, *packed):
        mining.mine_negatives([source], path)
    assert "é" in plain.read_text()
    assert "negative_titles" not in json.loads(plain.read_text().splitlines()[0])
    first, second = (path.read_bytes() for path in packed)
    assert gzip.decompress(first) == plain.read_bytes()
    assert first == second  # No name and no time in it.


def test_mined_negatives_keep_the_ids_that_the_data_gives(tmp_path):
    given = pair("red apple", "a red apple", negatives=["pear"], negative_ids=["p"])
    others = [
        pair("blue apple", "blue apple", passage_id=7),
        pair("old apple", "old apple"),
    ]
    _, (first, second, _) = mine(tmp_path, [given, *others], num_negatives=3)
    assert first["negatives"] == ["pear", "blue apple", "old apple"]
    assert first["negative_ids"] == ["p", 7, None]
    assert "negative_ids" not in second


def test_lines_of_several_positives_and_of_scores_stay_whole(tmp_path):
    line = {"task": "t", "query": "apple", "positives": ["red apple", "green apple"]}
    line |= {"negatives": ["pear"], "scores": [2, 1, 0]}
    _, mined = mine(tmp_path, [line, pair("b", "apple pie")], num_negatives=3)
    assert [one["positive"] for one in mined] == [
        "red apple",
        "green apple",
        "apple pie",
    ]
    # Neither answer is a negative of the other; no judge has seen the new one.
    assert [one["negatives"] for one in mined[:2]] == [["pear", "apple pie"]] * 2
    assert [one["scores"] for one in mined[:2]] == [[2, 0, None], [1, 0, None]]


def test_files_without_a_line_are_refused(tmp_path):
    empty = tmp_path / "in.jsonl"
    empty.write_text("\n")
    for files, message in (([empty], r"in\.jsonl: no examples"), ([], "no files: no")):
        with pytest.raises(ValueError, match=message):
            mining.mine_negatives(files, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_negatives_are_found_in_scripts_without_spaces(tmp_path):
    source = tmp_path / "pairs.jsonl"
    pairs = [("壁虎吃什么", "大多数壁虎吃昆虫"), ("壁虎住哪里", "壁虎住在温暖的地方")]
    source.write_text(
        "".join(
            json.dumps({"task": "zh", "query": query, "positive": positive}) + "\n"
            for query, positive in pairs
        )
    )
    summary = mining.mine_negatives([source], tmp_path / "triples.jsonl")
    assert (summary.mined, summary.short) == (2, 0)
