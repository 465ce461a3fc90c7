"""The viewer: one self-contained page that shows a single rollout.

The page is one file that needs no network: the header, the tree of Countdown
states, the threads on a clock of tokens, and the text of each thread.

  1. `read_trace` rebuilds the `Rollout` that a trace file keeps, and refuses what is none.
  2. `timeline` puts every call on the clock and marks the critical path.
  3. `search_tree` reads the states off the text, in the order they were written,
     line by line: a line outside the grammar is text and nothing more.
  4. `page` puts all this into viewer.html as JSON; the script there only draws.

Run: python -m analysis.figures --trace=trace.json
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import typing
from collections.abc import Iterator

import parallel_runtime as pr
from countdown.grader import Problem, grade_steps
from countdown.language import Line, Tokenizer, parse
from harness.cli import UsageError, usage_errors
from parallel_runtime import Call, Grade, Rollout, Thread, sequential_tokens

TEMPLATE = pathlib.Path(__file__).parent / "viewer.html"
PLACEHOLDER = "{{DATA}}"  # in the template
STOPPED = {
    pr.END: "ended by itself",
    pr.SPAWN: "asked for children",
    pr.CONTEXT: "cut: its context was full",
    pr.THREAD_TOKENS: "cut: the thread's tokens were used up",
    pr.ROLLOUT_TOKENS: "cut: the rollout's tokens were used up",
    pr.MALFORMED: "its spawn block was malformed",
    pr.CHILDREN: "cut: it asked for too many children",
    pr.SPAWNS: "cut: it asked for children too often",
    pr.DEPTH: "cut: it asked for children too deep down",
}

# ---------------------------------------------------------------- trace files


def _fields(value: typing.Any, name: str, **kinds: type | tuple[type, ...]) -> dict[str, typing.Any]:
    """`value`, if it is a JSON object with these fields; ValueError if not."""
    if not isinstance(value, dict) or not all(isinstance(value.get(field), kind) for field, kind in kinds.items()):
        raise ValueError(f"{name} must be an object with {', '.join(kinds)}")
    return value


def rollout_from_json(value: typing.Any, vocab_size: int) -> Rollout:
    """The inverse of `dataclasses.asdict`; raises ValueError, in one sentence, where the record cannot be one."""

    def call(value: typing.Any, before: int) -> Call:
        result = Call(**_fields(value, "a call", keep=int, injected=list, sampled=list, logprobs=list, stop=str))
        if not all(type(token) is int and 0 <= token < vocab_size for token in result.injected + result.sampled):
            raise ValueError(f"the ids of a call must be integers from 0 to {vocab_size - 1}")
        if not 0 <= result.keep <= before or result.stop not in pr.STOPS:
            raise ValueError(f"a call cannot keep {result.keep} of {before} ids, or cannot stop by {result.stop!r}")
        return result

    def thread(value: typing.Any) -> Thread:
        fields = _fields(value, "a thread", path=list, calls=list, spawns=list, detail=str)
        result = Thread(tuple(fields["path"]), detail=fields["detail"])
        for stored in fields["calls"]:
            result.calls.append(call(stored, len(result.ids())))
        result.spawns = [[thread(child) for child in children] for children in fields["spawns"]]
        stops = [call.stop for call in result.calls]
        goes_on = {pr.SPAWN} if result.path else {pr.SPAWN, pr.END, pr.THREAD_TOKENS}  # a root may be forced on
        spawned = stops[:-1].count(pr.SPAWN)
        if not (stops and {*stops[:-1]} <= goes_on and all(result.spawns) and len(result.spawns) == spawned):
            raise ValueError("a thread goes on only after a spawn, or forced, and has children for each of its spawns")
        return result

    fields = _fields(value, "rollout", problem=dict, root=dict, grade=dict, index=int, milliseconds=(int, float))
    problem = _fields(fields["problem"], "problem", numbers=list, target=int)
    grade = _fields(fields["grade"], "grade", correct=bool, reason=str, answer=list)
    return Rollout(
        Problem(tuple(problem["numbers"]), problem["target"]),
        thread(fields["root"]),
        Grade(grade["correct"], grade["reason"], tuple(grade["answer"])),
        fields["index"],
        fields["milliseconds"],
    )


def read_trace(path: str) -> tuple[Rollout, str, Tokenizer]:
    """Rollout, method and tokenizer of a trace file (`solver.stored`). Raises UsageError if it is none."""
    with usage_errors():
        text = pathlib.Path(path).read_text(encoding="utf-8")
        try:
            fields = _fields(json.loads(text), "it", method=str, number_limit=int, rollout=dict)
            tokenizer = Tokenizer(fields["number_limit"])
            return rollout_from_json(fields["rollout"], tokenizer.vocab_size), fields["method"], tokenizer
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is no trace file of evaluate.py --record or solver.py --json: {error}") from error


# ---------------------------------------------------------------- when


@dataclasses.dataclass
class Lane:
    """A thread on the clock: call i runs from starts[i], in tokens, for as many as it sampled."""

    thread: Thread
    critical: bool  # whether the end of the rollout waits for every token of this thread
    starts: list[int] = dataclasses.field(default_factory=list)
    joins: list[int] = dataclasses.field(default_factory=list)  # when the slowest child of spawn i ends

    def runs(self) -> Iterator[tuple[int, Call]]:
        """(start, call) of every call."""
        return zip(self.starts, self.thread.calls, strict=True)


def timeline(thread: Thread, start: int = 0, critical: bool = True) -> list[Lane]:
    """Lanes of a thread and its descendants, in the order of `Thread.walk`.

    A child starts when its parent spawns, the parent goes on when its slowest
    child (the first such) ends. So the last call of the root ends at
    `sequential_tokens`, which is also the length of all critical calls together.
    """
    lane, below = Lane(thread, critical), []
    spawns = iter(thread.spawns)
    for call in thread.calls:
        lane.starts.append(start)
        start += len(call.sampled)
        if call.stop == pr.SPAWN:
            children = next(spawns)
            slowest = max(children, key=sequential_tokens)
            for child in children:
                below += timeline(child, start, critical and child is slowest)
            start += sequential_tokens(slowest)
            lane.joins.append(start)
    return [lane, *below]


# ---------------------------------------------------------------- what


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


def search_tree(rollout: Rollout, lanes: list[Lane], tokenizer: Tokenizer) -> list[State]:
    """States in the order they were first written, so that a parent comes before its children.

    A state is known by the operations that lead to it: node numbers, which a
    model may get wrong, are only shown.
    """
    problem, answer = rollout.problem, rollout.grade.answer
    index: dict[tuple[str, ...], int] = {(): 0}
    states = [State(list(problem.numbers), "", -1, 0, 0, node="0", answer=bool(answer))]

    def add(path: tuple[str, ...], numbers: tuple[int, ...], writer: int) -> State:
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
        results = [child for child in children[i] if len(states[child].numbers) == 1 and not children[child]]
        rows = [place(child) for child in children[i] if child not in results]
        if results or not rows:
            rows.append(float(next(free)))
        for cell, child in enumerate(results):
            states[child].row, states[child].cell = rows[-1], cell
        states[i].row = (rows[0] + rows[-1]) / 2
        return states[i].row

    place(0)


# ---------------------------------------------------------------- the page


def pieces(thread: Thread, number: int) -> list[tuple[str, bool, list[int]]]:
    """The ids of one call in order, as (given or sampled, whether the rewind after it removed them, ids)."""
    call, after = thread.calls[number], thread.calls[number + 1 : number + 2]
    ids, given = call.injected + call.sampled, len(call.injected)
    cut = after[0].keep - call.keep if after else len(ids)
    parts = []
    for kind, start, end in (("given", 0, given), ("sampled", given, len(ids))):
        middle = min(max(cut, start), end)
        parts += [(kind, False, ids[start:middle]), (kind, True, ids[middle:end])]
    return [part for part in parts if part[2]]


def page_data(rollout: Rollout, method: str, tokenizer: Tokenizer) -> dict[str, typing.Any]:
    """All that the page shows; threads and states are told by their index."""
    lanes = timeline(rollout.root)
    number = {id(lane.thread): i for i, lane in enumerate(lanes)}
    costs = pr.metrics(rollout)
    threads = [
        {
            "name": "child " + ".".join(map(str, lane.thread.path)) if lane.thread.path else "parent",
            "critical": lane.critical,
            "detail": lane.thread.detail,
            "joins": lane.joins,
            "spawns": [[number[id(child)] for child in children] for children in lane.thread.spawns],
            "calls": [
                {
                    "start": start,
                    "tokens": len(call.sampled),
                    "keep": call.keep,
                    "stop": call.stop,
                    "why": STOPPED[call.stop],
                    "text": [
                        {"kind": kind, "removed": removed, "tokens": len(ids), "text": tokenizer.decode(ids)}
                        for kind, removed, ids in pieces(lane.thread, i)
                    ],
                }
                for i, (start, call) in enumerate(lane.runs())
            ],
        }
        for lane in lanes
    ]
    return {
        "method": method,
        "problem": dataclasses.asdict(rollout.problem),
        "grade": dataclasses.asdict(rollout.grade),
        "costs": {**costs, "speedup": costs["total_tokens"] / max(1, costs["sequential_tokens"])},
        "threads": threads,
        "states": [dataclasses.asdict(state) for state in search_tree(rollout, lanes, tokenizer)],
    }


def page(data: dict[str, typing.Any]) -> str:
    """The HTML. No text in `data` can end the script element that holds it: "<" is written as an escape."""
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, json.dumps(data).replace("<", "\\u003c"))
