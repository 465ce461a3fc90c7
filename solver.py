"""Countdown: problems, the exact grader, demonstrations, and the task the runtime runs.

Countdown: combine the given numbers, each exactly once, with + - * / to reach
the target. Symbolic demonstrators search for a solution and write the search
down; a model trained on the text learns to search (paper section 4).

  1. `problem` draws a solvable problem; training, validation and held-out problems
     are told apart by a hash of the problem itself, so no seed can mix them.
  2. `demonstrate` has one of the searches of `search.py` write a `Trace` (text);
     `record` turns it into the `Rollout` that the runtime would have recorded,
     had the model written that text.
  3. `Countdown` is the `parallel_runtime.Task`: spawn block -> prompts of the
     children, children -> join block, root thread -> `Grade`. Model output is
     data: strictly matched, never evaluated.
  4. One exact grader (`grade_steps`) judges demonstrations and rollouts alike.
  5. Ablations are variants of the task: a join that hands over all that a child
     wrote, children that inherit their parent's context.

Deviations from the paper and its released code (see also `search.py`):
  - Problems of a small family are drawn uniformly among the solvable ones; of a
    large one, the target first and then numbers until they reach it.
  - `Token Budget` is the multiple of the bin that holds the whole trace.
  - The path a child hands back is the text after its second-to-last `Goal
    Reached`, as there, but only if it parses and starts at the child's own node.

Run: python solver.py --numbers=22,26,31,53 --target=27 --method=apr --seed=0
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import random
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal

from absl import flags

import parallel_runtime
from parallel_runtime import Call, Grade, MalformedSpawn, Rollout, Spawn, Thread
from search import BreadthFirst, DepthFirst, Hybrid, Node, Parallel, Search, Trace, spawn_block, state_line
from tokenizer import CALL, END, FIELDS, GOAL, NUMBER, OPERATION, SPAWN, Tokenizer, parse, render, short

Split = Literal["train", "validation", "heldout"]
Method = Literal["sos", "sosp", "apr"]
METHODS = ("sos", "sosp", "apr")
JOINS = ("path", "text")
ORDERS = ("fixed", "random")
LISTED = 3000  # families with at most this many sets of numbers are listed whole
LARGEST = 10**9  # of a number or target: keeps factoring and arithmetic cheap
MOST = 6  # numbers of a problem: exact search over more takes too long

# ---------------------------------------------------------------- problems


@dataclasses.dataclass(frozen=True)
class Problem:
    """Reach `target` with every one of `numbers` exactly once; ValueError unless all are positive integers.

    ValueError too if there are so many numbers that exact search, by which all is judged, would take too long.
    """

    numbers: tuple[int, ...]
    target: int

    def __post_init__(self) -> None:
        if not 2 <= len(self.numbers) <= MOST:
            raise ValueError(f"a problem needs from 2 to {MOST} numbers, not {len(self.numbers)}")
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
        if not 2 <= self.count <= MOST:
            raise ValueError(f"count of numbers must be from 2 to {MOST}, not {self.count}")
        for name, low, high in (
            ("numbers", self.low, self.high),
            ("targets", self.target_low, self.target_high),
        ):
            if not 1 <= low <= high <= LARGEST:
                raise ValueError(f"range of {name} must satisfy 1 <= low <= high <= {LARGEST}, not {low}..{high}")


def split_of(numbers: Sequence[int], target: int) -> Split:
    """The split of a problem, by a stable hash of sorted numbers and target, whatever the seed.

    One in ten is held out for tests, one in ten chooses checkpoints (validation), the rest is trained on.
    """
    key = f"{sorted(numbers)} {target}".encode()
    tenth = hashlib.blake2b(key, digest_size=4).digest()[0] % 10
    return "heldout" if tenth == 0 else "validation" if tenth == 1 else "train"


@functools.lru_cache(maxsize=8)
def _listing(family: ProblemRange, split: Split) -> tuple[Problem, ...] | None:
    """Every solvable problem of a split (sorted numbers), or None if the family is too large to list."""
    pool = range(family.low, family.high + 1)
    if math.comb(len(pool) + family.count - 1, family.count) > LISTED:
        return None
    return tuple(
        Problem(numbers, target)
        for numbers in itertools.combinations_with_replacement(pool, family.count)
        for target in sorted(_reachable(numbers))
        if family.target_low <= target <= family.target_high and split_of(numbers, target) == split
    )


def problem(family: ProblemRange, split: Split, seed: int, index: int) -> Problem:
    """Solvable problem number `index` of a split: the same in every process; splits never share one.

    Raises ValueError if the split has no solvable problem (for families too large
    to list: if 20,000 draws met none).
    """
    rng = random.Random(f"problem {family} {split} {seed} {index}")
    listing = _listing(family, split)
    if listing is None:
        for draw in range(20_000):
            if draw % 1000 == 0:  # the target first, then numbers until they can reach it, but not for ever
                target = rng.randint(family.target_low, family.target_high)
            numbers = tuple(rng.randint(family.low, family.high) for _ in range(family.count))
            if split_of(numbers, target) == split and solvable(numbers, target):
                return Problem(numbers, target)
    if not listing:
        raise ValueError(f"{family} has no solvable problem for the {split} split: widen its ranges")
    drawn = rng.choice(listing)
    return Problem(tuple(rng.sample(drawn.numbers, family.count)), drawn.target)


@functools.lru_cache(maxsize=8)
def problems_of(family: ProblemRange, split: Split, n: int) -> tuple[Problem, ...]:
    """`n` problems of a split, always the same, distinct as sorted numbers and target.

    Raises ValueError saying how many exist if there are fewer.
    """
    listing = _listing(family, split)
    found: dict[str, Problem] = {}
    for index in range(0 if listing is not None and len(listing) < n else 100 * n):
        drawn = problem(family, split, 0, index)
        found.setdefault(f"{sorted(drawn.numbers)} {drawn.target}", drawn)
        if len(found) == n:
            return tuple(found.values())
    count = len(found) if listing is None else len(listing)
    raise ValueError(f"{family} has only {count} problems for the {split} split, {n} were asked for: widen its ranges")


# ---------------------------------------------------------------- exact search and the grader


@functools.cache
def _splits(n: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Every way to part n indices in two, each once, the smaller part first."""
    parts = [part for size in range(1, n // 2 + 1) for part in itertools.combinations(range(n), size)]
    return tuple((p, tuple(i for i in range(n) if i not in p)) for p in parts if 2 * len(p) < n or 0 in p)


@functools.lru_cache(maxsize=1 << 12)
def _reachable(numbers: tuple[int, ...]) -> set[int]:
    """Every value that uses each of `numbers` exactly once (not to be changed: it is kept)."""
    if len(numbers) == 1:
        return set(numbers)
    values: set[int] = set()
    for part, rest in _splits(len(numbers)):
        others = _reachable(tuple([numbers[i] for i in rest]))
        for a in _reachable(tuple([numbers[i] for i in part])):
            for b in others:
                values.update((a + b, a * b, abs(a - b)))
                if b and a % b == 0:
                    values.add(a // b)
                elif a and b % a == 0:
                    values.add(b // a)
    return values


def solvable(numbers: Sequence[int], target: int) -> bool:
    """Whether `target` can be reached; meets in the middle: the last operation is undone, not tried."""
    for part, rest in _splits(len(numbers)):
        others = _reachable(tuple([numbers[i] for i in rest]))
        # Is there a b among the others with a+b, a-b, b-a, a*b, a/b or b/a the target?
        for a in _reachable(tuple([numbers[i] for i in part])):
            if target - a in others or a - target in others or target + a in others:
                return True
            if a and (target * a in others or (target % a == 0 and target // a in others)):
                return True
            if a and a % target == 0 and a // target in others:
                return True
    return False


_STEP = re.compile(f"({NUMBER})([-+*/])({NUMBER})=({NUMBER})")


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
            return Grade(False, f"malformed step: {short(step)}", answer)
        a, sign, b, result = int(match[1]), match[2], int(match[3]), int(match[4])
        for operand in (a, b):
            if operand not in available:
                return Grade(False, f"{short(operand)} is not available", answer)
            available.remove(operand)
        if error := _step_error(a, sign, b, result):
            return Grade(False, f"{error}: {short(step)}", answer)
        available.append(result)
    if len(available) > 1:
        return Grade(False, f"unused number {short(available[0])}", answer)
    if available[0] != problem.target:
        return Grade(False, f"ends at {short(available[0])}, not {problem.target}", answer)
    return Grade(True, "", answer)


def grade_path(problem: Problem, text: str) -> Grade:
    """Judges a path written as '53-31=22, 22/22=1, 1+26=27'."""
    return grade_steps(problem, [step.strip() for step in text.split(",")] if text.strip() else [])


# ---------------------------------------------------------------- demonstrations as text


@dataclasses.dataclass(frozen=True)
class DemonstratorConfig:
    """How demonstrations are made.

    The beam is drawn from `beam` (inclusive) once per problem; the children of
    APR draw theirs from that beam .. `sub_beam_high`. `spawn_probability` is the
    coin of SoS+ and APR. The fraction `condition` of the demonstrations carries
    its budget as a prefix (SoS+: tokens in bins of `token_bin`; APR: children).
    `order` is that in which a node lists its children (SoS depth-first: best
    first always): "random", as in the paper, or "fixed".
    """

    method: Method
    beam: tuple[int, int]
    sub_beam_high: int
    spawn_probability: float
    condition: float
    token_bin: int
    order: str = "random"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if not 1 <= self.beam[0] <= self.beam[1]:
            raise ValueError(f"beam must satisfy 1 <= low <= high, not {self.beam}")
        if self.method == "apr" and self.sub_beam_high < self.beam[1]:
            raise ValueError(f"sub_beam_high must be at least the beam, {self.beam[1]}, not {self.sub_beam_high}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {self.order!r}")
        for name in ("spawn_probability", "condition"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        if self.method == "sos" and self.condition:
            raise ValueError(f"SoS has no budget to condition on: condition must be 0, not {self.condition}")
        if self.token_bin < 1:
            raise ValueError(f"token_bin must be at least 1, not {self.token_bin}")


def demonstrate(problem: Problem, config: DemonstratorConfig, rng: random.Random) -> Trace:
    """One demonstration as text; every choice comes from `rng`."""
    target, root = problem.target, Node("0", list(problem.numbers), "", 0, "", None)
    beam = rng.randint(*config.beam)
    search: Search
    if config.method == "sos":
        strategy = rng.choice((DepthFirst, BreadthFirst))
        search = strategy(root, target, beam, rng, rng.choice(("sum", "multiply")))
    elif config.method == "sosp":
        search = Hybrid(root, target, beam, rng, config.spawn_probability)
    else:
        sub_beam = rng.randint(beam, config.sub_beam_high)
        search = Parallel(root, target, beam, rng, config.spawn_probability, sub_beam)
    search.fixed_order = config.order == "fixed"
    search.run()
    search.trace.prompt = root_prompt(problem, config.method)
    return search.trace


def root_prompt(problem: Problem, method: Method) -> str:
    """First lines of a root thread: APR announces its root, SoS and SoS+ only state it."""
    state = state_line(Node("0", list(problem.numbers), "", 0, "", None), problem.target)
    return f"Moving to Node #0\n{state}" if method == "apr" else state


# ---------------------------------------------------------------- the task, as the runtime sees it

_MOVE = re.compile(f"Moving to Node #({FIELDS['node']})\n")
# What a thread's text says of nodes: the operations of the current state, and the children generated from it.
_KNOWN = re.compile(
    f"Current State: [^\n]*, Operations: (?P<operations>{FIELDS['operations']})\n"
    f"|^Generated Node #(?P<node>{FIELDS['node']}): (?P<state>{NUMBER}:{FIELDS['numbers']})"
    f" Operation: (?P<operation>{OPERATION})\n",
    re.MULTILINE,
)
_EXITS = re.compile(f"(?:Exit Sub Search at level {NUMBER}\n)*")  # all that may follow the last goal
_PATH_KINDS = {"move", "state", "explore", "generate", "goal"}


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


class Countdown:
    """The `parallel_runtime.Task` of Countdown.

    `join` says what a child hands over: the path it found (APR), or all that it
    wrote, found or not (as in PASTA, arXiv 2502.11517). With `inherit` a child
    sees all that its parent saw before the spawn (as in ThreadWeaver, arXiv
    2512.07843), not its own node alone. `sub_calls` and `token_budget` ask for an
    amount of search by the prefixes that demonstrations with `condition` carry;
    None asks for nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        method: Method,
        join: str = "path",
        inherit: bool = False,
        sub_calls: int | None = None,
        token_budget: int | None = None,
    ):
        """Raises ValueError for an unknown method or join, or a negative budget."""
        for name, value, choices in (("method", method, METHODS), ("join", join, JOINS)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        for name, budget in (("sub_calls", sub_calls), ("token_budget", token_budget)):
            if budget is not None and budget < 0:
                raise ValueError(f"{name} must not be negative, it is {budget}")
        self.tokenizer, self.method, self.whole, self.inherit = tokenizer, method, join == "text", inherit
        self.variant = tokenizer, method, join, inherit
        self.end_id, self.spawn_id, self.call_id = END, tokenizer.id(SPAWN), tokenizer.id(CALL)
        self.child_prefix = "" if token_budget is None else f"Token Budget: {token_budget} "
        self.root_prefix = self.child_prefix or ("" if sub_calls is None else f"Sub Call Budget: {sub_calls} ")

    def asking(self, sub_calls: int | None, token_budget: int | None) -> Countdown:
        """This task with another budget."""
        return Countdown(*self.variant, sub_calls, token_budget)

    def prompt(self, problem: Problem) -> list[int]:
        """Prompt of the root thread."""
        return self.tokenizer.encode(self.root_prefix + root_prompt(problem, self.method))

    def spawn(self, ids: Sequence[int]) -> Spawn:
        """Reads the spawn block that ends `ids`; raises MalformedSpawn saying what is wrong with it."""
        start = next((i for i in reversed(range(len(ids))) if ids[i] == self.call_id), None)
        if start is None:
            raise MalformedSpawn(f"no {CALL.strip()} before {SPAWN.strip()}")
        before, block = self.tokenizer.decode(ids[:start]), self.tokenizer.decode(ids[start:])
        if not before.endswith("\n"):
            raise MalformedSpawn(f"the spawn block does not start a line, it follows {before[-20:]!r}")
        nodes = self._spawned(before, block)
        known = _known_nodes(before)
        for i, node in enumerate(nodes):
            if node not in known:
                raise MalformedSpawn(f"node #{short(node)} was never generated")
            if node in nodes[:i]:
                raise MalformedSpawn(f"node #{short(node)} is named twice")
        prompts = [f"Moving to Node #{node}\nCurrent State: {known[node]}\n" for node in nodes]
        return Spawn(start, [self.child_prompt(ids[:start], prompt) for prompt in prompts])

    def child_prompt(self, context: Sequence[int], prompt: str) -> list[int]:
        """Ids a child is given: its first lines, after its parent's context if it inherits that."""
        if self.inherit:
            return [*context, *self.tokenizer.encode(prompt)]
        return self.tokenizer.encode(self.child_prefix + prompt)

    def _spawned(self, before: str, block: str) -> list[str]:
        """Nodes that a well-formed spawn block names; raises MalformedSpawn.

        The root spawns at level 1. A child cannot see how deep it is, so any level above is right.
        """
        nodes = re.findall(f"> Moving to Node #({FIELDS['node']})\n", block)
        if not nodes:
            raise MalformedSpawn("the spawn block names no node")
        own = _MOVE.search(before)
        level = re.search(f" at level ({NUMBER})>", block)
        is_child = own is not None and own[1] != "0" and level is not None and level[1] not in "01"
        due = spawn_block(nodes, int(level[1]) if level is not None and is_child else 1)
        for line, expected in itertools.zip_longest(block.splitlines(), due.splitlines()):
            if line != expected:
                raise MalformedSpawn(f"spawn block: {short(line)!r} where {expected!r} is due")
        return nodes

    def join(self, children: Sequence[Thread]) -> list[int]:
        """Join block: a line per child, each success followed by the child's final path (or each by all its text)."""
        encode = self.tokenizer.encode
        ids = encode("<Sub Searches>\n")
        for i, child in enumerate(children):
            given = child.calls[0].injected
            own = [*_MOVE.finditer(self.tokenizer.decode(given))]
            if not own:
                raise ValueError(f"the prompt of child {child.path} names no node")
            where = f"in Sub Search {i} at level {len(child.path) // 2} at Node #{own[-1][1]}>\n"
            path = self._final_path(child, own[-1][0])
            ids += encode(f"<Goal Reached {where}" if path else f"<No Solution {where}")
            if self.whole:  # its very ids: not all that a model samples is what its text encodes to
                own_ids = [token for token in child.ids()[len(given) :] if token != END]
                ids += own_ids + encode("\n" * (self.tokenizer.decode(own_ids)[-1:] not in ("", "\n")))
            else:
                ids += encode(path)
        return ids + encode("<End Sub Searches>\n")

    def _final_path(self, child: Thread, first_line: str) -> str:
        """The path a child restated at its end, from its own node to the goal; "" if it did not."""
        if child.stop != parallel_runtime.END:
            return ""
        parts = self.tokenizer.decode(child.ids()[:-1]).rsplit(GOAL, 2)
        if len(parts) < 3 or parts[2] or not parts[1].startswith(first_line):
            return ""
        try:
            lines = parse(parts[1] + GOAL)
        except ValueError:
            return ""
        return render(lines) if {line.kind for line in lines} <= _PATH_KINDS else ""

    def answer(self, problem: Problem, ids: Sequence[int]) -> tuple[int, list[int]]:
        """Makes a root answer: the goal is claimed after its last whole line (again, where it is already).

        Claiming it plays the part of s1's end-of-thinking delimiter: what a trace says after it is the answer.
        """
        goal = self.tokenizer.id(GOAL)
        if goal in ids:
            return list(ids).index(goal), [goal]
        whole = [i for i, token in enumerate(ids) if self.tokenizer.decode([token]).endswith("\n")]
        claim = self.tokenizer.encode(f"{problem.target},{problem.target}{GOAL}")
        return whole[-1] + 1, claim

    def extend(self, ids: Sequence[int]) -> tuple[int, list[int]] | None:
        """Sends a root that found nothing on, to the first node that it listed and never moved to; None without one.

        The `Moving to Node` line plays the part of s1's "Wait"; it replaces the end and the line that gives up.
        """
        keep = len(ids) - 1 - (ids[-2] == self.tokenizer.id("No solution found.\n"))
        text = self.tokenizer.decode(ids[:keep])
        moved = {*re.findall(f"(?:Moving to|at) Node #({FIELDS['node']})>?\n", text)}
        left = [node for node in _known_nodes(text) if node not in moved]
        if not left or GOAL in text or not text.endswith("\n"):
            return None
        return keep, self.tokenizer.encode(f"Moving to Node #{left[0]}\n")

    def grade(self, problem: Problem, root: Thread) -> Grade:
        """Judges the answer of a root thread: the operations of its last state and the one that reached the goal."""
        if root.stop != parallel_runtime.END:
            return Grade(False, f"no answer: stopped by {root.stop}")
        text = self.tokenizer.decode(root.ids()[:-1])
        end = text.rfind(GOAL) + len(GOAL)
        if end < len(GOAL) or not _EXITS.fullmatch(text, end):
            return Grade(False, "no answer")
        try:
            state, *lines = parse(text[max(text.rfind("Current State: ", 0, end), 0) : end])
        except ValueError as error:
            return Grade(False, f"no answer: {error}")
        kinds = [line.kind for line in lines]
        if kinds[-2:] != ["explore", "goal"] or state.kind != "state" or {*kinds} - _PATH_KINDS - {"miss"}:
            return Grade(False, "no answer: no operation reaches the goal from a state")
        return grade_steps(problem, (*state.operations, lines[-2].operation))


# ---------------------------------------------------------------- demonstrations as records


def record(problem: Problem, trace: Trace, task: Countdown) -> Rollout:
    """The `Rollout` the runtime would have recorded, had the model of `task` written `trace`."""

    def thread(trace: Trace, prompt: list[int], path: tuple[int, ...]) -> Thread:
        result = Thread(path)
        keep, injected = 0, prompt
        context: list[int] = []
        for i, text in enumerate(trace.calls):
            call = Call(keep, injected, task.tokenizer.encode(text))
            result.calls.append(call)
            if i == len(trace.spawns):
                call.sampled.append(task.end_id)
                continue
            call.stop = parallel_runtime.SPAWN
            context = context[:keep] + injected + call.sampled
            keep = len(context) - 1 - context[::-1].index(task.call_id)
            prompts = [task.child_prompt(context[:keep], child.prompt) for child in trace.spawns[i]]
            result.spawns.append([thread(c, prompts[j], (*path, i, j)) for j, c in enumerate(trace.spawns[i])])
            injected = task.join(result.spawns[-1])
        return result

    root = thread(trace, task.tokenizer.encode(task.root_prefix + trace.prompt), ())
    return Rollout(problem, root, task.grade(problem, root))


def demonstration(
    family: ProblemRange, config: DemonstratorConfig, task: Countdown, split: Split, seed: int, index: int
) -> Rollout:
    """Demonstration number `index`, recorded as threads of `task` that may state their budget.

    (seed, index) fixes everything, in any process. Raises as `problem` does.
    """
    rng = random.Random(f"demonstration {config} {split} {seed} {index}")
    drawn = problem(family, split, seed, index)
    trace = demonstrate(drawn, config, rng)
    sub_calls = token_budget = None
    if rng.random() < config.condition:
        if config.method == "apr":
            sub_calls = trace.width()
        else:
            tokens = 1 + len(task.tokenizer.encode("".join([trace.prompt, *trace.calls])))
            token_budget = -(-tokens // config.token_bin) * config.token_bin
    return record(drawn, trace, task.asking(sub_calls, token_budget))


def stored(rollout: Rollout, method: Method, number_limit: int) -> dict[str, Any]:
    """What a trace file keeps: the record, and the `Tokenizer`'s limit to read its ids by (see figures.read_trace)."""
    return {"method": method, "number_limit": number_limit, "rollout": dataclasses.asdict(rollout)}


# ---------------------------------------------------------------- command line

NUMBER_LIMIT = 10  # of the tokenizer here: digit by digit


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_list("numbers", None, "The numbers, separated by commas.", flag_values=values)
    flags.DEFINE_integer("target", None, "The target.", flag_values=values)
    flags.DEFINE_enum("method", "apr", METHODS, "The demonstrator.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Seed of the demonstrator's choices.", flag_values=values)
    flags.DEFINE_bool("json", False, "Print a trace file (the record) instead of the text.", flag_values=values)
    flags.DEFINE_string("grade", None, "Judge this path instead: exit status 0 if it is right.", flag_values=values)
    flags.DEFINE_bool("help", False, "Print this help.", flag_values=values)
    return values


def _problem_of(values: flags.FlagValues) -> Problem:
    if not values.numbers or values.target is None:
        raise ValueError("--numbers and --target are needed, e.g. --numbers=22,26,31,53 --target=27")
    for number in values.numbers:
        if not re.fullmatch("[0-9]{1,10}", number):
            raise ValueError(f"--numbers must be positive integers separated by commas, not {number!r}")
    return Problem(tuple(int(number) for number in values.numbers), values.target)


def _show(rollout: Rollout, tokenizer: Tokenizer) -> None:
    """Prints the threads of a rollout, then the verdict."""
    for thread in rollout.threads():
        name = "root" if not thread.path else "child " + ".".join(map(str, thread.path))
        for i, call in enumerate(thread.calls):
            print(f"--- {name}{', after join ' + str(i) if i else ''}")
            print(tokenizer.decode([*call.injected, *call.sampled]).removesuffix("<|end|>").removesuffix("\n"))
    print(f"--- {'solved' if rollout.grade.correct else 'not solved'}")
    print(rollout.grade.reason or ", ".join(rollout.grade.answer))


def main(arguments: Sequence[str]) -> int:
    """Prints a demonstration or judges a path; returns the exit status (1: a wrong path, 2: bad input)."""
    values = _define_flags()
    try:
        if unexpected := values(list(arguments))[1:]:
            raise ValueError(f"unexpected argument {unexpected[0]!r}")
        if values.help:
            print(f"{__doc__}\n{values.get_help()}")
            return 0
        problem = _problem_of(values)
    except (flags.Error, ValueError) as error:
        print(f"solver.py: {error}", file=sys.stderr)
        return 2
    if values.grade is not None:
        grade = grade_path(problem, values.grade)
        print("correct" if grade.correct else grade.reason)
        return 0 if grade.correct else 1
    tokenizer = Tokenizer(NUMBER_LIMIT)
    beam, coin = ((1, 10), 0.9) if values.method == "apr" else ((1, 5), 0.5)  # the paper's
    config = DemonstratorConfig(values.method, beam, 15, coin, condition=0, token_bin=512)
    trace = demonstrate(problem, config, random.Random(values.seed))
    rollout = record(problem, trace, Countdown(tokenizer, values.method))
    if values.json:
        print(json.dumps(stored(rollout, values.method, NUMBER_LIMIT)))
    else:
        _show(rollout, tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
