import json
import struct

import pytest

from gecko_jax.plots import loss_curves, quality


def _size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def _run(folder, name, with_scores=True, dims=(64, 256)):
    path = folder / name / "metrics.jsonl"
    path.parent.mkdir()
    with path.open("w") as file:
        for step in range(1, 40):
            losses = {f"loss_{dim}": 3 / step for dim in dims}
            file.write(json.dumps({"step": step, "loss": 6 / step, **losses}) + "\n")
            if with_scores and step % 10 == 0:
                scores = {f"evaluation/ndcg_at_10/{dim}": step / 100 for dim in dims}
                file.write(json.dumps({"step": step, **scores}) + "\n")
        file.write('{"step": 40, "lo')  # A line that a killed process did not finish.
    return path


def test_training_is_drawn_run_by_run(tmp_path):
    runs = [_run(tmp_path, "prefinetune"), _run(tmp_path, "finetune")]
    two = loss_curves.plot_training(runs, tmp_path / "new" / "two.png")
    one = loss_curves.plot_training(runs[:1], tmp_path / "one.png")
    assert _size(two)[0] > 1.5 * _size(one)[0]
    plain = loss_curves.plot_training(
        [_run(tmp_path, "plain", with_scores=False, dims=())], tmp_path / "plain.png"
    )
    assert _size(plain)[1] < _size(one)[1]


def test_training_without_a_step_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for content in (None, '{"step": 1, "evaluation/ndcg_at_10/64": 0.1}\n'):
        if content:
            path.write_text(content)
        with pytest.raises(ValueError, match=r"metrics.jsonl: no logged step"):
            loss_curves.plot_training([path], tmp_path / "out.png")


def _row(system, dim, value, task="all", name="set", metric="ndcg_at_10"):
    return {
        "set": name,
        "system": system,
        "dim": dim,
        "task": task,
        "count": 3,
        "metrics": {metric: value},
    }


@pytest.mark.parametrize(
    "rows",
    [
        [_row("model", 64, 0.3), _row("model", 256, 0.4), _row("BM25", None, 0.5)],
        [_row("model", 256, 0.0)],
        [
            _row(system, dim, 0.3, task, name)
            for system, dim in (("model", 64), ("model", 256), ("BM25", None))
            for task in ("all", "docs", "code")
            for name in ("one", "two")
        ],
        [
            _row("model", 64, -0.1, metric="spearman"),
            _row("model", 128, 0.7, metric="spearman"),
        ],
    ],
    ids=["plain", "zero", "tasks", "similarity"],
)
def test_quality_is_drawn_for_every_kind_of_result(tmp_path, rows):
    path = quality.plot_quality({"rows": rows}, tmp_path / "quality.png")
    assert min(_size(path)) > 400


def test_other_models_get_a_line_and_bars_of_their_own(tmp_path):
    rows = [
        _row(system, dim, value, task)
        for system, dim, value in (
            ("model", 64, 0.3),
            ("model", 256, 0.4),
            ("mini", 64, 0.5),
            ("mini", 256, 0.6),
            ("BM25", None, 0.5),
        )
        for task in ("all", "docs", "code")
    ]
    alone = quality.plot_quality({"rows": rows}, tmp_path / "alone.png")
    about = {"beside": {"mini": "1a2b"}}
    beside = quality.plot_quality({"rows": rows, "about": about}, tmp_path / "both.png")
    assert _size(beside)[0] > _size(alone)[0]
    groups = quality._groups(rows, ["set"], ("model", "mini", "BM25"))
    assert groups["docs"] == {"model": 0.4, "mini": 0.6, "BM25": 0.5}


def test_quality_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no scores of a model"):
        quality.plot_quality({"rows": [_row("BM25", None, 0.5)]}, tmp_path / "out.png")


def test_labels_keep_their_distance_and_order():
    placed = quality._apart({"a": 0.5, "b": 0.49, "c": 0.1}, 0.05)
    assert placed == {"c": 0.1, "b": 0.49, "a": pytest.approx(0.54)}


@pytest.mark.parametrize(
    ("lines", "side"),
    [([], 1), ([0.35], -1), ([0.25], 1), ([0.35, 0.25], 1), ([0.45, 0.15], 1)],
)
def test_a_label_is_placed_away_from_lines(lines, side):
    assert quality._clear_side(0.3, lines, 0.1) == side


def test_labels_of_a_plot_touch_no_line(tmp_path, monkeypatch):
    drawn = {}

    def keep(figure, output):
        figure.draw_without_rendering()
        (axes, *_) = figure.axes
        drawn["labels"] = [
            label.get_window_extent()
            for label in axes.texts
            if label.get_weight() == "bold"
        ]
        drawn["lines"] = [
            axes.transData.transform((0, line.get_ydata()[0]))[1]
            for line in axes.lines
            if len({*line.get_ydata()}) == 1
        ]
        return output

    monkeypatch.setattr(quality.style, "save", keep)
    dims = zip((64, 128, 256), (0.309, 0.385, 0.426), strict=True)
    others = {"BM25": 0.607, "random bag, IDF weights": 0.361, "untrained": 0.089}
    rows = [_row("model", dim, value) for dim, value in dims]
    rows += [_row(name, None, value) for name, value in others.items()]
    quality.plot_quality({"rows": rows}, tmp_path / "q.png")
    assert (len(drawn["labels"]), len(drawn["lines"])) == (3, 3)
    for label in drawn["labels"]:
        for line in drawn["lines"]:
            assert not label.y0 < line < label.y1
