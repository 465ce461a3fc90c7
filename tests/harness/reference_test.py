"""The reference policy: when the policy takes its place, and that a resumed run has the same one."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from harness.cli import UsageError
from harness.reference import Reference


def params(value: float) -> dict:
    return {"w": jnp.full(3, value)}


def test_a_stretch_that_does_not_rise_makes_the_policy_the_reference(tmp_path):
    """Means of stretches of two steps: 0.2, 0.4 (rises), 0.4 (flat), 0.1 (the first of its kind), 0.3 (rises)."""
    reference = Reference(params(0), tmp_path / "reference")
    steps = []
    for step, reward in enumerate([0.1, 0.3, 0.4, 0.4, 0.5, 0.3, 0.1, 0.1, 0.0, 0.6], 1):
        reference.note(step, reward, params(step), step % 2 == 0)
        steps.append(reference.step)
    assert steps == [0, 0, 0, 0, 0, 6, 6, 6, 6, 6]
    np.testing.assert_array_equal(reference.params["w"], 6)


def test_a_policy_that_is_not_finite_is_never_kept(tmp_path):
    reference = Reference(params(0), tmp_path / "reference")
    reference.note(1, 0.5, params(1), True)
    reference.note(2, 0.5, params(float("nan")), True)
    assert reference.step == 0 and not (tmp_path / "reference").exists()


def test_a_resumed_run_has_the_same_reference_and_comes_to_the_same_next_one(tmp_path):
    rewards, cursors = [0.3, 0.2, 0.5, 0.1, 0.1], []
    whole = Reference(params(0), tmp_path / "reference")
    for step, reward in enumerate(rewards, 1):
        whole.note(step, reward, params(step), True)
        cursors.append(whole.cursor)
    assert [cursor["step"] for cursor in cursors] == [0, 2, 2, 4, 4]
    for done in range(2, 5):  # the two latest are kept
        again = Reference(params(0), tmp_path / "reference")
        again.resume(cursors[done - 1])
        np.testing.assert_array_equal(again.params["w"], cursors[done - 1]["step"])
        for step, reward in enumerate(rewards[done:], done + 1):
            again.note(step, reward, params(step), True)
        assert again.cursor == cursors[-1]


def test_a_damaged_reference_is_named(tmp_path):
    reference = Reference(params(0), tmp_path / "reference")
    for step in (1, 2):
        reference.note(step, 0.5, params(step), True)
    (tmp_path / "reference" / "2" / "checksums.json").unlink()
    with pytest.raises(UsageError, match="checksums.json is missing"):
        Reference(params(0), tmp_path / "reference").resume(reference.cursor)


def test_a_run_goes_on_from_the_start_that_it_had_alone(tmp_path):
    cursor = Reference(params(0), tmp_path / "reference", "of the start").cursor
    Reference(params(0), tmp_path / "reference", "of the start").resume(cursor)
    with pytest.raises(UsageError, match="--init holds other parameters than those that this run started from"):
        Reference(params(1), tmp_path / "reference", "of another").resume(cursor)
