"""The search tree of a Countdown rollout, read off the text of its threads, for the viewer.

States are read in the order they were written, line by line. A line outside the grammar is text and nothing more.
`harness.tasks` names `search_tree` as the hook that draws the states of Countdown.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from analysis.timeline import Lane
from countdown.grader import grade_steps
from countdown.language import Line, Tokenizer, parse
from records import Rollout


@dataclasses.dataclass
class State:
    """A node of the search tree: the numbers left after some operations. Threads and states are told by their index."""

    numbers: list[int]
    operation: str  # the last one; "" at the root
    parent: int  # -1 at the root
    writer: int  # the thread that listed it
    thread: int  # the thread that moved to it, or else its writer
    visited: bool = False  # whether a thread moved to it
    node: str = ""  # its name in the text
    fault: str = ""  # what the grader says against the operations so far
    twin: int = -1  # the first state with the same numbers, if that is another
    dead: bool = False  # neither it nor anything listed below it is the target, and nothing there is left to visit
    answer: bool = False  # on the path of the answer
    column: int = 0
    row: float = 0.0
    cell: int = -1  # a single number stands in one row with its siblings, in this place; -1: a row of its own


def _lines(text: str) -> Iterator[Line]:
    """Lines of a text that are in the grammar."""
    for line in text.splitlines(keepends=True):
        try:
            yield from parse(line)
        except ValueError:
            continue


def search_tree(rollout: Rollout, lanes: Sequence[Lane], tokenizer: Tokenizer) -> list[State]:
    """States in the order they were first written, so that a parent comes before its children.

    A state is known by the operations that lead to it: node numbers, which a
    model may get wrong, are only shown.
    """
    problem, answer = rollout.problem, rollout.grade.answer
    index: dict[tuple[str, ...], int] = {(): 0}
    states = [State(list(problem.numbers), "", -1, 0, 0, node="0", answer=bool(answer))]

    def add(path: tuple[str, ...], numbers: tuple[int, ...], writer: int) -> State:
        """The state at a path, entered if it is new."""
        if path not in index:
            before = next(path[:i] for i in reversed(range(len(path))) if path[:i] in index)
            parent, reason = index[before], grade_steps(problem, path).reason
            state = State(list(numbers), ", ".join(path[len(before) :]), parent, writer, writer)
            state.fault = "" if reason.startswith(("unused number", "ends at")) else reason  # it need not be over yet
            state.answer = answer[: len(path)] == path
            state.column = states[parent].column + 1
            index[path] = len(states)
            states.append(state)
        return states[index[path]]

    runs = [(start, call, number) for number, lane in enumerate(lanes) for start, call in lane.runs()]
    at: dict[int, tuple[str, ...]] = {}  # the operations of the state that each thread is at
    for _, call, number in sorted(runs, key=lambda run: run[0]):
        for line in _lines(tokenizer.decode(call.injected + call.sampled)):
            if line.kind == "state":
                at[number] = line.operations
                state = add(line.operations, line.numbers, number)
                if not state.visited:
                    state.visited, state.thread = True, number
            elif line.kind in ("explore", "generate"):
                state = add((*at.get(number, ()), line.operation), line.numbers, number)
                state.node = state.node or line.node
    children: list[list[int]] = [[] for _ in states]
    for i, state in enumerate(states[1:], 1):
        children[state.parent].append(i)
    _judge(states, children, problem.target)
    _place(states, children)
    return states


def _judge(states: list[State], children: list[list[int]], target: int) -> None:
    """Marks dead ends and twins."""
    first: dict[tuple[int, ...], int] = {}
    for i, state in enumerate(states):
        earliest = first.setdefault(tuple(sorted(state.numbers)), i)
        if len(state.numbers) > 1 and earliest != i:
            state.twin = earliest
    for state, below in zip(reversed(states), reversed(children), strict=True):
        missed = len(state.numbers) == 1 and state.numbers != [target]
        state.dead = all(states[child].dead for child in below) if below else missed


def _place(states: list[State], children: list[list[int]]) -> None:
    """Rows of the drawing, top down: one for the results (last numbers) of a state, its middle for any other state."""
    free = itertools.count()

    def place(i: int) -> float:
        """Sets and returns the row of state i, after those of its children."""
        results = [child for child in children[i] if len(states[child].numbers) == 1 and not children[child]]
        rows = [place(child) for child in children[i] if child not in results]
        if results or not rows:
            rows.append(float(next(free)))
        for cell, child in enumerate(results):
            states[child].row, states[child].cell = rows[-1], cell
        states[i].row = (rows[0] + rows[-1]) / 2
        return states[i].row

    place(0)
