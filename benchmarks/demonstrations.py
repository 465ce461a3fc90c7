"""Speed and accuracy of the demonstrators on the paper's problems (4 numbers 1-99, targets 10-100).

Prints a line per method and, as its last line, one JSON object: demonstrations
per second of one process and of two, as text, and with problem generation,
tokenisation and grading included; demonstrator accuracy; children and tokens
per problem.

Run: python -m benchmarks.demonstrations --problems=2000
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Callable

import solver
from countdown.language import Tokenizer
from countdown.task import Countdown

FAMILY = solver.ProblemRange(count=4, low=1, high=99, target_low=10, target_high=100)
CONFIGS = {
    "apr": solver.DemonstratorConfig("apr", 1, 10, 15, 0.9, budget_fraction=0, token_bin=512),
    "sosp": solver.DemonstratorConfig("sosp", 1, 5, 0, 0.5, budget_fraction=0, token_bin=512),
    "sos": solver.DemonstratorConfig("sos", 1, 5, 0, 0.0, budget_fraction=0, token_bin=512),
}


def text_rate(start: int, n: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """APR demonstrations per second of a clock as text, problems given."""
    problems = [solver.problem(FAMILY, "train", 0, start + i) for i in range(n)]
    begin = clock()
    for i, problem in enumerate(problems):
        solver.demonstrate(problem, CONFIGS["apr"], random.Random(i))
    return n / (clock() - begin)


def record_rate(start: int, n: int) -> float:
    """APR demonstrations per second as records: problem, text, ids and grade."""
    task = Countdown(Tokenizer(number_limit=1000), "apr")
    begin = time.perf_counter()
    for i in range(n):
        solver.demonstration(FAMILY, CONFIGS["apr"], task, "train", 0, start + i)
    return n / (time.perf_counter() - begin)


def statistics(method: str, n: int) -> dict[str, float]:
    """Accuracy, children and tokens per problem of a demonstrator."""
    task = Countdown(Tokenizer(number_limit=1000), CONFIGS[method].method)
    rollouts = [solver.demonstration(FAMILY, CONFIGS[method], task, "heldout", 0, i) for i in range(n)]
    calls = [call for rollout in rollouts for thread in rollout.threads() for call in thread.calls]
    return {
        f"{method}_accuracy": round(sum(rollout.grade.correct for rollout in rollouts) / n, 3),
        f"{method}_children": round(sum(len(rollout.threads()) - 1 for rollout in rollouts) / n, 2),
        f"{method}_tokens": round(sum(len(call.injected) + len(call.sampled) for call in calls) / n),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=2000)
    n = parser.parse_args().problems
    result: dict[str, float] = {"problems": n}
    for method in CONFIGS:
        result |= statistics(method, n)
        print(method, {key: value for key, value in result.items() if key.startswith(f"{method}_")}, flush=True)
    result["apr_text_per_cpu_second"] = round(text_rate(0, n, time.process_time))  # says more on a busy machine
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for name, rate in (("text", text_rate), ("record", record_rate)):
            result[f"apr_{name}_per_second"] = round(rate(0, n))
            result[f"apr_{name}_per_second_two_processes"] = round(sum(pool.starmap(rate, [(0, n), (n, n)])))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
