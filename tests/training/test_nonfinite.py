"""Steps with a non-finite loss or gradient are skipped and counted, or end the run."""

import pathlib

import numpy as np
import pytest

from gecko_jax.training import nonfinite


def _values(loss=1.0, grad_norm=1.0, sums=(1.0, 0.0, 2.0)):
    return {
        "loss": loss,
        "grad_norm": grad_norm,
        "task_loss_sum": np.array(sums),
        "task_count": np.array([1.0, 0.0, 1.0]),
    }


def _guard(max_skipped):
    return nonfinite.Guard(max_skipped, ("qa", "none", "sts"), pathlib.Path("run"))


def test_none_may_be_skipped_by_default():
    guard = _guard(0)
    assert guard.is_finite(1, _values())
    with pytest.raises(FloatingPointError, match=r"step 2: .* in task sts; the update"):
        guard.is_finite(2, _values(np.nan, sums=(1.0, 0.0, np.nan)))


def test_up_to_the_allowed_number_in_a_row_are_skipped_and_counted(caplog):
    guard = _guard(2)
    for step, loss in enumerate((np.inf, np.nan, 1.0, np.inf, np.inf)):
        assert guard.is_finite(step, _values(loss)) == (loss == 1.0)
    assert guard.total == 4
    assert "not finite" in caplog.text
    with pytest.raises(FloatingPointError, match=r"train\.max_skipped_steps"):
        guard.is_finite(5, _values(np.inf))


def test_a_gradient_that_is_not_finite_counts_too():
    with pytest.raises(FloatingPointError, match=r"in the gradient.*tasks qa, sts\)"):
        _guard(0).is_finite(1, _values(grad_norm=np.inf))


def test_a_resumed_run_continues_counting():
    guard, resumed = _guard(1), _guard(1)
    assert not guard.is_finite(1, _values(np.nan))
    resumed.restore(guard.state())
    assert resumed.total == 1
    with pytest.raises(FloatingPointError):
        resumed.is_finite(2, _values(np.nan))
    resumed.restore({})
    assert resumed.total == 0
