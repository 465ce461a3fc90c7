"""APR whose parents go on after a spawn and join child by child, as text (AsyncThink, arXiv 2510.26658).

  1. Before a node lists its children, the coin (or the rule of `spawn_when`) says whether they become threads.
  2. If so, a thread starts as soon as its node is listed: its search runs while the parent lists the next one.
  3. When more than `unjoined` children have started and not been joined, the parent asks for the results of the
     oldest. At the first success it stops listing, and ends without waiting for the rest.
  4. When all are listed it joins those that are left, one by one. If none succeeds, it searches on.

A small `unjoined` starts few threads in vain, a large one keeps more at work.

Differences from `Parallel`: the coin falls before the children are known, and an only child becomes a thread too.

Deviations from AsyncThink: there a language model chooses what to delegate, when and to whom, and names the join that
it asks for. Here a symbolic search is imitated, and joins are in the order of spawns.
"""

from __future__ import annotations

from countdown.language import JOIN_TEXT
from countdown.search import Node, Parallel
from countdown.states import Child


class Asynchronous(Parallel):
    """APR: each child of a promising node becomes a thread when it is listed."""

    promising = False  # whether the children of the current node become threads
    goals: list[Node | None]  # what those found, in order

    def expand_node(self, node: Node) -> tuple[list[Node], Node | None]:
        """Decides whether the children become threads, and lists them."""
        left = len(node.numbers) - 1
        self.promising, self.goals = left > 1 and self.hands_out(left), []
        return super().expand_node(node)

    def write_child(self, node: Node, number: int, option: Child) -> Node:
        """Lists a child, and starts its thread. May join the oldest thread, and returns the goal if that found it."""
        child = super().write_child(node, number, option)
        if self.promising:
            self.goals += self.spawn([child])
            if len(self.goals) > self.rules.unjoined:
                child = self.join() or child
        return child

    def is_promising(self, children: list[Node]) -> bool:
        """Whether the children have become threads."""
        return self.promising

    def delegate(self, children: list[Node], level: int) -> Node | None:
        """Joins child by child up to the first success."""
        goal = None
        while self.goals and goal is None:
            goal = self.join()
        return goal

    def join(self) -> Node | None:
        """Asks for the results of the oldest child, and returns the leaf at the goal that it found."""
        self.trace.calls.append("".join(self.lines) + JOIN_TEXT)
        self.lines, goal = [], self.goals.pop(0)
        if goal is not None:
            self.write_goal(goal)
        return goal
