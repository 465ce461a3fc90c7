"""Explains a rollout: what is wrong in which line of which thread, and what cost the answer.

The grader (`countdown.grader`) says that an answer is wrong; this says why there is no right one.

  1. `verify` reads every thread in the order in which they ran: children stand between the call that spawned them and
     the one that was given their join. A line is judged by what its thread could see and then believed, so that a
     fault is reported where it is made and not again in what follows from it.
  2. A fault is *fatal* if it cost a state from which the target could still be reached, by exact search: a wrong
     step on a hopeless branch changes nothing.
  3. `explain` names the fatal fault that a failed rollout failed by.

Model output is data: parsed by the one strict grammar (`countdown.language.parse`), never evaluated. Lines that the
runtime gave are believed; the thread that wrote them has answered for them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import records
from countdown.grader import Problem, grade_steps
from countdown.language import END_ID, Line, Tokenizer, parse, short
from countdown.states import best_first, expand
from records import Rollout, Thread
from solver import solvable

# A line that should have been another: fatal if the target could be reached from what that says.
WRONG_ARITHMETIC = "wrong_arithmetic"  # 7+5=13
WRONG_STATE = "wrong_state"  # not the numbers, target or node that the operation leaves or the node was generated with
GOAL_MISSED = "goal_missed"  # the target is called unequal to itself
# A wasted line: fatal if nothing that was listed at its node could reach the target, but one of the best children
# (by the demonstrators' ranking) that might have stood in the place of the node's wasted lines.
MALFORMED_LINE = "malformed_line"  # not in the trace language, or for the runtime alone to write
ILLEGAL_OPERATION = "illegal_operation"  # no natural number results: division by zero or with a remainder, 5-7
UNAVAILABLE_NUMBER = "unavailable_number"  # an operand is not among the numbers of the state
DUPLICATE = "duplicate"  # a node lists an operation more often than its numbers allow
# The end of a search: fatal if the target could be reached from the state that the thread was given.
FALSE_GOAL = "false_goal"  # `Goal Reached` on steps that the grader refuses
MALFORMED_SPAWN = "malformed_spawn"
TRUNCATED = "truncated"  # stopped by a bound
# The goal was reached: fatal.
LOST_AT_JOIN = "lost_at_join"  # a child handed a right path over, and its parent did not answer with it
UNREPORTED = "unreported"  # a thread reached the goal, but its end is no path to hand over, or no answer
# Costs no state by itself.
UNKNOWN_NODE = "unknown_node"  # a move to a node that was never generated in what the thread can see
# What is left to say of a failed rollout without a fatal fault.
EXHAUSTED = "exhausted"  # the search ended and found nothing
UNSOLVABLE = "unsolvable"  # there is nothing to find

_RUNTIMES = ("token_budget", "sub_call_budget", "join", "child_failed", "child_reached", "joined")
_LOSSES = (LOST_AT_JOIN, UNREPORTED)
State = tuple[tuple[int, ...], tuple[str, ...]]  # sorted numbers, and the operations that led to them


@dataclasses.dataclass
class Fault:
    """One thing that is wrong with a rollout.

    `thread` is the path of a thread, `call` counts its calls from 0, and `line` the lines of the call from 1, given
    and written ones alike. `steps` are the operations that the fault is about.
    """

    thread: tuple[int, ...]
    call: int
    line: int
    kind: str
    message: str
    fatal: bool
    steps: tuple[str, ...] = ()


def verify(rollout: Rollout, tokenizer: Tokenizer) -> list[Fault]:
    """Every fault of a rollout, in the order in which its threads ran. Any ids of the vocabulary will do."""
    root = _Reader(rollout.problem, tokenizer, rollout.root)
    root.read(rollout.grade.correct)
    if not rollout.grade.correct and not any(fault.fatal for fault in root.faults):
        if root.reached:
            root.fault(UNREPORTED, f"the goal was reached, but: {rollout.grade.reason}", fatal=True)
        elif solvable(rollout.problem.numbers, rollout.problem.target):
            root.fault(EXHAUSTED, "the search found nothing", fatal=True)
        else:
            root.fault(UNSOLVABLE, "there is nothing to find", fatal=True)
    return root.faults


def explain(rollout: Rollout, tokenizer: Tokenizer) -> Fault | None:
    """The fault that a failed rollout failed by; None for a correct one.

    A solution that was handed over and lost comes first (or the bound that cut the parent), because nothing before
    it mattered; else it is the first fatal fault. If that is a false goal, what made it false is named: the first
    fault about steps of its path.
    """
    if rollout.grade.correct:
        return None
    faults = verify(rollout, tokenizer)
    fatal = [fault for fault in faults if fault.fatal]
    first = next((fault for fault in fatal if fault.kind == LOST_AT_JOIN), fatal[0])
    if first.kind == LOST_AT_JOIN:
        return next((fault for fault in fatal if (fault.kind, fault.thread) == (TRUNCATED, first.thread)), first)
    if first.kind == FALSE_GOAL:
        return next((fault for fault in faults if fault.steps and {*fault.steps} <= {*first.steps}), first)
    return first


def failure(rollout: Rollout, tokenizer: Tokenizer) -> str:
    """The kind of the fault that a failed rollout failed by; "" for a correct one (the hook of `harness.tasks`)."""
    fault = explain(rollout, tokenizer)
    return fault.kind if fault else ""


def _operands(operation: str) -> tuple[int, str, int, int]:
    a, sign, b, _, result = re.split("([-+*/=])", operation)
    return int(a), sign, int(b), int(result)


def _value(a: int, sign: str, b: int) -> int | None:
    """The natural number that an operation results in, None if there is none."""
    if sign == "/":
        return None if b == 0 or a % b else a // b
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return value if value >= 0 else None


def _state(numbers: Sequence[int], operations: tuple[str, ...]) -> State:
    return tuple(sorted(numbers)), operations


class _Reader:
    """Reads one thread, and through it its children."""

    def __init__(self, problem: Problem, tokenizer: Tokenizer, thread: Thread) -> None:
        self.problem, self.tokenizer, self.thread = problem, tokenizer, thread
        self.faults: list[Fault] = []
        self.wasted: list[tuple[Fault, str, Sequence[int]]] = []  # with the node and the numbers of their state
        self.children: list[_Reader] = []  # of the last join
        self.unjoined: list[list[_Reader]] = []  # of the spawns since, the oldest first
        self.call, self.line, self.given = 0, 0, True  # where it reads; whether the runtime wrote that
        self.asks = False  # whether the call ended by asking for a join
        self.start: tuple[int, ...] = ()  # numbers of the first state
        self.node = "0"
        self.numbers: tuple[int, ...] = ()
        self.operations: tuple[str, ...] = ()
        self.known: dict[str, list[State]] = defaultdict(list)  # node -> what it was said to be
        self.listed: dict[str, list[tuple[int, ...]]] = defaultdict(list)  # node -> what its right operations leave
        self.times: Counter[tuple[str, str, frozenset[int]]] = Counter()  # of an operation of a node
        self.explored: Line | None = None  # the last operation, while lines refer to it
        text = tokenizer.decode(thread.ids())  # a direct solution has no nodes: its operations go on from one another
        self.direct = "Node #" not in text and "No solution" not in text
        self.taken: Line | None = None  # the operation before, of a direct solution
        self.claims: list[tuple[str, ...]] = []  # paths that a goal may rest on
        self.claimed = self.reached = False  # a goal was written; one that the grader accepts

    def read(self, correct: bool | None = None) -> None:
        """Reads all calls. `correct` is the verdict on a root; other threads succeed by reaching the goal."""
        spawns = iter(self.thread.spawns)
        for number, call in enumerate(self.thread.calls):
            given = self.tokenizer.decode(call.injected)
            written = self.tokenizer.decode(call.sampled[:-1] if call.sampled[-1:] == [END_ID] else call.sampled)
            lines = (given + written).splitlines(keepends=True)
            if call.stop in records.TRUNCATED and lines and not lines[-1].endswith("\n"):
                lines.pop()  # cut by the bound, not malformed
            self.asks = call.stop in (records.JOIN, records.MALFORMED)
            for line, text in enumerate(lines, 1):
                self.call, self.line, self.given = number, line, line <= given.count("\n")
                self._read_line(text)
            self.given = False
            if call.stop in records.SPAWNED:
                self.unjoined.append([_Reader(self.problem, self.tokenizer, child) for child in next(spawns, [])])
                for child in self.unjoined[-1]:
                    child.read()
                    self.faults += child.faults
            if call.stop in records.WAITED and self.unjoined:
                self.children = self.unjoined.pop(0)
            elif call.stop == records.MALFORMED:
                self.fault(MALFORMED_SPAWN, self.thread.detail, self._hopeful(self.start))
            elif call.stop in records.TRUNCATED:  # a root may yet be made to answer
                self.fault(TRUNCATED, f"stopped by {call.stop}", self._hopeful(self.start))
        if self.reached if correct is None else correct:
            self.faults = [fault for fault in self.faults if fault.kind not in _LOSSES]
        for fault, node, numbers in self.wasted:
            fault.fatal |= self._missed(node, numbers)

    def _read_line(self, text: str) -> None:
        try:
            *prefix, line = parse(text)
        except ValueError:
            return self.fault(MALFORMED_LINE, f"not in the trace language: {short(text.strip())!r}")
        if not self.given and (prefix or line.kind in _RUNTIMES) and not (self.asks and line.kind == "join"):
            return self.fault(MALFORMED_LINE, f"for the runtime to write: {short(text.strip())!r}")
        if line.kind != "explore":
            self.taken = None
        match line.kind:
            case "move" | "enter":
                if line.node not in self.known:
                    self.fault(UNKNOWN_NODE, f"#{short(line.node)} was never generated", fatal=False)
                self.node = line.node
            case "state":
                self._read_state(line)
            case "explore":
                self._read_explore(line)
            case "generate":
                self._read_generate(line)
            case "goal" | "miss":
                self._read_leaf(line)
            case "join":
                self.claims = []
            case "child_failed" if line.number < len(self.children) and self.children[line.number].reached:
                self.fault(UNREPORTED, f"child {line.number} reached the goal", fatal=True)

    def _read_state(self, line: Line) -> None:
        state, known = _state(line.numbers, line.operations), self.known[self.node]
        if (known and state not in known) or line.target != self.problem.target:
            fatal = any(self._hopeful(numbers) for numbers, _ in known)
            self.fault(WRONG_STATE, f"not how #{short(self.node)} was generated", fatal, line.operations)
            # a state without the line that moves there
            self.node = next((node for node, states in self.known.items() if state in states), self.node)
        self.known[self.node].append(state)
        self.numbers, self.operations, self.explored = *state, None
        if self.given and not self.call:  # its own state comes last, after what it inherits
            self.start = self.numbers

    def _read_explore(self, line: Line) -> None:
        if self.taken is not None:
            self.numbers, self.operations = _state(self.taken.numbers, (*self.operations, self.taken.operation))
        a, sign, b, result = _operands(line.operation)
        value, have, both = _value(a, sign, b), Counter(self.numbers), Counter((a, b))
        right = () if value is None or both - have else (*(have - both).elements(), value)
        what, step = short(line.operation), (line.operation,)
        if value is None:
            self.fault(ILLEGAL_OPERATION, f"{what} has no natural number as result", steps=step)
        elif value != result:
            self.fault(WRONG_ARITHMETIC, f"{what} should be {short(value)}", self._hopeful(right), step)
        elif not right:
            missing = short([*(both - have)])
            self.fault(UNAVAILABLE_NUMBER, f"{what} uses {missing}, not in {short([*self.numbers])}", steps=step)
        elif sorted(line.numbers) != sorted(right):
            self.fault(WRONG_STATE, f"{what} leaves {short([*right])}", self._hopeful(right), step)
        else:
            self.listed[self.node].append(line.numbers)
            operands = self.node, sign, frozenset((a, b))
            self.times[operands] += 1
            pairs = have[a] * have[b] if a != b else math.comb(have[a], 2)
            if self.times[operands] > pairs and not self.claimed:  # a path restated after the goal repeats its lines
                self.fault(DUPLICATE, f"{what} is listed {self.times[operands]} times, not {pairs}", steps=step)
        self.explored, self.taken = line, line if self.direct and len(line.numbers) > 1 else None
        if len(line.numbers) == 1:  # SoS breadth-first announces leaves that lost, all as child 0
            self.known[f"{self.node},0"].append(_state(line.numbers, (*self.operations, line.operation)))
        self.claims = [*(self.claims if self.given else ()), (*self.operations, line.operation)]

    def _read_generate(self, line: Line) -> None:
        known, last = self.known[line.node], self.explored
        state = _state(line.numbers, (*self.operations, line.operation))
        left = None if last is None else _state(last.numbers, (*self.operations, last.operation))
        if state != left or line.target != self.problem.target:
            fatal = left is not None and self._hopeful(left[0])
            self.fault(WRONG_STATE, "not what the operation before it leaves", fatal, (line.operation,))
        elif line.node.rpartition(",")[0] != self.node or (known and state not in known):
            fatal = any(self._hopeful(numbers) for numbers, _ in [*known, state])
            self.fault(WRONG_STATE, f"#{short(line.node)} is no new child of #{short(self.node)}", fatal)
        known.append(state)

    def _read_leaf(self, line: Line) -> None:
        """A number compared to the target."""
        grades = [grade_steps(self.problem, steps) for steps in self.claims]
        there, target = any(grade.correct for grade in grades), self.problem.target
        if line.kind == "goal":
            self.claimed = True
            if not there or (line.number, line.target) != (target, target):
                reason = f"the target is {target}" if there else grades[-1].reason if grades else "nothing leads to it"
                self.fault(FALSE_GOAL, reason, self._hopeful(self.start), self.claims[-1] if grades else ())
            elif self.given and self.children:
                self.fault(LOST_AT_JOIN, "a child handed this over, and the thread did not answer", fatal=True)
            else:
                self.reached = True
        elif self.explored is None or self.explored.numbers != (line.number,) or line.target != target:
            self.fault(WRONG_STATE, "not what the operation before it leaves, or not the target", there)
        elif line.number == target:
            self.fault(GOAL_MISSED, f"{target} is the target", there)

    def fault(self, kind: str, message: str, fatal: bool | None = None, steps: tuple[str, ...] = ()) -> None:
        """Notes a fault of the current line; where `fatal` is None, the end of the thread decides (see `read`).

        Given lines have no faults but losses, which `read` takes back if the thread succeeds. Once the goal is
        reached, whatever spoils its path is fatal.
        """
        if self.given and kind not in _LOSSES:
            return
        fault = Fault(self.thread.path, self.call, self.line, kind, message, bool(fatal) or self.reached, steps)
        self.faults.append(fault)
        if fatal is None:
            self.wasted.append((fault, self.node, self.numbers))

    def _missed(self, node: str, numbers: Sequence[int]) -> bool:
        """Whether the best children in place of the wasted lines of a node would have been its only hope."""
        listed = self.listed[node]
        if len(numbers) < 2 or not self._hopeful(numbers) or any(map(self._hopeful, listed)):
            return False
        best = dict.fromkeys(tuple(sorted(left)) for _, _, left in best_first(expand([*numbers], self.problem.target)))
        unlisted = [left for left in best if left not in {tuple(sorted(left)) for left in listed}]
        count = sum(other == node for _, other, _ in self.wasted)
        return any(map(self._hopeful, unlisted[:count]))

    def _hopeful(self, numbers: Sequence[int]) -> bool:
        """Whether the target can be reached from these numbers, if they can be a state of the problem at all."""
        largest = math.prod(number + 1 for number in self.problem.numbers)  # no operation leads beyond it
        if len(numbers) > len(self.problem.numbers) or max(numbers, default=0) > largest:
            return False
        return tuple(numbers) == (self.problem.target,) or solvable(numbers, self.problem.target)
