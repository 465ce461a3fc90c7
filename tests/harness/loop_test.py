"""The training loop with a stage that trains nothing: which parameters are the best, and which steps are looked at."""

import signal
import time

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from harness import loop
from harness.cli import Stopped, UsageError
from harness.results import read_log
from harness.workdir import Workdir, load_best
from train_state import TrainState


class Counting:
    """A stage whose parameters count its steps. `measured` is what each step measures."""

    log_every, eval_every, validates_start, batch, loss, temperature = 3, 2, False, None, None, 1.0

    def __init__(self, steps: int, measured: dict[int, dict] | None = None, breaks: int = 0) -> None:
        self.steps, self.measured, self.breaks, self.at = steps, measured or {}, breaks, 0

    def resume(self, cursor) -> None:
        self.at = cursor or 0

    def cursor(self) -> int:
        return self.at

    def step(self, state: TrainState, number: int):
        self.at = number
        loss = self.measured.get(number, jnp.float32(number))
        params = {"w": state.params["w"] + (jnp.inf if number == self.breaks else 1)}
        return TrainState(params, (), state.step + 1), {"loss": loss}

    def summary(self, pending, seconds):
        return {"loss": sum(values["loss"] for values in pending), "steps": len(pending)}

    def line(self, values) -> str:
        return ""


def start() -> TrainState:
    return TrainState({"w": jnp.zeros(2)}, (), jnp.int32(0))


@pytest.fixture
def validated(monkeypatch) -> list[float]:
    """What the validations find, one after another."""
    found: list[float] = []
    take = lambda *_: dict(dict.fromkeys(("low", "high", "children"), 0.0), accuracy=found.pop(0))
    monkeypatch.setattr(loop, "validate", take)
    return found


@pytest.mark.parametrize(("accuracies", "best"), [([0.5, 0.5, 0.4], 4), ([0.5, 0.4, 0.3], 2), ([0.0, 0.0, 0.0], 6), ([0.1, 0.2, 0.3], 6)])
def test_the_best_is_the_highest_accuracy_and_of_equal_ones_the_later(tmp_path, validated, accuracies, best):
    validated += accuracies
    loop.train(None, Workdir(tmp_path, ConfigDict()), Counting(6), start())
    params, result = load_best(tmp_path, {"w": jnp.zeros(2)})
    assert result == {"step": best, "validation_accuracy": max(accuracies)} and params["w"].tolist() == [best, best]


def test_every_step_is_summarised_once(tmp_path, validated):
    """A line after steps 2, 3, 4 and 6; the loss of step n is n."""
    validated += [0.0] * 3
    loop.train(None, Workdir(tmp_path, ConfigDict()), Counting(6), start())
    lines = [line for line in read_log(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [(line["step"], line["steps"], line["loss"]) for line in lines] == [(2, 2, 3), (3, 1, 3), (4, 1, 4), (6, 2, 11)]


def test_the_first_line_after_a_stop_counts_the_time_before_it(tmp_path, validated):
    """Stopped after step 2 of 3 to a line. The two take a second each, the third hardly any time."""

    class Slow(Counting):
        eval_every, stops_at = 4, 2

        def step(self, state, number):
            time.sleep(1.0 if self.stops_at else 0.0)
            if number == self.stops_at:
                signal.raise_signal(signal.SIGTERM)
            return super().step(state, number)

        def summary(self, pending, seconds):
            return {"seconds": seconds, "steps": len(pending)}

    with pytest.raises(Stopped):
        loop.train(None, Workdir(tmp_path, ConfigDict()), Slow(4), start())
    validated += [0.0]
    again = Slow(4)
    again.stops_at = 0
    loop.train(None, Workdir(tmp_path, ConfigDict()), again, start())
    first, *_ = [line for line in read_log(tmp_path / "metrics.jsonl") if "seconds" in line]
    assert (first["step"], first["steps"]) == (3, 3) and first["seconds"] >= 2


@pytest.mark.parametrize("step", range(1, 7))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -jnp.inf])
def test_a_step_that_is_not_finite_is_named_and_not_saved(tmp_path, validated, step, value):
    validated += [0.0] * 3
    with pytest.raises(UsageError, match=f"not finite at step {step}: loss"):
        loop.train(None, Workdir(tmp_path, ConfigDict()), Counting(6, {step: value}), start())
    number, kept, _ = Workdir(tmp_path, ConfigDict()).load_failed()
    assert number == step and kept["params"]["w"].tolist() == [step - 1] * 2
    assert len(validated) == 3 - (step - 1) // 2


@pytest.mark.parametrize("step", range(1, 7))
def test_parameters_that_are_not_finite_are_named_at_their_step(tmp_path, validated, step):
    """Also between two lines of the log."""
    validated += [0.0] * 3
    with pytest.raises(UsageError, match=f"not finite at step {step}: parameters"):
        loop.train(None, Workdir(tmp_path, ConfigDict()), Counting(6, breaks=step), start())
    number, kept, _ = Workdir(tmp_path, ConfigDict()).load_failed()
    assert number == step and kept["params"]["w"].tolist() == [step - 1] * 2
