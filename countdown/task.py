"""Countdown as a task of the runtime, and demonstrations as rollouts.

`Countdown` implements `protocols.ForcedTask`:

  spawn   parses the spawn block that ends a thread and writes the prompt of each child;
  join    writes the result of each child for its parent;
  grade   reads the answer off the root thread and calls the exact grader.

Model output is data: the strict grammar of `countdown.language` parses it, nothing evaluates it.
`record` turns the text of a symbolic search into the `Rollout` that the runtime would have recorded.

Three options change what passes between threads. With child_returns="text" a child returns all that it wrote,
as in PASTA (arXiv 2502.11517). With inherit_context=True a child sees the context of its parent before the
spawn, as in ThreadWeaver (arXiv 2512.07843). With asynchronous=True a parent goes on after its spawn, as in
AsyncThink (arXiv 2510.26658): the last line of the spawn block stays, and the parent asks for a join block by
writing its first line.

Deviation from the released code: the path that a child returns is the text after its second-to-last
`Goal Reached`, as there, but only if it parses and starts at the child's own node.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Annotated

import records
from checks import Checked, at_least, one_of
from countdown.grader import Problem, grade_steps
from countdown.language import CALL_TEXT, END_ID, FIELDS, GOAL_TEXT, JOIN_TEXT, SPAWN_TEXT, Tokenizer, parse, short
from countdown.search import Node, Trace, spawn_block, state_line
from protocols import MalformedSpawn, Spawn
from records import Call, Grade, Rollout, Thread

METHODS = ("direct", "sos", "sosp", "apr")
UNBUDGETED = ("direct", "sos")  # their prompts state no budget
JOINS = ("path", "text")

_MOVE = re.compile(f"Moving to Node #({FIELDS['node']})\n")
# What a thread's text says of nodes: the operations of the current state, and the children generated from it.
_KNOWN = re.compile(
    f"Current State: [^\n]*, Operations: (?P<operations>{FIELDS['operations']})\n"
    f"|^Generated Node #(?P<node>{FIELDS['node']}): (?P<state>{FIELDS['number']}:{FIELDS['numbers']})"
    f" Operation: (?P<operation>{FIELDS['operation']})\n",
    re.MULTILINE,
)
_EXITS = re.compile(f"(?:Exit Sub Search at level {FIELDS['level']}\n)*")  # all that may follow the last goal
_PATH_KINDS = {"move", "state", "explore", "generate", "goal"}


def _known_nodes(text: str) -> dict[str, str]:
    """Nodes generated in a text -> their state line, without its first words "Current State: "."""
    nodes: dict[str, str] = {}
    operations = "[]"
    for match in _KNOWN.finditer(text):
        if match["node"] is None:
            operations = match["operations"]
        else:
            before = "" if operations == "[]" else f"{operations[1:-1]}, "
            nodes[match["node"]] = f"{match['state']}, Operations: [{before}'{match['operation']}']"
    return nodes


def root_prompt(problem: Problem, method: str) -> str:
    """First lines of a root thread. APR announces its root; the other methods only state it."""
    state = state_line(Node("0", list(problem.numbers), "", 0, "", None), problem.target)
    return f"Moving to Node #0\n{state}" if method == "apr" else state


@dataclasses.dataclass(frozen=True)
class Countdown(Checked):
    """The `protocols.ForcedTask` of Countdown.

    `children_budget` and `token_budget` write a budget into the prompt, in the words of demonstrations that state
    one; -1 writes nothing. Raises ValueError for an unknown method or join, or a budget below -1.
    """

    section = "threads"
    tokenizer: Tokenizer
    method: Annotated[str, one_of(*METHODS)]
    child_returns: Annotated[str, one_of(*JOINS)] = "path"  # the path that it found, or "text": all that it wrote
    inherit_context: bool = False  # a child sees what its parent saw before the spawn
    asynchronous: bool = False  # a parent goes on after a spawn, and asks for each join
    children_budget: Annotated[int, at_least(-1)] = -1  # children asked for
    token_budget: Annotated[int, at_least(-1)] = -1  # tokens asked for
    end_id = END_ID

    @functools.cached_property
    def spawn_id(self) -> int:
        """Id that ends a spawn block."""
        return self.tokenizer.id(SPAWN_TEXT)

    @functools.cached_property
    def call_id(self) -> int:
        """Id that starts a spawn block."""
        return self.tokenizer.id(CALL_TEXT)

    @functools.cached_property
    def join_id(self) -> int:
        """Id that asks for a join; -1 if parents wait."""
        return self.tokenizer.id(JOIN_TEXT) if self.asynchronous else -1

    def started(self) -> list[int]:
        """What is left of a spawn block while its children run: its last line."""
        return [self.spawn_id]

    @property
    def child_prefix(self) -> str:
        """Budget line of a child's prompt."""
        return "" if self.token_budget < 0 else f"Token Budget: {self.token_budget} "

    @property
    def root_prefix(self) -> str:
        """Budget line of the root's prompt."""
        children = "" if self.children_budget < 0 else f"Sub Call Budget: {self.children_budget} "
        return self.child_prefix or children

    def prompt(self, problem: Problem) -> list[int]:
        """Prompt of the root thread."""
        return self.tokenizer.encode(self.root_prefix + root_prompt(problem, self.method))

    def spawn(self, ids: Sequence[int]) -> Spawn:
        """Reads the spawn block that ends `ids`; raises MalformedSpawn saying what is wrong with it."""
        start = next((i for i in reversed(range(len(ids))) if ids[i] == self.call_id), None)
        if start is None:
            raise MalformedSpawn(f"no {CALL_TEXT.strip()} before {SPAWN_TEXT.strip()}")
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
        if self.inherit_context:
            return [*context, *self.tokenizer.encode(prompt)]
        return self.tokenizer.encode(self.child_prefix + prompt)

    def _spawned(self, before: str, block: str) -> list[str]:
        """Nodes that a well-formed spawn block names; raises MalformedSpawn.

        The root must write level 1. A child cannot see how deep it is, so it may write any level from 2 on.
        """
        nodes = re.findall(f"> Moving to Node #({FIELDS['node']})\n", block)
        if not nodes:
            raise MalformedSpawn("the spawn block names no node")
        own = _MOVE.search(before)
        level = re.search(f" at level ({FIELDS['level']})>", block)
        is_child = own is not None and own[1] != "0" and level is not None and level[1] not in "01"
        due = spawn_block(nodes, int(level[1]) if level is not None and is_child else 1)
        for line, expected in itertools.zip_longest(block.splitlines(), due.splitlines()):
            if line != expected:
                raise MalformedSpawn(f"spawn block: {short(line)!r} where {expected!r} is due")
        return nodes

    def join(self, children: Sequence[Thread]) -> list[int]:
        """Join block: a line per child, and after a success the child's final path.

        With child_returns="text" all that the child wrote follows every line instead.
        """
        encode = self.tokenizer.encode
        ids = encode(JOIN_TEXT)
        for i, child in enumerate(children):
            given = child.calls[0].injected
            own = [*_MOVE.finditer(self.tokenizer.decode(given))]
            if not own:
                raise ValueError(f"the prompt of child {child.path} names no node")
            where = f"in Sub Search {i} at level {len(child.path) // 2} at Node #{own[-1][1]}>\n"
            path = self._final_path(child, own[-1][0])
            ids += encode(f"<Goal Reached {where}" if path else f"<No Solution {where}")
            if self.child_returns == "text":  # the ids themselves: their text may not encode back to them
                own_ids = [token for token in child.ids()[len(given) :] if token != END_ID]
                ends_a_line = self.tokenizer.decode(own_ids)[-1:] in ("", "\n")
                ids += own_ids + ([] if ends_a_line else encode("\n"))
            else:
                ids += encode(path)
        return ids + encode("<End Sub Searches>\n")

    def _final_path(self, child: Thread, first_line: str) -> str:
        """The path a child restated at its end, from its own node to the goal; "" if it did not."""
        if child.stop != records.END:
            return ""
        parts = self.tokenizer.decode(child.ids()[:-1]).rsplit(GOAL_TEXT, 2)
        if len(parts) < 3 or parts[2] or not parts[1].startswith(first_line):
            return ""
        try:
            lines = parse(parts[1] + GOAL_TEXT)
        except ValueError:
            return ""
        return parts[1] + GOAL_TEXT if {line.kind for line in lines} <= _PATH_KINDS else ""

    def force_answer(self, problem: Problem, ids: Sequence[int]) -> tuple[int, list[int]]:
        """Makes a root answer: claims the goal after its last whole line, or where it was claimed before.

        Claiming it plays the part of s1's end-of-thinking delimiter: what a trace says after it is the answer.
        """
        goal = self.tokenizer.id(GOAL_TEXT)
        if goal in ids:
            return list(ids).index(goal), [goal]
        whole = [i for i, token in enumerate(ids) if self.tokenizer.decode([token]).endswith("\n")]
        claim = self.tokenizer.encode(f"{problem.target},{problem.target}{GOAL_TEXT}")
        return whole[-1] + 1, claim

    def force_continue(self, ids: Sequence[int]) -> tuple[int, list[int]] | None:
        """Sends a root that found nothing on, to the first node that it listed and never moved to; None without one.

        The `Moving to Node` line plays the part of s1's "Wait"; it replaces the end and the line that gives up. Where
        parents go on, a child that was not joined may be searching that node.
        """
        keep = len(ids) - 1 - (ids[-2] == self.tokenizer.id("No solution found.\n"))
        text = self.tokenizer.decode(ids[:keep])
        moved = {*re.findall(f"(?:Moving to|at) Node #({FIELDS['node']})>?\n", text)}
        left = [node for node in _known_nodes(text) if node not in moved]
        if not left or GOAL_TEXT in text or not text.endswith("\n"):
            return None
        return keep, self.tokenizer.encode(f"Moving to Node #{left[0]}\n")

    def grade(self, problem: Problem, root: Thread) -> Grade:
        """Judges the answer of a root thread: the operations of its last state and the one that reached the goal.

        Of a direct solution the answer is all its operations.
        """
        if root.stop != records.END:
            return Grade(False, f"no answer: stopped by {root.stop}")
        text = self.tokenizer.decode(root.ids()[:-1])
        end = text.rfind(GOAL_TEXT) + len(GOAL_TEXT)
        if end < len(GOAL_TEXT) or not _EXITS.fullmatch(text, end):
            return Grade(False, "no answer")
        try:
            state, *lines = parse(text[max(text.rfind("Current State: ", 0, end), 0) : end])
        except ValueError as error:
            return Grade(False, f"no answer: {error}")
        kinds = [line.kind for line in lines]
        if kinds[-2:] != ["explore", "goal"] or state.kind != "state" or {*kinds} - _PATH_KINDS - {"miss"}:
            return Grade(False, "no answer: no operation reaches the goal from a state")
        steps = [line.operation for line in lines if line.kind == "explore"]
        return grade_steps(problem, (*state.operations, *(steps if self.method == "direct" else steps[-1:])))


def record(problem: Problem, trace: Trace, task: Countdown) -> Rollout:
    """The `Rollout` the runtime would have recorded, had the model of `task` written `trace`."""

    def thread(trace: Trace, prompt: list[int], path: tuple[int, ...]) -> Thread:
        """The thread of a trace and, below it, its children."""
        result = Thread(path)
        keep, injected, unjoined = 0, prompt, []
        for text in trace.calls[:-1]:
            call = Call(keep, injected, task.tokenizer.encode(text), stop=records.JOIN)
            result.calls.append(call)
            context = result.ids()
            keep = len(context) - 1
            if call.sampled[-1] == task.spawn_id:
                call.stop = records.FORK if task.asynchronous else records.SPAWN
                keep -= context[::-1].index(task.call_id)  # `task.spawn` would refuse what a faulty trace spawns
                number = len(result.spawns)
                prompts = [task.child_prompt(context[:keep], child.prompt) for child in trace.spawns[number]]
                children = [thread(c, prompts[j], (*path, number, j)) for j, c in enumerate(trace.spawns[number])]
                result.spawns.append(children)
                unjoined.append(children)
            injected = task.started() if call.stop == records.FORK else task.join(unjoined.pop(0))
        result.calls.append(Call(keep, injected, [*task.tokenizer.encode(trace.calls[-1]), task.end_id]))
        return result

    root = thread(trace, task.tokenizer.encode(task.root_prefix + trace.prompt), ())
    return Rollout(problem, root, task.grade(problem, root))
