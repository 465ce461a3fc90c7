"""The examples: threads without a model print their story, and the second task is right and complete."""

import pytest

from examples import products, threads_without_a_model
from examples.threads_without_a_model import ScriptedEngine
from harness import tasks
from harness.build import build
from parallel_runtime import Limits, Runtime
from protocols import Request
from tests.parallel_runtime_test import calculate


def test_threads_without_a_model_print_their_story(capsys):
    threads_without_a_model.main()
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 5 and "stopped by spawn" in out[0] and "'46.'" in out[3]
    assert out[4] == "2 children, 43 tokens in all, 37 of them one after another"


@pytest.fixture(scope="module")
def domain():
    return tasks.part("products", "domain")(products.get_config())


def test_a_demonstration_is_what_the_runtime_records_of_a_perfect_policy(domain):
    limits = Limits(children=4, spawns=4, depth=1, thread_tokens=100, rollout_tokens=1000)
    runtime = Runtime(ScriptedEngine(calculate, 4), domain.task, limits)
    for index in range(40):
        written = domain.demonstration("train", 0, index)
        assert written.grade.correct
        (ran,) = runtime.run([Request(written.problem)], (0,))
        calls = [
            [(call.keep, call.injected, call.sampled, call.stop) for t in rollout.threads() for call in t.calls]
            for rollout in (written, ran)
        ]
        assert calls[0] == calls[1] and written.grade == ran.grade


def test_splits_never_meet_and_problems_are_read_back(domain):
    splits = {split: set(domain.problems(split, 100)) for split in ("validation", "heldout")}
    trained = {domain.problem("train", seed, index) for seed in range(2) for index in range(300)}
    assert not splits["validation"] & splits["heldout"] and not (splits["validation"] | splits["heldout"]) & trained
    assert not {(right, left) for left, right in splits["heldout"]} & trained
    read = {
        domain.language.decode(thread.calls[0].injected)
        for index in range(300)
        for thread in domain.demonstration("train", 0, index).threads()
    }
    assert not read & {f"{a}*{b}=" for left, right in splits["heldout"] for a, b in ((left, right), (right, left))}
    for problem in splits["heldout"]:
        assert domain.from_json(domain.to_json(problem)) == problem
    for wrong in ({"numbers": [1]}, {"numbers": 5}, {"numbers": ["1", "2"]}, [1, 2], None):
        with pytest.raises(ValueError, match="a problem must be"):
            domain.from_json(wrong)
    with pytest.raises(ValueError, match="widen problems.high"):
        domain.problems("heldout", 10**6)


def test_budget_forcing_needs_a_task_that_has_it():
    config = products.get_config()
    config.limits.min_budget_rounds = 1
    with pytest.raises(ValueError, match="products has no budget forcing: limits.min_budget_rounds"):
        build(config)


def test_an_unknown_task_is_refused():
    config = products.get_config()
    config.task = "chess"
    with pytest.raises(ValueError, match="task='chess' must be one of countdown, products"):
        tasks.part(config.task, "domain")(config)
