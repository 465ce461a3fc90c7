"""Adaptive parallel reasoning in 150 lines: a scripted policy, the runtime, spawn, join and costs. No model, no JAX.

    python -m examples.threads_without_a_model

`Toy` is a task in a language of characters:

    x<a|b|C>    spawn: children with the prompts "a:", "b:" and, long as any capital, "CCCCCCCCCCCCCCCCCCC:"
    [1,!]       join: what the children wrote, "!" for one that did not end
    .           end
    =           what a root that is cut must go on with; +, one that gave up; one that wrote "k" has an answer

`ScriptedEngine` is an engine whose "model" is a function from a thread's text to what it writes next. It checks the
contract of rows on every call: who owns a row, what it holds, what is kept, that stopped rows stay stopped.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence

from parallel_runtime import Limits, Runtime
from protocols import Completion, MalformedSpawn, PrefillRequest, Request, Spawn
from records import END, Grade, Thread, metrics

Script = Callable[[str, PrefillRequest], str]
STORY = {  # what the policy writes after each context
    "sum 12+34:": "tens and ones <tens|ones>",
    "tens:": "10+30=40.",
    "ones:": "2+4=6.",
    "sum 12+34:tens and ones [10+30=40,2+4=6]": "46.",
}


def ids(text: str) -> list[int]:
    """Ids of a text: one per character."""
    return [ord(letter) for letter in text]


def text(of: Sequence[int]) -> str:
    """Text of ids."""
    return "".join(map(chr, of))


class Toy:
    """A task in which the model may ask for children of any name."""

    end_id, spawn_id = ord("."), ord(">")

    def prompt(self, problem: str) -> list[int]:
        """The problem is the prompt."""
        return ids(problem)

    def spawn(self, ids_: Sequence[int]) -> Spawn:
        """Reads "<a|b>"."""
        before, mark, block = text(ids_)[:-1].rpartition("<")
        if not mark:
            raise MalformedSpawn("no block")
        if not block:
            raise MalformedSpawn("no children")
        for name in block.split("|"):
            if not re.fullmatch("[a-z]+|[A-Z]", name):
                raise MalformedSpawn(f"unknown node {name!r}")
        return Spawn(len(before), [ids(f"{name * 19 if name.isupper() else name}:") for name in block.split("|")])

    def join(self, children: Sequence[Thread]) -> list[int]:
        """Writes "[1,2]"."""
        return ids("[" + ",".join(answer(child) for child in children) + "]")

    def force_answer(self, problem: str, ids_: Sequence[int]) -> tuple[int, list[int]]:
        """Makes a cut root go on with "="."""
        return len(ids_), ids("=")

    def force_continue(self, ids_: Sequence[int]) -> tuple[int, list[int]] | None:
        """Makes a root that gave up go on with "+"."""
        return None if "k" in text(ids_) else (len(ids_) - 1, ids("+"))

    def grade(self, problem: str, root: Thread) -> Grade:
        """A root that ended is right."""
        return Grade(root.stop == END, "" if root.stop == END else root.stop, (text(root.calls[-1].sampled),))


def answer(thread: Thread) -> str:
    """What a thread hands over."""
    return text(thread.calls[-1].sampled[:-1]) if thread.stop == END else "!"


@dataclasses.dataclass
class Row:
    """A row of the engine."""

    owner: tuple[int, int] | None = None  # key of the thread whose ids these are
    ids: list[int] = dataclasses.field(default_factory=list)
    ahead: list[int] = dataclasses.field(default_factory=list)  # still to be sampled; [] if stopped
    sampled: list[int] = dataclasses.field(default_factory=list)


class ScriptedEngine:
    """Decodes all active rows in step until `patience` of them have stopped, and holds the runtime to the contract."""

    def __init__(
        self, script: Script, rows: int, devices: int = 1, context: int = 200, patience: int = 1, stops: str = ".>"
    ) -> None:
        self.stops = stops  # letters that end a call
        self.script, self.rows, self.devices, self.context, self.patience = script, rows, devices, context, patience
        self.reset()

    def reset(self) -> None:
        """Stops every row."""
        self.table = [Row() for _ in range(self.rows)]
        self.calls: dict[tuple[tuple[int, int], int], tuple[str, str]] = {}  # (key, drawn) -> context, sampled
        self.fills: list[PrefillRequest] = []
        self.steps = 0
        self.shuffle = random.Random(0)

    def prefill(self, fills: list[PrefillRequest]) -> None:
        """Starts rows, each of which will write what the script says."""
        assert len({fill.row for fill in fills}) == len(fills)
        for fill in fills:
            row = self.table[fill.row]
            assert not row.ahead, "the row is decoding"
            assert 0 <= fill.keep <= len(row.ids), "keeps more than the row holds"
            assert fill.keep == 0 or row.owner == fill.key, "keeps ids of another thread"
            most = fill.max_new_tokens
            assert fill.ids and most >= 1 and fill.keep + len(fill.ids) + most <= self.context
            row.owner, row.ids = fill.key, row.ids[: fill.keep] + fill.ids
            stop = re.match(f"[^{self.stops}]*[{self.stops}]", told := self.script(text(row.ids), fill))
            written = (stop.group() if stop else told)[:most]
            assert written and (written[-1] in self.stops or len(written) == most), f"no script for {text(row.ids)!r}"
            assert (fill.key, fill.num_sampled) not in self.calls, "the same draws twice"
            self.calls[fill.key, fill.num_sampled] = text(row.ids), written
            row.ahead, row.sampled = ids(written), []
        self.fills += fills

    def decode(self) -> list[Completion]:
        """Rows that have stopped, in any order."""
        active = {number: row for number, row in enumerate(self.table) if row.ahead}
        assert active, "nothing to decode"
        stopped: list[int] = []
        while len(stopped) < min(self.patience, len(active)):
            going = [row for row in active.values() if row.ahead]
            count = min(len(row.ahead) for row in going)
            self.steps += count
            for row in going:
                row.sampled, row.ahead = row.sampled + row.ahead[:count], row.ahead[count:]
            stopped = [number for number, row in active.items() if not row.ahead]
        self.shuffle.shuffle(stopped)
        for row in (self.table[number] for number in stopped):
            row.ids = row.ids + row.sampled
        return [Completion(n, self.table[n].sampled, logprobs(self.table[n].sampled)) for n in stopped]


def logprobs(of: Sequence[int]) -> list[float]:
    """Made-up log-probs that tell ids apart."""
    return [-float(id_) for id_ in of]


def main() -> None:
    """Runs the story and prints every call as it stops, then the costs."""

    def show(thread: Thread) -> None:
        """Prints the last call of a thread."""
        call = thread.calls[-1]
        name = f"child {thread.path[-1]}" if thread.path else "parent"
        print(f"{name:8} {text(call.injected)!r:24} -> {text(call.sampled)!r:28} stopped by {call.stop}")

    limits = Limits(children=4, spawns=4, depth=1, thread_tokens=100, rollout_tokens=1000)
    runtime = Runtime(ScriptedEngine(lambda context, _: STORY[context], rows=4), Toy(), limits, show)
    (rollout,) = runtime.run([Request("sum 12+34:")], seed=(0,))
    costs = metrics(rollout)
    total, sequential = costs["total_tokens"], costs["sequential_tokens"]
    print(f"{costs['children']} children, {total} tokens in all, {sequential} of them one after another")


if __name__ == "__main__":
    main()
