import contextlib
import io

import pytest
from absl import logging

from gecko_jax.io import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines(monkeypatch):
    seen = []
    monkeypatch.setattr(logging, "info", lambda form, *args: seen.append(form % args))
    return seen


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_track_yields_everything_and_logs_share_rate_and_time_left(clock, lines):
    seen = []
    for item in progress.track(range(8), "Encoding"):
        seen.append(item)
        clock[0] += 6.0
    assert seen == list(range(8))
    # Every 10 seconds or so, then once at the end.
    assert lines[0] == "Encoding: 2/8 (25%), 6.0 s each, 0:36 left"
    assert lines[-1] == "Encoding: 8/8 (100%), 6.0 s each, took 0:48"
    assert len(lines) == 4


def test_steps_of_an_earlier_run_do_not_count_in_the_rate(clock, lines):
    with progress.Progress("Training", total=10, start=6) as bar:
        for step in range(7, 11):
            clock[0] += 6.0
            bar.update(step)
    assert lines == [
        "Training: 8/10 (80%), 6.0 s each, 0:12 left",
        "Training: 10/10 (100%), 6.0 s each, took 0:24",
    ]


def test_update_shows_the_latest_text(clock, lines):
    with progress.Progress("Training", total=1_000) as bar:
        clock[0] += 5.0
        bar.update(1, text="loss 9.99")
        clock[0] += 5.0
        bar.update(500, text="loss 1.23")
        bar.update(501)
    assert lines == [
        "Training: 500/1,000 (50%), 99.8/s, 0:05 left, loss 1.23",
        "Training: 501/1,000 (50%), 100.0/s, 0:05 left, loss 1.23",
    ]


def test_skipped_steps_do_not_count_in_the_rate(clock, lines):
    with progress.Progress("Embedding", total=100) as bar:
        bar.skip(80)
        clock[0] += 10.0
        bar.update(90)
    assert lines[0] == "Embedding: 90/100 (90%), 1.0/s, 0:10 left"


def test_time_before_the_first_update_does_not_count_for_the_time_left(clock, lines):
    with progress.Progress("Training", total=11) as bar:
        clock[0] += 40.0  # Compiling.
        bar.update(1)
        clock[0] += 10.0
        bar.update(6)
        clock[0] += 10.0
        bar.update(11)
    assert lines == [
        "Training: 1/11 (9%)",
        "Training: 6/11 (55%), 2.0 s each, 0:10 left",
        "Training: 11/11 (100%), 5.5 s each, took 1:00",
    ]


def test_steps_skipped_after_an_update_do_not_count_in_the_rate(clock, lines):
    with progress.Progress("Embedding", total=100) as bar:
        bar.update(10)
        bar.skip(80)
        clock[0] += 10.0
        bar.update(90)
    assert lines[0] == "Embedding: 90/100 (90%), 1.0/s, 0:10 left"


def test_without_a_length_there_is_no_share(clock, lines):
    list(progress.track((item for item in "abc"), "Reading"))
    assert lines == ["Reading: 3"]


def test_disabled_is_silent(clock, lines):
    with progress.Progress("Training", 10, enabled=False) as bar:
        bar.update(10)
    assert lines == []


def test_close_twice_logs_once(clock, lines):
    bar = progress.Progress("Training", 3)
    bar.update(3)
    bar.close()
    bar.close()
    assert len(lines) == 1


def test_bars_nest_on_a_terminal_and_end_after_an_error(monkeypatch, lines):
    terminal = _Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)

    def fail():
        with progress.Progress("Outer", total=4) as outer:
            outer.update(1, text="loss 1.23")
            assert list(progress.track("ab", "Inner")) == ["a", "b"]
            outer.update(2)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    shown = terminal.getvalue()
    assert "Outer" in shown
    assert "loss 1.23" in shown
    assert lines == []
    assert progress._display is None


def test_hours_are_written_out():
    assert progress._clock(3_725.2) == "1:02:05"
    assert progress._clock(64.6) == "1:05"


def test_a_bar_needs_no_error_output(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    with contextlib.closing(progress.track("ab", "Reading")) as items:
        assert list(items) == ["a", "b"]
