"""Training metrics: means, rates, and the files of a killed run."""

import json

import numpy as np
import pytest

from gecko_jax.training import metrics


def step(loss, sums, counts):
    return {
        "loss": np.float32(loss),
        "task_loss_sum": np.array(sums, np.float32),
        "task_count": np.array(counts, np.float32),
    }


def batch(tokens, slots, examples):
    segments = np.zeros((1, slots), np.int32)
    segments[0, :tokens] = 1
    return {
        "example_mask": np.arange(4) < examples,
        "query_segment_ids": segments,
        "passage_segment_ids": segments,
    }


def test_a_window_has_means_over_steps_and_over_the_examples_of_each_task():
    window = metrics.Window(("a", "b", "unseen"))
    window.count(batch(tokens=6, slots=8, examples=4))
    window.count(batch(tokens=2, slots=8, examples=2))
    window.add(step(2.0, [6.0, 0.0, 0.0], [3, 0, 0]))
    window.add(step(4.0, [0.0, 8.0, 0.0], [0, 1, 0]))
    means = window.means()
    assert means["loss"] == 3.0
    assert means["loss/a"] == 2.0
    assert means["loss/b"] == 8.0
    assert "loss/unseen" not in means
    assert means["padding_share"] == 0.5
    speed = means["tokens_per_second"] / means["examples_per_second"]
    assert speed == pytest.approx(16 / 6)


def test_a_window_continues_in_another_process():
    windows = [metrics.Window(("a", "b")), metrics.Window(("a", "b"))]
    rng = np.random.default_rng(0)
    for number in range(7):
        tokens = int(rng.integers(1, 8))
        values = step(rng.standard_normal(), rng.standard_normal(2), [number, 0])
        for window in windows:
            window.count(batch(tokens=tokens, slots=8, examples=4))
            window.add(values)
        # A checkpoint stores the state as JSON.
        state = json.loads(json.dumps(windows[1].state()))
        windows[1] = metrics.Window(("a", "b"))
        windows[1].restore(state)
    uninterrupted, resumed = (window.means() for window in windows)
    for name in ("loss", "loss/a", "padding_share"):
        assert uninterrupted[name] == resumed[name]
    # Rates are those of this process, which has not counted a batch yet.
    assert resumed["tokens_per_second"] == 0
    windows[1].restore({})
    assert windows[1].means() == {}


def test_a_pause_does_not_change_speeds():
    window = metrics.Window(("a",))
    window.count(batch(tokens=8, slots=8, examples=4))
    window.add(step(1.0, [1.0], [1]))
    window.pause(-1000.0)
    assert window.means()["examples_per_second"] == pytest.approx(4 / 1000, rel=0.01)


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    writer = metrics.Writer(tmp_path, 0)
    for number in range(1, 5):
        writer.write(number, {"loss": 1.0 / number})
    writer.close()
    with (tmp_path / metrics.METRICS).open("a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a line
    writer = metrics.Writer(tmp_path, 2)
    writer.write(3, {"loss": 9.0})
    writer.close()
    lines = metrics.read(tmp_path / metrics.METRICS)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1] == {"step": 3, "loss": 9.0}
    assert [json.loads(line) for line in (tmp_path / metrics.METRICS).open()] == lines


def test_tensorboard_has_the_same_metrics(tmp_path):
    writer = metrics.Writer(tmp_path, 0)
    writer.write(7, {"loss": 0.5})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_other_processes_write_nothing(tmp_path):
    writer = metrics.Writer(tmp_path, 0, enabled=False)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_a_damaged_line_ends_the_log(tmp_path):
    for bad in (b"[1]", b'{"loss": 1}', b"\xff\xfe", b'{"step": 2'):
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(b'{"step": 1}\n' + bad + b"\n")
        assert metrics.read(path) == [{"step": 1}]


def test_the_shares_of_all_phases_sum_to_one(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    clock = metrics.Clock()
    now[0] = 1.0
    clock.enter("step")
    now[0] = 4.0
    with clock.within("evaluation"):
        now[0] = 6.0
    now[0] = 8.0
    shares = clock.shares()
    assert shares["time/init"] == 1 / 8
    assert shares["time/step"] == 5 / 8
    assert shares["time/evaluation"] == 2 / 8
    assert sum(shares.values()) == 1


def test_utilisation_does_not_count_padding(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    window = metrics.Window(
        ("a",),
        flops_per_token={"query": 3.0, "passage": 5.0},
        peak_flops_per_second=100.0,
    )
    window.count(
        {
            "example_mask": np.ones(2, bool),
            "query_segment_ids": np.array([[1, 1, 0], [1, 0, 0]]),
            "passage_segment_ids": np.array([[1, 2, 0], [1, 1, 1]]),
        }
    )
    window.add({"loss": 1.0, "task_loss_sum": [2.0], "task_count": [2.0]})
    now[0] = 2.0
    # Three query tokens and five passage tokens in two seconds.
    utilisation = window.means()["model_flops_utilisation"]
    assert utilisation == (3 * 3.0 + 5 * 5.0) / 2 / 100


def test_a_full_disk_names_the_file_and_closes(tmp_path, monkeypatch):
    writer = metrics.Writer(tmp_path, 0)
    writer._file.close()
    writer._file = open("/dev/full", "a")  # noqa: PTH123, SIM115
    with pytest.raises(
        OSError, match=r"/dev/full: the metrics of step 1 .*free disk space"
    ):
        writer.write(1, {"loss": 1.0})
    writer.close()
