"""Symbolic search on Countdown, written down as text: SoS, SoS+ and APR (paper section 4), or a solution alone.

  1. `countdown.states` makes every child of a state (each pair of numbers, each
     legal operation) and ranks the children by a heuristic.
  2. A search takes the best nodes off a heap. For each it lists the best `beam`
     children in random order (that numbers them) and pushes them, best first.
     A goal met while listing ends the search. `fixed_order` lists them in order of
     generation instead, and spawns them in that order: a model need not guess it.
     `prunes` leaves out repeated states and children that cost more than the target.
     `cost_limit` writes down every operation, and makes nodes of those alone that
     lead near enough: a model then judges each by what it has just written.
  3. SoS is this search (`BreadthFirst`), or depth-first with pruning
     (`DepthFirst`). SoS+ (`Hybrid`) searches the children of a node in place
     where a coin says so; APR (`Parallel`) spawns them there as child threads,
     and goes on with the path of the first that succeeded. With `depth` above 1
     the children spawn in turn. `spawn_when` replaces the coin by a rule.

Given the same random choices, every search writes what the released codes write,
to the byte (a test replays their 90 reference traces), but for one deviation: a
search that goes on after a failed join announces the node it moves to; the
released generator lost most of these lines. The coin is only tossed for nodes
that have children to hand out.

`solver.py` runs these searches on problems: python solver.py --help
"""

from __future__ import annotations

import dataclasses
import heapq
import operator
import random

from countdown.language import CALL_TEXT, GOAL_TEXT, SPAWN_TEXT
from countdown.states import Child, best_first, expand, pruned, solutions

LARGE_NUMBERS = 3  # numbers left from which the search below a node counts as large


@dataclasses.dataclass
class Trace:
    """A thread of a demonstration: what call i writes, and the children of its i-th spawn."""

    prompt: str
    calls: list[str]
    spawns: list[list[Trace]]

    def child_threads(self) -> int:
        """Number of child threads below this one."""
        return sum(1 + child.child_threads() for children in self.spawns for child in children)


@dataclasses.dataclass(slots=True, eq=False)
class Node:
    """A state of the search. `text` are the lines that generated it; `cost` is its heuristic, low is good."""

    id: str
    numbers: list[int]
    operations: str  # as in the state line, without the brackets
    cost: float
    text: str
    parent: Node | None

    def __lt__(self, other: Node) -> bool:
        return self.cost < other.cost


def state_line(node: Node, target: int) -> str:
    return f"Current State: {target}:{node.numbers}, Operations: [{node.operations}]\n"


def announce(node: Node, target: int) -> str:
    return f"Moving to Node #{node.id}\n{state_line(node, target)}"


def explored(operation: str, numbers: list[int]) -> str:
    return f"Exploring Operation: {operation}, Resulting Numbers: {numbers}\n"


def spawn_block(nodes: list[str], level: int) -> str:
    """Text that starts a child thread per node."""
    starts = [f"<Start Sub Search {i} at level {level}> Moving to Node #{node}\n" for i, node in enumerate(nodes)]
    return "".join([CALL_TEXT, *starts, SPAWN_TEXT])


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a search proceeds, and those within it. The defaults are the released codes'."""

    heuristic: str = "multiply"  # which children are best (`countdown.states.expand`)
    fixed_order: bool = False  # children are listed in order of generation, not in random order
    prunes: bool = False  # neither repeated states are listed, nor children that cost more than the target
    # Where numbers are left, every operation is explored in order, and a new state that costs at most so much is
    # generated, until there are `beam`. -1: only the best children are explored, and all of those are generated.
    cost_limit: int = -1
    spawn_probability: float = 0.0  # of the coin of SoS+ and APR
    spawn_when: str = "coin"  # how a promising node is told: by lot ("coin"), or by what is left to search ("large")
    sub_beam: int = 0  # of child threads
    depth: int = 1  # levels of threads below the root's
    unjoined: int = -1  # most children that run while their parent lists others; -1: it waits for all at once


class Search:
    """Best-first search over a frontier, written down as one thread. `level` counts the searches around it.

    Each round takes the `beam` best nodes of the frontier, lists the children
    of each, and adds them to the frontier. This is a child thread of APR; the
    subclasses are the other searches.
    """

    restates = True  # the path is restated after the goal
    failure_text = "No solution found.\n"  # its last words without one
    pushes_leaves = False  # single numbers join the frontier too

    def __init__(self, root: Node, target: int, beam: int, rng: random.Random, rules: Rules, level: int = 0):
        self.root, self.target, self.beam, self.rng, self.rules, self.level = root, target, beam, rng, rules, level
        self.lines: list[str] = []  # of the current call
        self.trace = Trace(announce(root, target), [], [])

    def run(self) -> Node | None:
        """Searches from the root, finishes `trace`, and returns the leaf that reached the goal."""
        goal = self.search(self.root, self.level)
        if goal is None:
            self.lines.append(self.failure_text)
        self.trace.calls.append("".join(self.lines))
        return goal

    def search(self, root: Node, level: int) -> Node | None:
        """Searches below `root`; `level` counts the searches around this one."""
        frontier = [root]
        while frontier:
            batch = [heapq.heappop(frontier) for _ in range(min(self.beam, len(frontier)))]
            for node in batch:
                if node is not root:
                    self.lines.append(announce(node, self.target))
                children, goal = self.expand_node(node)
                if goal is None and self.is_promising(children):
                    goal = self.delegate(children, level + 1)
                else:
                    for child in children:
                        heapq.heappush(frontier, child)
                if goal is not None:
                    return goal
        return None

    def expand_node(self, node: Node) -> tuple[list[Node], Node | None]:
        """Lists the best children, or those within the cost limit; returns them best first, and a leaf at the goal."""
        if len(node.numbers) == 1:
            return [], None
        rules, every = self.rules, expand(node.numbers, self.target, self.rules.heuristic)
        place = {id(option): number for number, option in enumerate(every)}  # an operation may come twice
        if rules.cost_limit >= 0 and len(node.numbers) > 2:
            kept = pruned(every, rules.cost_limit)[: self.beam]
            options = every[: place[id(kept[-1])] + 1 if len(kept) == self.beam else None]
        else:
            options = best_first(every)
            options = kept = (pruned(options, self.target) if rules.prunes else options)[: self.beam]
        chosen = {*map(id, kept)}
        if rules.fixed_order:
            options.sort(key=lambda option: place[id(option)])
        else:
            self.rng.shuffle(options)
        children: list[Node] = []
        for option in options:
            if id(option) not in chosen:
                self.lines.append(explored(*option[1:]))
                continue
            leaf = len(option[2]) == 1
            child = self.write_child(node, 0 if leaf else len(children), option)
            if child.numbers == [self.target]:
                return [], child
            if not leaf or self.pushes_leaves:  # all leaves with the same id, as in the released code
                children.append(child)
        children.sort(key=operator.attrgetter("cost"))
        return children, None

    def write_child(self, node: Node, number: int, option: Child) -> Node:
        """Lists child `number` of a node, an option of `expand`; a single number is compared to the target."""
        cost, operation, numbers = option
        before = f"{node.operations}, " if node.operations else ""
        child = Node(f"{node.id},{number}", numbers, f"{before}'{operation}'", cost, "", node)
        child.text = explored(operation, numbers)
        if len(numbers) > 1:
            child.text += f"Generated Node #{child.id}: {self.target}:{numbers} Operation: {operation}\n"
        self.lines.append(child.text)
        if numbers == [self.target]:
            self.write_goal(child)
        elif len(numbers) == 1:
            self.lines.append(f"{numbers[0]},{self.target} unequal: No Solution\n")
        return child

    def write_goal(self, goal: Node) -> None:
        """Writes that the goal is reached, and restates the path to it from the root of the thread."""
        verdict = f"{self.target},{self.target}{GOAL_TEXT}"
        self.lines.append(verdict)
        if self.restates:
            path, node = [verdict], goal
            while node is not self.root and node.parent is not None:
                path += [node.text, announce(node.parent, self.target)]
                node = node.parent
            self.lines += reversed(path)

    def is_promising(self, children: list[Node]) -> bool:
        """Whether the children are handed out to searches of their own instead of joining the frontier."""
        return False

    def delegate(self, children: list[Node], level: int) -> Node | None:
        """Searches the children apart, at `level`; returns the leaf that reached the goal."""
        raise NotImplementedError


class Direct(Search):
    """A solution and nothing else, one operation a line ("optimal path" in Stream of Search, arXiv 2404.03683).

    In fixed order it is the first of `solutions`, else one of them by lot.
    """

    def search(self, root: Node, level: int) -> Node | None:
        """Writes the operations of a solution, and that the goal is reached."""
        found = solutions(root.numbers, self.target, self.rules.heuristic)
        path = next(found, None) if self.rules.fixed_order else self.rng.choice([*found] or [None])
        for operation, numbers in path or ():
            self.lines.append(explored(operation, numbers))
        if path is None:
            return None
        self.lines.append(f"{self.target},{self.target}{GOAL_TEXT}")
        return root


class BreadthFirst(Search):
    """SoS breadth-first: stops at the goal, and announces leaves that lost before."""

    restates = False
    failure_text = "No solution found."
    pushes_leaves = True


class DepthFirst(Search):
    """SoS depth-first: children that cost more than the target are pruned, the rest searched one after another."""

    restates = False
    failure_text = ""

    def search(self, root: Node, level: int) -> Node | None:
        """Searches the whole subtree of a child before its sibling, for which the parent is announced again."""
        every = best_first(expand(root.numbers, self.target, self.rules.heuristic))
        affordable = [option for option in every if option[0] <= self.target]
        for i, option in enumerate(pruned(every, self.target) if self.rules.prunes else affordable):
            if i:
                self.lines.append(announce(root, self.target))
            child = self.write_child(root, i, option)
            if len(child.numbers) > 1:
                self.lines.append(announce(child, self.target))
                if goal := self.search(child, level):
                    return goal
            elif child.numbers == [self.target]:
                return child
        return None


class Hybrid(Search):
    """SoS+: the children of a promising node are searched in place, one after another."""

    def is_promising(self, children: list[Node]) -> bool:
        """Whether there are children, and they are handed out."""
        return bool(children) and self.hands_out(len(children[0].numbers))

    def hands_out(self, left: int) -> bool:
        """Tosses the coin for children with `left` numbers, or asks whether these are at least `LARGE_NUMBERS`."""
        large = self.rules.spawn_when == "large"
        return left >= LARGE_NUMBERS if large else self.rng.random() < self.rules.spawn_probability

    def delegate(self, children: list[Node], level: int) -> Node | None:
        """Searches each child in a sub-search of this thread."""
        for child in children:
            self.lines.append(f"Start Sub Search at level {level}: {announce(child, self.target)}")
            goal = self.search(child, level)
            if goal is not None:
                self.lines.append(f"Exit Sub Search at level {level}\n")
                return goal
            self.lines.append(
                f"No solution found.\nExit Sub Search at level {level}\nNo solution found in sub search\n"
            )
        return None


class Parallel(Hybrid):
    """APR: the children of a promising node become threads, which spawn in turn above level `depth`."""

    def is_promising(self, children: list[Node]) -> bool:
        """As of SoS+, but never for an only child."""
        return len(children) > 1 and super().is_promising(children)

    def delegate(self, children: list[Node], level: int) -> Node | None:
        """Spawns a thread per child and goes on with the first success. The deepest level does not spawn."""
        if self.rules.fixed_order:
            children = sorted(children, key=lambda child: int(child.id.rpartition(",")[2]))
        goal = next((goal for goal in self.spawn(children) if goal is not None), None)
        if goal is not None:
            self.write_goal(goal)
        return goal

    def spawn(self, children: list[Node]) -> list[Node | None]:
        """Ends the call with a spawn block; returns what the thread of each child finds."""
        rules, level = self.rules, self.level + 1
        kind = type(self) if level < rules.depth else Search
        self.trace.calls.append("".join(self.lines) + spawn_block([child.id for child in children], level))
        self.lines = []
        searches = [kind(child, self.target, rules.sub_beam, self.rng, rules, level) for child in children]
        goals = [search.run() for search in searches]
        self.trace.spawns.append([search.trace for search in searches])
        return goals
