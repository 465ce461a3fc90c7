"""A Countdown problem, and the one exact grader of its answers.

Countdown: combine the given numbers, each exactly once, with + - * / to reach the target.
Every result must be a natural number. The grader parses text strictly and never evaluates it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from checks import require
from countdown.language import NUMBER, short
from records import Grade

MAX_VALUE = 10**9  # of a number or target: keeps factoring and arithmetic cheap
MAX_NUMBERS = 6  # numbers of a problem: exact search over more takes too long


@dataclasses.dataclass(frozen=True)
class Problem:
    """Reach `target` with every one of `numbers` exactly once.

    Raises ValueError unless all are integers from 1 to `MAX_VALUE` and there are 2 to `MAX_NUMBERS` numbers.
    """

    numbers: tuple[int, ...]
    target: int

    def __post_init__(self) -> None:
        count = len(self.numbers)
        require(2 <= count <= MAX_NUMBERS, f"a problem needs from 2 to {MAX_NUMBERS} numbers, not {count}")
        for value in (*self.numbers, self.target):
            whole = type(value) is int and 1 <= value <= MAX_VALUE
            require(whole, f"numbers and target must be integers from 1 to {MAX_VALUE}, not {value!r}")


_STEP = re.compile(f"({NUMBER})([-+*/])({NUMBER})=({NUMBER})")


def replay(problem: Problem, steps: Sequence[str]) -> tuple[list[int], str]:
    """The numbers left after steps such as "53-31=22", and what is wrong with the first wrong step ("" if none is)."""
    available = list(problem.numbers)
    for step in steps:
        match = _STEP.fullmatch(step)
        if not match:
            return available, f"malformed step: {short(step)}"
        a, sign, b, result = int(match[1]), match[2], int(match[3]), int(match[4])
        for operand in (a, b):
            if operand not in available:
                return available, f"{short(operand)} is not available"
            available.remove(operand)
        if sign == "/" and (b == 0 or a % b):
            return available, f"{'division not exact' if b else 'division by zero'}: {short(step)}"
        if {"+": a + b, "-": a - b, "*": a * b, "/": a // (b or 1)}[sign] != result:
            return available, f"wrong arithmetic: {short(step)}"
        available.append(result)
    return available, ""


def grade_steps(problem: Problem, steps: Sequence[str]) -> Grade:
    """Grades steps such as "53-31=22".

    Every step must be exact, every number must be used exactly once, and the last result must be the target.
    """
    answer = tuple(steps)
    if not answer:
        return Grade(False, "no answer", answer)
    available, error = replay(problem, answer)
    if error:
        return Grade(False, error, answer)
    if len(available) > 1:
        return Grade(False, f"unused number {short(available[0])}", answer)
    if available[0] != problem.target:
        return Grade(False, f"ends at {short(available[0])}, not {problem.target}", answer)
    return Grade(True, "", answer)


def grade_path(problem: Problem, text: str) -> Grade:
    """Grades a path written as '53-31=22, 22/22=1, 1+26=27'."""
    return grade_steps(problem, [step.strip() for step in text.split(",")] if text.strip() else [])
