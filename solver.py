"""Countdown: problems, the exact grader, the symbolic demonstrators and their trace language.

Countdown: combine the given numbers, each exactly once, with + - * / to reach
the target. The demonstrators (paper section 4) search for a solution and write
the search down as text; a model trained on the text learns to search.

  1. `expand` makes every child of a state (each pair of numbers, each legal
     operation) and ranks the children by a heuristic. A demonstrator keeps the
     best `beam`, lists them in random order, and explores them best first.
  2. SoS is one thread: depth-first with pruning, or best-first over a frontier.
     SoS+ searches the children of a node in place where a coin says so. APR
     spawns them there as child threads and reads what they found at the join.
  3. `demonstrate` writes a `Trace` (text), `record` turns it into the `Rollout`
     that the runtime would have recorded, had the model written that text.
  4. `Countdown` is the `parallel_runtime.Task`: spawn block -> prompts of the
     children, children -> join block, root thread -> `Grade`. Model output is
     data: strictly matched, never evaluated. One grader judges everything.

Deviations from the paper and its released code:
  - A search that goes on after a failed join announces the node it moves to; the
    released generator lost most of these lines.
  - The coin of SoS+ and APR is tossed for expanded nodes that have children to
    hand out; a goal among the children ends the search before it is tossed.
  - Problems are drawn uniformly among the solvable ones of their family.
  - `Token Budget` is the multiple of the bin that holds the whole trace.

Run: python solver.py --numbers=22,26,31,53 --target=27 --method=apr --seed=0
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import itertools
import json
import operator
import random
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from absl import flags

import parallel_runtime
import tokenizer as lexicon
from parallel_runtime import Call, Grade, MalformedSpawn, Rollout, Spawn, Thread
from tokenizer import Tokenizer

Split = Literal["train", "heldout"]
Method = Literal["sos", "sosp", "apr"]
METHODS = ("sos", "sosp", "apr")
LARGEST = 10**9  # of a number or target: keeps factoring and arithmetic cheap

# ---------------------------------------------------------------- problems


@dataclasses.dataclass(frozen=True)
class Problem:
    """Reach `target` with every one of `numbers` exactly once; ValueError unless all are positive integers."""

    numbers: tuple[int, ...]
    target: int

    def __post_init__(self) -> None:
        if len(self.numbers) < 2:
            raise ValueError(f"a problem needs at least two numbers, not {list(self.numbers)}")
        for value in (*self.numbers, self.target):
            if type(value) is not int or not 1 <= value <= LARGEST:
                raise ValueError(f"numbers and target must be integers from 1 to {LARGEST}, not {value!r}")


@dataclasses.dataclass(frozen=True)
class ProblemRange:
    """A family of problems: `count` numbers in low..high, targets in target_low..target_high (all inclusive)."""

    count: int
    low: int
    high: int
    target_low: int
    target_high: int

    def __post_init__(self) -> None:
        if not 2 <= self.count <= 6:
            raise ValueError(f"count of numbers must be from 2 to 6, not {self.count}")
        for name, low, high in (
            ("numbers", self.low, self.high),
            ("targets", self.target_low, self.target_high),
        ):
            if not 1 <= low <= high <= LARGEST:
                raise ValueError(f"range of {name} must satisfy 1 <= low <= high <= {LARGEST}, not {low}..{high}")


def is_held_out(numbers: Sequence[int], target: int) -> bool:
    """Whether a problem is held out (1 in 10): a stable hash of sorted numbers and target, whatever the seed."""
    key = f"{sorted(numbers)} {target}".encode()
    return hashlib.blake2b(key, digest_size=4).digest()[0] % 10 == 0


@functools.lru_cache(maxsize=8)
def _listing(family: ProblemRange, split: Split) -> tuple[Problem, ...] | None:
    """Every solvable problem of a family (sorted numbers), or None if the family is too large to list."""
    size = 1
    for i in range(family.count):
        size = size * (family.high - family.low + 1 + i) // (i + 1)
    if size > 3000:
        return None
    problems = []
    for numbers in itertools.combinations_with_replacement(range(family.low, family.high + 1), family.count):
        values = _reachable(numbers)
        targets = sorted(value for value in values if family.target_low <= value <= family.target_high)
        problems += [Problem(numbers, t) for t in targets if is_held_out(numbers, t) == (split == "heldout")]
    return tuple(problems)


def problem(family: ProblemRange, split: Split, seed: int, index: int) -> Problem:
    """Solvable problem number `index` of a split: the same in every process; splits never share one.

    Raises ValueError if the family has no solvable problem in the split (for
    families too large to list: if 20,000 draws met none).
    """
    rng = random.Random(f"problem {family} {split} {seed} {index}")
    listing = _listing(family, split)
    if listing is not None:
        if not listing:
            raise ValueError(f"{family} has no solvable problem to be {split}: widen the ranges")
        drawn = rng.choice(listing)
        return Problem(tuple(rng.sample(drawn.numbers, family.count)), drawn.target)
    for _ in range(20_000):
        numbers = [rng.randint(family.low, family.high) for _ in range(family.count)]
        target = rng.randint(family.target_low, family.target_high)
        if is_held_out(numbers, target) == (split == "heldout") and solvable(numbers, target):
            return Problem(tuple(numbers), target)
    raise ValueError(f"{family}: 20,000 draws met no solvable problem to be {split}: widen the ranges")


def held_out_set(family: ProblemRange, seed: int, n: int) -> list[Problem]:
    """`n` held-out problems, distinct as sorted numbers and target; ValueError saying how many exist if fewer."""
    listing = _listing(family, "heldout")
    if listing is not None and len(listing) < n:
        raise ValueError(f"{family} has only {len(listing)} held-out problems, {n} were asked for")
    found: dict[tuple[tuple[int, ...], int], Problem] = {}
    if listing is not None:
        rng = random.Random(f"held out {family} {seed}")
        return [Problem(tuple(rng.sample(p.numbers, family.count)), p.target) for p in rng.sample(listing, n)]
    for index in range(100 * n):
        drawn = problem(family, "heldout", seed, index)
        found.setdefault((tuple(sorted(drawn.numbers)), drawn.target), drawn)
        if len(found) == n:
            break
    if len(found) < n:
        raise ValueError(f"{family}: only {len(found)} distinct held-out problems found, {n} were asked for")
    return list(found.values())


# ---------------------------------------------------------------- arithmetic, exact search, grader


@functools.lru_cache(maxsize=1 << 17)
def combine(a: int, b: int) -> tuple[tuple[int, str], ...]:
    """Results of the legal operations on two numbers, and their text: sum, product, difference, exact quotient."""
    large, small = (b, a) if a <= b else (a, b)
    results = [
        (a + b, f"{a}+{b}={a + b}"),
        (a * b, f"{a}*{b}={a * b}"),
        (large - small, f"{large}-{small}={large - small}"),
    ]
    if small and large % small == 0:
        results.append((large // small, f"{large}/{small}={large // small}"))
    return tuple(results)


def _reachable(numbers: Sequence[int]) -> set[int]:
    """Every value that uses each of `numbers` exactly once."""
    return _reachable_by_subset(numbers, (1 << len(numbers)) - 1)[-1]


def _reachable_by_subset(numbers: Sequence[int], largest: int) -> list[set[int]]:
    """Entry m: the values that use exactly the numbers in bit mask m, for all masks up to `largest`."""
    values: list[set[int]] = [set() for _ in range(largest + 1)]
    for mask in range(1, largest + 1):
        if mask & (mask - 1) == 0:
            values[mask].add(numbers[mask.bit_length() - 1])
            continue
        here = values[mask]
        part = (mask - 1) & mask
        while 2 * part > mask or part > mask ^ part:  # each split once
            for a in values[part]:
                for b in values[mask ^ part]:
                    here.update((a + b, a * b, abs(a - b)))
                    if b and a % b == 0:
                        here.add(a // b)
                    if a and b % a == 0:
                        here.add(b // a)
            part = (part - 1) & mask
    return values


def solvable(numbers: Sequence[int], target: int) -> bool:
    """Whether `target` can be reached: meets in the middle, from the halves of every split of the numbers."""
    full = (1 << len(numbers)) - 1
    values = _reachable_by_subset(numbers, full - 1)
    for part in range(1, full):
        others = values[full ^ part]
        for b in values[part]:  # is there an a among the others with a+b, a*b, a-b or a/b the target?
            if target - b in others or target + b in others:
                return True
            if b and (target * b in others or (target % b == 0 and target // b in others)):
                return True
            if b == 0 and target == 0:
                return True
    return False


def solve(numbers: Sequence[int], target: int) -> tuple[str, ...] | None:
    """Steps that reach `target`, or None: exhaustive search."""
    if len(numbers) == 1:
        return () if numbers[0] == target else None
    if not solvable(numbers, target):
        return None
    for i, j in itertools.combinations(range(len(numbers)), 2):
        rest = [*numbers[:i], *numbers[i + 1 : j], *numbers[j + 1 :]]
        for result, step in combine(numbers[i], numbers[j]):
            if (later := solve([*rest, result], target)) is not None:
                return (step, *later)
    return None


_NUMBER = "(?:0|[1-9][0-9]{0,999})"  # the bound keeps int() and str() within Python's 4,300 digits
_OPERATION = f"{_NUMBER}[-+*/]{_NUMBER}={_NUMBER}"
_STEP = re.compile(f"({_NUMBER})([-+*/])({_NUMBER})=({_NUMBER})")


def _short(text: object, limit: int = 60) -> str:
    return str(text) if len(str(text)) <= limit else f"{str(text)[:limit]}..."


def _step_error(a: int, sign: str, b: int, result: int) -> str:
    """What is wrong with the arithmetic of a step ("" if it is right)."""
    if sign == "/" and b == 0:
        return "division by zero"
    if sign == "/" and a % b:
        return "division not exact"
    exact = {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a // b
    return "" if exact == result else "wrong arithmetic"


def grade_steps(problem: Problem, steps: Sequence[str]) -> Grade:
    """Judges steps such as "53-31=22": exact, every number used exactly once, the last result the target."""
    answer = tuple(steps)
    available = list(problem.numbers)
    if not answer:
        return Grade(False, "no answer", answer)
    for step in answer:
        match = _STEP.fullmatch(step)
        if not match:
            return Grade(False, f"malformed step: {_short(step)}", answer)
        a, sign, b, result = int(match[1]), match[2], int(match[3]), int(match[4])
        for operand in (a, b):
            if operand not in available:
                return Grade(False, f"{_short(operand)} is not available", answer)
            available.remove(operand)
        if error := _step_error(a, sign, b, result):
            return Grade(False, f"{error}: {_short(step)}", answer)
        available.append(result)
    if len(available) > 1:
        return Grade(False, f"unused number {_short(available[0])}", answer)
    if available[0] != problem.target:
        return Grade(False, f"ends at {_short(available[0])}, not {problem.target}", answer)
    return Grade(True, "", answer)


def grade_path(problem: Problem, text: str) -> Grade:
    """Judges a path written as '53-31=22, 22/22=1, 1+26=27'."""
    return grade_steps(problem, [step.strip() for step in text.split(",")] if text.strip() else [])


# ---------------------------------------------------------------- trace language

GOAL = " equal: Goal Reached\n"
# One template per kind of line. The prefixes share the first line with what follows them; the bare failure is how
# SoS breadth-first ends.
TEMPLATES = {
    "token_budget": "Token Budget: {number} ",
    "sub_call_budget": "Sub Call Budget: {number} ",
    "move": "Moving to Node #{node}\n",
    "state": "Current State: {target}:{numbers}, Operations: {operations}\n",
    "explore": "Exploring Operation: {operation}, Resulting Numbers: {numbers}\n",
    "generate": "Generated Node #{node}: {target}:{numbers} Operation: {operation}\n",
    "goal": "{number},{target} equal: Goal Reached\n",
    "miss": "{number},{target} unequal: No Solution\n",
    "fail": "No solution found.\n",
    "bare_fail": "No solution found.",
    "enter": "Start Sub Search at level {level}: Moving to Node #{node}\n",
    "exit": "Exit Sub Search at level {level}\n",
    "exit_failed": "No solution found in sub search\n",
    "call": "<Calling Sub Searches>\n",
    "start": "<Start Sub Search {number} at level {level}> Moving to Node #{node}\n",
    "spawn": "<End Calling Sub Searches>\n",
    "join": "<Sub Searches>\n",
    "child_failed": "<No Solution in Sub Search {number} at level {level} at Node #{node}>\n",
    "child_reached": "<Goal Reached in Sub Search {number} at level {level} at Node #{node}>\n",
    "joined": "<End Sub Searches>\n",
}
_FIELDS = {
    "number": _NUMBER,
    "target": _NUMBER,
    "level": _NUMBER,
    "node": f"0(?:,{_NUMBER})*",
    "operation": _OPERATION,
    "numbers": rf"\[{_NUMBER}(?:, {_NUMBER})*\]",
    "operations": rf"\[(?:'{_OPERATION}'(?:, '{_OPERATION}')*)?\]",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a trace; `kind` is a key of `TEMPLATES`, which says what fields it has."""

    kind: str
    number: int = 0  # a leaf, a budget, or the index of a sub search
    target: int = 0
    level: int = 0
    node: str = ""
    operation: str = ""
    numbers: tuple[int, ...] = ()
    operations: tuple[str, ...] = ()


def _pattern(kind: str) -> str:
    """Regular expression of a kind of line; the group of a field is named kind_field."""
    pieces = re.split(r"\{(\w+)\}", TEMPLATES[kind])
    for i, piece in enumerate(pieces):
        pieces[i] = f"(?P<{kind}__{piece}>{_FIELDS[piece]})" if i % 2 else re.escape(piece)
    return f"(?P<{kind}>{''.join(pieces)})" + (r"\Z" if kind == "bare_fail" else "")


_LINE = re.compile("|".join(_pattern(kind) for kind in TEMPLATES))
_CONVERT = {
    "numbers": lambda text: tuple(int(number) for number in text[1:-1].split(", ")),
    "operations": lambda text: tuple(text[2:-2].split("', '")) if len(text) > 2 else (),
    "operation": str,
    "node": str,
}


def parse(text: str) -> list[Line]:
    """Lines of a trace; raises ValueError with the number and text of the first line that is none."""
    lines = []
    offset = 0
    while offset < len(text):
        match = _LINE.match(text, offset)
        kind = match.lastgroup if match else None
        if match is None or kind is None or (kind.endswith("budget") and offset):
            number = text.count("\n", 0, offset) + 1
            line = text[text.rfind("\n", 0, offset) + 1 :].partition("\n")[0]
            raise ValueError(f"line {number} is not in the trace language: {_short(line)!r}")
        fields = re.findall(r"\{(\w+)\}", TEMPLATES[kind])
        lines.append(Line(kind, **{f: _CONVERT.get(f, int)(match[f"{kind}__{f}"]) for f in fields}))
        offset = match.end()
    return lines


def render(lines: Sequence[Line]) -> str:
    """Text of a trace: the inverse of `parse`."""
    fields = [{**vars(line), "numbers": list(line.numbers), "operations": list(line.operations)} for line in lines]
    return "".join(TEMPLATES[line.kind].format(**values) for line, values in zip(lines, fields, strict=True))


# ---------------------------------------------------------------- demonstrators


@dataclasses.dataclass(frozen=True)
class DemonstratorConfig:
    """How demonstrations are made.

    The beam is drawn from `beam` (inclusive) once per problem; the children of
    APR draw theirs from that beam .. `sub_beam_high`. `spawn_probability` is the
    coin of SoS+ and APR. The fraction `condition` of the demonstrations carries
    its budget as a prefix (SoS+: tokens in bins of `token_bin`; APR: children).
    """

    method: Method
    beam: tuple[int, int]
    sub_beam_high: int
    spawn_probability: float
    condition: float
    token_bin: int

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if not 1 <= self.beam[0] <= self.beam[1]:
            raise ValueError(f"beam must satisfy 1 <= low <= high, not {self.beam}")
        if self.method == "apr" and self.sub_beam_high < self.beam[1]:
            raise ValueError(f"sub_beam_high must be at least the largest beam {self.beam[1]}, not {self.sub_beam_high}")
        for name in ("spawn_probability", "condition"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        if self.method == "sos" and self.condition:
            raise ValueError(f"SoS has no budget to condition on: condition must be 0, not {self.condition}")
        if self.token_bin < 1:
            raise ValueError(f"token_bin must be at least 1, not {self.token_bin}")


@dataclasses.dataclass
class Trace:
    """A thread of a demonstration: what call i writes, and the children of its i-th spawn."""

    prompt: str
    calls: list[str]
    spawns: list[list[Trace]]

    def width(self) -> int:
        """Number of child threads below this one."""
        return sum(1 + child.width() for children in self.spawns for child in children)


class Node(NamedTuple):
    """A state of the search. `born` are the lines that generated it; `cost` is its heuristic, low is good."""

    id: str
    numbers: list[int]
    operations: str  # as in the state line, without the brackets
    cost: float
    born: str
    parent: Node | None

    def __lt__(self, other: Node) -> bool:  # type: ignore[override]
        return self.cost < other.cost


class _Distances(dict[int, int]):
    """Distance of the values up to the target to what a heuristic likes, filled on demand.

    Above the target the distance is value - target for both heuristics.
    """

    def __init__(self, heuristic: str, target: int):
        small = [f for f in range(1, int(target**0.5) + 1) if target % f == 0] if heuristic == "multiply" else []
        self.liked = {f for s in small for f in (s, target // s) if f > 1} | {target}

    def __missing__(self, value: int) -> int:
        self[value] = min(abs(value - liked) for liked in self.liked)
        return self[value]


_distances = functools.lru_cache(maxsize=1024)(_Distances)
_PAIRS = {n: list(itertools.combinations(range(n), 2)) for n in range(2, 7)}


def expand(numbers: list[int], target: int, heuristic: str = "multiply") -> list[tuple[float, str, list[int]]]:
    """Every child of a state as (cost, operation, numbers left), best first, ties in order of generation.

    "multiply" sums the distances of the numbers left to the nearest factor >= 2
    of the target; "sum" is the mean distance to the target.
    """
    near = _distances(heuristic, target)
    costs = [near[value] if value <= target else value - target for value in numbers]
    total = sum(costs)
    size = len(numbers) - 1 if heuristic == "sum" else 1
    children = []
    for i, j in _PAIRS[len(numbers)]:
        rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
        others = total - costs[i] - costs[j]
        for result, operation in combine(numbers[i], numbers[j]):
            cost = others + (near[result] if result <= target else result - target)
            children.append((cost / size, operation, [*rest, result]))
    children.sort(key=operator.itemgetter(0))
    return children


def _state(node: Node, target: int) -> str:
    return f"Current State: {target}:{node.numbers}, Operations: [{node.operations}]\n"


def _announce(node: Node, target: int) -> str:
    return f"Moving to Node #{node.id}\n{_state(node, target)}"


def _child(node: Node, id: str, cost: float, operation: str, numbers: list[int], born: str) -> Node:
    before = f"{node.operations}, " if node.operations else ""
    return Node(id, numbers, f"{before}'{operation}'", cost, born, node)


_cost = operator.attrgetter("cost")


class _Search:
    """Best-first search over a frontier, written down as one thread.

    Each round takes the `beam` best nodes of the frontier, lists the children
    of each, and adds them to the frontier. This is a child thread of APR; the
    subclasses are the other searches.
    """

    restates = True  # the path is restated after the goal
    pushes_leaves = False  # single numbers join the frontier too

    def __init__(self, root: Node, target: int, beam: int, rng: random.Random, heuristic: str = "multiply"):
        self.root, self.target, self.beam, self.rng, self.heuristic = root, target, beam, rng, heuristic
        self.lines: list[str] = []  # of the current call
        self.trace = Trace(_announce(root, target), [], [])

    def run(self) -> Node | None:
        """Searches from the root, finishes `trace`, and returns the leaf that reached the goal."""
        goal = self.search(self.root, 0)
        if goal is None:
            self.lines.append("No solution found.\n" if self.restates else "No solution found.")
        self.trace.calls.append("".join(self.lines))
        return goal

    def search(self, root: Node, level: int) -> Node | None:
        """Searches below `root`; `level` counts the searches around this one."""
        frontier = [root]
        while frontier:
            batch = [heapq.heappop(frontier) for _ in range(min(self.beam, len(frontier)))]
            for node in batch:
                if node is not root:
                    self.lines.append(_announce(node, self.target))
                children, goal = self.list_children(node)
                if goal is None and self.is_promising(children):
                    goal = self.hand_out(children, level + 1)
                else:
                    for child in children:
                        heapq.heappush(frontier, child)
                if goal is not None:
                    return goal
        return None

    def list_children(self, node: Node) -> tuple[list[Node], Node | None]:
        """Lists the best children in random order; returns them best first, and the leaf that reached the goal."""
        if len(node.numbers) == 1:
            return [], None
        options = expand(node.numbers, self.target, self.heuristic)[: self.beam]
        self.rng.shuffle(options)
        children: list[Node] = []
        for cost, operation, numbers in options:
            born = f"Exploring Operation: {operation}, Resulting Numbers: {numbers}\n"
            if len(numbers) > 1:
                id = f"{node.id},{len(children)}"
                born += f"Generated Node #{id}: {self.target}:{numbers} Operation: {operation}\n"
                self.lines.append(born)
                children.append(_child(node, id, cost, operation, numbers, born))
                continue
            self.lines.append(born)
            if numbers[0] == self.target:
                goal = _child(node, "", cost, operation, numbers, born)
                self.reach(goal)
                return [], goal
            self.lines.append(f"{numbers[0]},{self.target} unequal: No Solution\n")
            if self.pushes_leaves:  # all with the same id, as in the released code
                children.append(_child(node, f"{node.id},0", cost, operation, numbers, born))
        children.sort(key=_cost)
        return children, None

    def reach(self, goal: Node) -> None:
        """Writes that the goal is reached, and restates the path to it from the root of the thread."""
        verdict = f"{self.target},{self.target}{GOAL}"
        self.lines.append(verdict)
        if self.restates:
            path, node = [verdict], goal
            while node is not self.root and node.parent is not None:
                path += [node.born, _announce(node.parent, self.target)]
                node = node.parent
            self.lines += reversed(path)

    def is_promising(self, children: list[Node]) -> bool:
        """Whether the children are handed out to searches of their own instead of joining the frontier."""
        return False

    def hand_out(self, children: list[Node], level: int) -> Node | None:
        """Searches the children apart, at `level`; returns the leaf that reached the goal."""
        raise NotImplementedError


class _BreadthFirst(_Search):
    """SoS breadth-first: stops at the goal, and announces leaves that lost before."""

    restates = False
    pushes_leaves = True


class _DepthFirst(_Search):
    """SoS depth-first: children that cost more than the target are pruned, the rest searched one after another."""

    def run(self) -> Node | None:
        """Searches from the root; says nothing more when everything is pruned."""
        goal = self.search(self.root, 0)
        self.trace.calls.append("".join(self.lines))
        return goal

    restates = False

    def search(self, root: Node, level: int) -> Node | None:
        """Searches the whole subtree of a child before its sibling, for which the parent is announced again."""
        kept = [option for option in expand(root.numbers, self.target, self.heuristic) if option[0] <= self.target]
        for i, (cost, operation, numbers) in enumerate(kept):
            if i:
                self.lines.append(_announce(root, self.target))
            id = f"{root.id},{i}"
            child = _child(root, id, cost, operation, numbers, "")
            self.lines.append(f"Exploring Operation: {operation}, Resulting Numbers: {numbers}\n")
            if len(numbers) > 1:
                self.lines.append(f"Generated Node #{id}: {self.target}:{numbers} Operation: {operation}\n")
                self.lines.append(_announce(child, self.target))
                if goal := self.search(child, level):
                    return goal
            elif numbers[0] == self.target:
                self.reach(child)
                return child
            else:
                self.lines.append(f"{numbers[0]},{self.target} unequal: No Solution\n")
        return None


class _Hybrid(_Search):
    """SoS+: the children of a promising node are searched in place, one after another."""

    def __init__(self, root: Node, target: int, beam: int, rng: random.Random, probability: float):
        super().__init__(root, target, beam, rng)
        self.probability = probability

    def is_promising(self, children: list[Node]) -> bool:
        """Tosses the coin."""
        return bool(children) and self.rng.random() < self.probability

    def hand_out(self, children: list[Node], level: int) -> Node | None:
        """Searches each child in a sub-search of this thread."""
        for child in children:
            self.lines.append(f"Start Sub Search at level {level}: {_announce(child, self.target)}")
            goal = self.search(child, level)
            if goal is not None:
                self.lines.append(f"Exit Sub Search at level {level}\n")
                return goal
            self.lines.append(
                f"No solution found.\nExit Sub Search at level {level}\nNo solution found in sub search\n"
            )
        return None


class _Parallel(_Hybrid):
    """APR: the children of a promising node become threads; they do not spawn in turn."""

    def __init__(
        self, root: Node, target: int, beam: int, rng: random.Random, probability: float, sub_beam: int
    ):
        super().__init__(root, target, beam, rng, probability)
        self.sub_beam = sub_beam

    def is_promising(self, children: list[Node]) -> bool:
        """Tosses the coin, but not for an only child."""
        return len(children) > 1 and super().is_promising(children)

    def hand_out(self, children: list[Node], level: int) -> Node | None:
        """Spawns a thread per child and goes on with the first success."""
        starts = [f"<Start Sub Search {i} at level {level}> Moving to Node #{c.id}\n" for i, c in enumerate(children)]
        self.trace.calls.append("".join([*self.lines, lexicon.CALL, *starts, lexicon.SPAWN]))
        self.lines = []
        searches = [_Search(child, self.target, self.sub_beam, self.rng) for child in children]
        goals = [search.run() for search in searches]
        self.trace.spawns.append([search.trace for search in searches])
        goal = next((goal for goal in goals if goal is not None), None)
        if goal is not None:
            self.reach(goal)
        return goal


def demonstrate(problem: Problem, config: DemonstratorConfig, rng: random.Random) -> Trace:
    """One demonstration as text; all choices come from `rng`."""
    target, root = problem.target, Node("0", list(problem.numbers), "", 0, "", None)
    search: _Search
    if config.method == "sos":
        heuristic = rng.choice(("sum", "multiply"))
        strategy = rng.choice((_DepthFirst, _BreadthFirst))
        search = strategy(root, target, rng.randint(*config.beam), rng, heuristic)
    elif config.method == "sosp":
        search = _Hybrid(root, target, rng.randint(*config.beam), rng, config.spawn_probability)
    else:
        beam = rng.randint(*config.beam)
        sub_beam = rng.randint(beam, config.sub_beam_high)
        search = _Parallel(root, target, beam, rng, config.spawn_probability, sub_beam)
    search.run()
    if config.method != "apr":
        search.trace.prompt = _state(root, target)
    return search.trace


# ---------------------------------------------------------------- the task, as the runtime sees it

_CHILD_PROMPT = re.compile(f"Moving to Node #({_FIELDS['node']})\n")
_KNOWN = re.compile(
    f"Current State: {_NUMBER}:[^\n]*, Operations: (?P<operations>{_FIELDS['operations']})\n"
    f"|^Generated Node #(?P<node>{_FIELDS['node']}): (?P<state>{_NUMBER}:{_FIELDS['numbers']})"
    f" Operation: (?P<operation>{_OPERATION})\n",
    re.MULTILINE,
)
_ANSWER = re.compile(f"(?:Exit Sub Search at level {_NUMBER}\n)*")  # all that may follow the last goal


class Countdown:
    """The `parallel_runtime.Task` of Countdown.

    `sub_calls` and `token_budget` ask for an amount of search by the prefixes
    that demonstrations with `condition` carry; None asks for nothing.
    """

    def __init__(
        self, tokenizer: Tokenizer, method: Method, sub_calls: int | None = None, token_budget: int | None = None
    ):
        """Raises ValueError for an unknown method or a negative budget."""
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
        for name, budget in (("sub_calls", sub_calls), ("token_budget", token_budget)):
            if budget is not None and budget < 0:
                raise ValueError(f"{name} must not be negative, it is {budget}")
        self.tokenizer, self.method = tokenizer, method
        self.end_id, self.spawn_id = lexicon.END, tokenizer.id(lexicon.SPAWN)
        self.call_id = tokenizer.id(lexicon.CALL)
        self.child_prefix = "" if token_budget is None else f"Token Budget: {token_budget} "
        self.root_prefix = self.child_prefix + ("" if sub_calls is None else f"Sub Call Budget: {sub_calls} ")

    def prompt(self, problem: Problem) -> list[int]:
        """Prompt of the root thread: APR announces its root, SoS and SoS+ only state it."""
        move = "Moving to Node #0\n" if self.method == "apr" else ""
        state = f"Current State: {problem.target}:{list(problem.numbers)}, Operations: []\n"
        return self.tokenizer.encode(f"{self.root_prefix}{move}{state}")

    def spawn(self, ids: Sequence[int]) -> Spawn:
        """Reads the spawn block that ends `ids`; raises MalformedSpawn saying what is wrong with it."""
        start = next((i for i in reversed(range(len(ids))) if ids[i] == self.call_id), None)
        if start is None:
            raise MalformedSpawn(f"no {lexicon.CALL.strip()} before {lexicon.SPAWN.strip()}")
        before = self.tokenizer.decode(ids[:start])
        if not before.endswith("\n"):
            raise MalformedSpawn(f"the spawn block does not start a line but follows {before[-20:]!r}")
        try:
            lines = parse(self.tokenizer.decode(ids[start:]))
        except ValueError as error:
            raise MalformedSpawn(f"spawn block: {error}") from None
        nodes = self._check_starts(before, lines[1:-1])
        known = _known_nodes(before)
        for node in nodes:
            if node not in known:
                raise MalformedSpawn(f"node #{_short(node)} was never generated")
        prompts = [f"{self.child_prefix}Moving to Node #{node}\nCurrent State: {known[node]}\n" for node in nodes]
        return Spawn(start, [self.tokenizer.encode(prompt) for prompt in prompts])

    def _check_starts(self, before: str, starts: list[Line]) -> list[str]:
        """Nodes of a spawn block in order; raises MalformedSpawn."""
        if not starts:
            raise MalformedSpawn("a spawn of no children")
        own = _CHILD_PROMPT.search(before)
        is_root = own is None or own[1] == "0"
        level = starts[0].level
        if level < 1 or is_root != (level == 1):
            raise MalformedSpawn(f"level {_short(level)} in a spawn of {'the root' if is_root else 'a child'}")
        for i, line in enumerate(starts):
            if line.kind != "start":
                raise MalformedSpawn(f"line {i + 2} of the spawn block starts no sub search: {render([line]).strip()}")
            if (line.number, line.level) != (i, level):
                raise MalformedSpawn(
                    f"sub search {_short(line.number)} at level {_short(line.level)} where {i} at level {level} is due"
                )
        nodes = [line.node for line in starts]
        if len(set(nodes)) < len(nodes):
            twice = next(node for node in nodes if nodes.count(node) > 1)
            raise MalformedSpawn(f"node #{_short(twice)} is named twice")
        return nodes

    def join(self, children: Sequence[Thread]) -> list[int]:
        """Join block: a line per child, and the final path of every child that ended with one."""
        text = ["<Sub Searches>\n"]
        for i, child in enumerate(children):
            own = _CHILD_PROMPT.search(self.tokenizer.decode(child.calls[0].injected))
            if own is None:
                raise ValueError(f"the prompt of child {child.path} names no node")
            where = f"in Sub Search {i} at level {len(child.path) // 2} at Node #{own[1]}>\n"
            path = self._final_path(child, own[0])
            text.append(f"<Goal Reached {where}{path}" if path else f"<No Solution {where}")
        return self.tokenizer.encode("".join([*text, "<End Sub Searches>\n"]))

    def _final_path(self, child: Thread, first_line: str) -> str:
        """The path a child restated at its end: from its own node to the goal; "" if it did not."""
        if child.stop != parallel_runtime.END:
            return ""
        parts = self.tokenizer.decode(child.ids()[:-1]).rsplit(GOAL, 2)
        if len(parts) < 3 or parts[2] or not parts[1].startswith(first_line):
            return ""
        try:
            lines = parse(parts[1] + GOAL)
        except ValueError:
            return ""
        return render(lines) if {line.kind for line in lines} <= {"move", "state", "explore", "generate", "goal"} else ""

    def grade(self, problem: Problem, root: Thread) -> Grade:
        """Judges the answer of a root thread: the operations of its last state and the one that reached the goal."""
        if root.stop != parallel_runtime.END:
            return Grade(False, f"no answer: stopped by {root.stop}")
        text = self.tokenizer.decode(root.ids()[:-1])
        end = text.rfind(GOAL) + len(GOAL)
        if end < len(GOAL) or not _ANSWER.fullmatch(text, end):
            return Grade(False, "no answer")
        try:
            state, *lines = parse(text[max(text.rfind("Current State: ", 0, end), 0) : end])
        except ValueError as error:
            return Grade(False, f"no answer: {error}")
        kinds = [line.kind for line in lines]
        if state.kind != "state" or kinds[-2:] != ["explore", "goal"] or {*kinds[:-2]} - {"explore", "generate", "miss"}:
            return Grade(False, "no answer: no operation reaches the goal from a state")
        return grade_steps(problem, (*state.operations, lines[-2].operation))


def _known_nodes(text: str) -> dict[str, str]:
    """Nodes generated in a text -> their state as a state line writes it, without its first words."""
    nodes: dict[str, str] = {}
    operations = "[]"
    for match in _KNOWN.finditer(text):
        if match["node"] is None:
            operations = match["operations"]
        else:
            before = "" if operations == "[]" else f"{operations[1:-1]}, "
            nodes[match["node"]] = f"{match['state']}, Operations: [{before}'{match['operation']}']"
    return nodes


# ---------------------------------------------------------------- demonstrations as records


def record(problem: Problem, trace: Trace, task: Countdown) -> Rollout:
    """The `Rollout` the runtime would have recorded, had the model of `task` written `trace`."""

    def thread(trace: Trace, prefix: str, path: tuple[int, ...]) -> Thread:
        result = Thread(path)
        keep, injected = 0, task.tokenizer.encode(prefix + trace.prompt)
        context: list[int] = []
        for i, text in enumerate(trace.calls):
            call = Call(keep, injected, task.tokenizer.encode(text))
            result.calls.append(call)
            if i == len(trace.spawns):
                call.sampled.append(task.end_id)
                continue
            call.stop = parallel_runtime.SPAWN
            context = context[:keep] + injected + call.sampled
            children = [thread(child, task.child_prefix, (*path, i, j)) for j, child in enumerate(trace.spawns[i])]
            result.spawns.append(children)
            keep = len(context) - 1 - context[::-1].index(task.call_id)
            injected = task.join(children)
        return result

    root = thread(trace, task.root_prefix, ())
    return Rollout(problem, root, task.grade(problem, root))


def demonstration(
    family: ProblemRange, config: DemonstratorConfig, tokenizer: Tokenizer, split: Split, seed: int, index: int
) -> Rollout:
    """Demonstration number `index`: (seed, index) fixes everything, in any process. Raises as `problem` does."""
    rng = random.Random(f"demonstration {config} {split} {seed} {index}")
    drawn = problem(family, split, seed, index)
    trace = demonstrate(drawn, config, rng)
    sub_calls = token_budget = None
    if rng.random() < config.condition:
        if config.method == "apr":
            sub_calls = trace.width()
        else:
            tokens = 1 + len(tokenizer.encode("".join([trace.prompt, *trace.calls])))
            token_budget = -(-tokens // config.token_bin) * config.token_bin
    return record(drawn, trace, Countdown(tokenizer, config.method, sub_calls, token_budget))


# ---------------------------------------------------------------- command line


class _UsageError(ValueError):
    """The command line is wrong."""


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_list("numbers", None, "The numbers, separated by commas.", flag_values=values)
    flags.DEFINE_integer("target", None, "The target.", flag_values=values)
    flags.DEFINE_enum("method", "apr", METHODS, "The demonstrator.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Seed of the demonstrator's choices.", flag_values=values)
    flags.DEFINE_bool("json", False, "Print the record (ids) instead of the text.", flag_values=values)
    flags.DEFINE_string("grade", None, "Judge this path instead: exit status 0 if it is right.", flag_values=values)
    flags.DEFINE_bool("help", False, "Print this help.", flag_values=values)
    return values


def _problem_of(values: flags.FlagValues) -> Problem:
    if values.numbers is None or values.target is None:
        raise _UsageError("--numbers and --target are needed, e.g. --numbers=22,26,31,53 --target=27")
    bad = [number for number in values.numbers if not re.fullmatch("[0-9]{1,10}", number)]
    if bad:
        raise _UsageError(f"--numbers must be positive integers separated by commas, not {bad[0]!r}")
    return Problem(tuple(int(number) for number in values.numbers), values.target)


def _lines_of(rollout: Rollout, tokenizer: Tokenizer) -> Iterator[str]:
    """The threads of a rollout as text, each with a heading."""
    for thread in rollout.threads():
        name = "root" if not thread.path else "child " + ".".join(map(str, thread.path))
        for i, call in enumerate(thread.calls):
            yield f"--- {name}, call {i}{' (after the join)' if i else ''}"
            yield (tokenizer.decode(call.injected) + tokenizer.decode(call.sampled)).replace("<|end|>", "").rstrip("\n")
    yield f"--- {'solved' if rollout.grade.correct else 'not solved: ' + rollout.grade.reason}"
    if rollout.grade.answer:
        yield ", ".join(rollout.grade.answer)


def main(arguments: Sequence[str]) -> int:
    """Command line: prints a demonstration or judges a path; returns the exit status (2 for bad input)."""
    values = _define_flags()
    try:
        extra = values(list(arguments))[1:]
        if extra:
            raise _UsageError(f"unexpected argument {extra[0]!r}")
        if values.help:
            print(f"{__doc__}\n{values.main_module_help() or values.get_help()}")
            return 0
        problem = _problem_of(values)
    except (flags.Error, ValueError) as error:
        print(f"solver.py: {error}", file=sys.stderr)
        return 2
    if values.grade is not None:
        grade = grade_path(problem, values.grade)
        print("correct" if grade.correct else grade.reason)
        return 0 if grade.correct else 1
    tokenizer = Tokenizer(number_limit=10)
    beam, coin = ((1, 10), 0.9) if values.method == "apr" else ((1, 5), 0.5)
    config = DemonstratorConfig(values.method, beam, 15, coin, condition=0, token_bin=512)
    trace = demonstrate(problem, config, random.Random(values.seed))
    rollout = record(problem, trace, Countdown(tokenizer, values.method))
    print(json.dumps(dataclasses.asdict(rollout)) if values.json else "\n".join(_lines_of(rollout, tokenizer)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
