import json

import pytest

from gecko_jax.evaluation import scoreboard

RETRIEVAL = [
    scoreboard.Task(f"r{n}", "Retrieval", "ndcg_at_10", {256: n / 10, 768: n / 5})
    for n in (1, 2, 3)
]
STS = [scoreboard.Task("s", "STS", "cosine_spearman", {256: 0.5, 768: 0.7})]
GONE = [scoreboard.Task("gone", "STS", "cosine_spearman", {})]


def _board(suites, failures=None):
    return scoreboard.Board({"revision": "r"}, (256, 768), suites, failures or {})


def test_means_are_over_tasks_and_over_types():
    means = scoreboard.means(RETRIEVAL + STS, 768)
    assert means == {
        "Retrieval": (pytest.approx(40), 3),
        "STS": (pytest.approx(70), 1),
        "all tasks": (pytest.approx((20 + 40 + 60 + 70) / 4), 4),
        "the types": (pytest.approx(55), 4),
    }
    means = scoreboard.means(RETRIEVAL + GONE, 256)
    assert means["STS"] == (None, 0)
    assert means["all tasks"] == (pytest.approx(20), 3)


def test_published_scores_appear_only_under_their_own_suite():
    suites = {"MTEB(eng, v1)": RETRIEVAL + STS, "MTEB(eng, v2)": RETRIEVAL + STS}
    table = scoreboard.format_board(_board(suites))
    first, _, second = table.partition("MTEB(eng, v2)")
    for score in ("66.31", "64.37", "62.64", "58.42", "55.70", "52.44", "53.16"):
        assert score in first
        assert score not in second
    assert "66.38" in second
    assert "66.38" not in first
    assert "…" not in table
    saved = _board(suites).to_dict()["suites"]
    for name, suite in saved.items():
        assert {row["suite"] for row in suite["published"]} == {name}


def test_a_mean_over_part_of_a_suite_shows_the_number_of_tasks():
    table = scoreboard.format_board(_board({"NanoBEIR": RETRIEVAL}))
    assert "40.00" in table
    assert "40.00 3/" not in table
    table = scoreboard.format_board(_board({"NanoBEIR": RETRIEVAL + GONE}))
    assert "40.00 3/4" in table


def test_other_tasks_have_a_line_each(tmp_path):
    board = _board({"local sets": RETRIEVAL + GONE}, {"gone": "no network"})
    table = scoreboard.format_board(board)
    assert "r3" in table
    assert "60.00" in table
    assert "did not run (1):\n  gone: no network" in table
    paths = scoreboard.save(board, tmp_path)
    assert [path.name for path in paths] == ["results.json", "table.txt"]
    saved = json.loads(paths[0].read_text())
    assert saved["failures"] == {"gone": "no network"}
    assert saved["suites"]["local sets"]["num_scored"] == 3
    assert saved["suites"]["local sets"]["means"][1]["all tasks"] == pytest.approx(40)
    assert "r3" in paths[1].read_text()
