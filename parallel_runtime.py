"""The parallel runtime: threads that spawn children and join their results, decoded side by side.

`Runtime.run` drives any engine that can fill rows and decode them (`Engine`; the JAX one is
`sampler.Sampler`, the tests use scripts). It speaks the language of a task only through a `Task`.
One round:

  1. Ready threads take rows: a joined parent first, then children, then new problems. A waiting parent
     keeps its row and its KV cache. But if a joined parent or a child finds no row, and fewer than half of
     the rows decode, the parent that began to wait last gives its row up. It is prefilled again after its join.
  2. The engine prefills what is new in these rows, and decodes until enough rows have stopped.
  3. A thread that stopped at the spawn token waits, and its children become ready. A child that ended
     gives its result to its parent. After the last child of a spawn the parent is *rewound* to just
     before the spawn block and *extended* by the join block (paper, section 3.2). It is ready again.
     The threads of an `AsynchronousTask` go on instead: rewound likewise, extended by what says that the
     children have started. Such a thread waits where it samples the join token, for its oldest spawn alone.
     If it ends before its children, they run on, and the rollout is over when all threads are.

`Limits` bounds everything, and the record names the bound that stopped a thread. Budget forcing (s1, arXiv
2501.19393) is the same rewind and extend at the end of a root: a root that is cut by its token bound
must answer, a root that gave up must continue.

This module knows nothing of JAX and nothing of Countdown.

Deviations from the paper: threads may nest (`Limits.depth`, 1 as in the paper by default), and a parent
keeps the context before its spawn in its row instead of sending it again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import records
from checks import Checked, at_least
from protocols import (
    AsynchronousTask,
    Completion,
    Engine,
    ForcedTask,
    MalformedSpawn,
    PrefillRequest,
    Request,
    Task,
    join_id,
)
from records import Call, Rollout, Thread


@dataclasses.dataclass(frozen=True)
class Limits(Checked):
    """Bounds of a rollout. A thread that would exceed one stops, with its name as the reason.

    The last two fields are no bounds: they allow budget forcing.
    """

    section = "limits"
    children: Annotated[int, at_least(0)]  # per spawn
    spawns: Annotated[int, at_least(0)]  # per thread
    depth: Annotated[int, at_least(0)]  # of nesting; 0 forbids spawning, 1 is the paper's
    thread_tokens: Annotated[int, at_least(1)]  # sampled ids per thread
    rollout_tokens: Annotated[int, at_least(1)]  # sampled ids per rollout; the children of a spawn share what is left
    forced_answer_tokens: Annotated[int, at_least(0)] = 0  # for the forced answer of a root that reached thread_tokens
    min_budget_rounds: Annotated[int, at_least(0)] = 0  # times that a root which gives up must continue


JOINED, CHILD, NEW = range(3)  # threads take rows in this order
EVICT_BELOW_BUSY = 0.5  # waiting parents keep their rows while at least this share of all rows decodes


@dataclasses.dataclass
class _Spawned:
    """The children of one spawn, until their parent joins them."""

    running: int  # how many have not ended
    threads: list[Thread] = dataclasses.field(default_factory=list)
    unused: int = 0  # ids that those which have ended might have sampled
    waiter: _Live | None = None  # the parent, once it waits for them


@dataclasses.dataclass(eq=False)
class _Live:
    """A thread in flight. `allowance` bounds the ids that it samples itself: what its children have is taken off."""

    thread: Thread
    siblings: _Spawned | None  # whose child it is; None for a root
    number: int  # of the request
    allowance: int
    key: tuple[int, int]
    row: int | None = None
    in_row: int = 0  # how many of its ids its row holds
    unjoined: list[_Spawned] = dataclasses.field(default_factory=list)  # its spawns, the oldest first
    rewind: int = 0  # how many ids it keeps when it joins the oldest
    forced_answer_tokens: int = 0  # granted beyond thread_tokens, once it is made to answer
    extended: int = 0  # times it was made to continue

    def priority(self) -> tuple:
        """Joined parents, then children, then new problems; older requests first."""
        kind = JOINED if len(self.thread.calls) > 1 else CHILD if self.thread.path else NEW
        return kind, self.number, self.thread.path

    def sampled(self) -> int:
        """Ids that the thread itself has sampled."""
        return sum(len(call.sampled) for call in self.thread.calls)


def thread_key(seed: Sequence[int], request: Request, path: Sequence[int]) -> tuple[int, int]:
    """Two 32-bit words that fix the draws of a thread. `seed` is what the run adds: of its config, and the step."""
    digest = hashlib.blake2b(repr((tuple(seed), request.problem, request.index, tuple(path))).encode(), digest_size=8)
    word = int.from_bytes(digest.digest(), "little")
    return word & 0xFFFFFFFF, word >> 32


@dataclasses.dataclass
class Runtime:
    """Runs rollouts of `task` on `engine` within `limits`. Several runs may follow one another."""

    engine: Engine
    task: Task
    limits: Limits
    on_call: Callable[[Thread], None] | None = None  # called with a thread whenever a call of it has stopped
    evictions: int = 0  # waiting parents that lost their row, over all runs

    def run(self, requests: Sequence[Request], seed: Sequence[int]) -> list[Rollout]:
        """All rollouts, in the order of `requests`."""
        return [rollout for _, rollout in sorted(self.stream(requests, seed), key=lambda numbered: numbered[0])]

    def stream(self, requests: Sequence[Request], seed: Sequence[int]) -> Iterator[tuple[int, Rollout]]:
        """Yields (number of the request, rollout) as rollouts finish. Raises ValueError if a prompt is too long."""
        return Run(self, requests, seed).rollouts()


class Run:
    """The state of one run: which threads are ready, which decode, which wait, and who holds which row."""

    def __init__(self, runtime: Runtime, requests: Sequence[Request], seed: Sequence[int]) -> None:
        self.runtime, self.engine, self.task, self.limits = runtime, runtime.engine, runtime.task, runtime.limits
        self.requests, self.seed = list(requests), tuple(seed)
        self.ready: list[tuple[tuple, _Live]] = []  # a heap
        self.rows: list[_Live | None] = [None] * self.engine.rows
        self.active: dict[int, _Live] = {}  # row -> the thread that decodes there
        self.waiting: list[_Live] = []  # parents, in the order in which they began to wait
        self.join_id = join_id(self.task)
        self.asynchronous = self.join_id >= 0
        self.running = [0] * len(self.requests)  # threads of each request
        self.ended: dict[int, Rollout] = {}  # request -> its rollout, once the root has ended
        self.done: list[tuple[int, Rollout]] = []
        self.started: dict[int, float] = {}  # request -> time of its first prefill
        for number, request in enumerate(self.requests):
            prompt = self.task.prompt(request.problem)
            if len(prompt) >= self.engine.context:
                raise ValueError(
                    f"the prompt of {request.problem} has {len(prompt)} ids and the context {self.engine.context}: "
                    "use a model with a longer context"
                )
            self._begin(None, number, (), prompt, self.limits.rollout_tokens)

    def rollouts(self) -> Iterator[tuple[int, Rollout]]:
        """Yields (number of the request, rollout) as rollouts finish. An interrupted caller keeps what it has."""
        self.engine.reset()
        while self.ready or self.active:
            if fills := self._schedule():
                self.engine.prefill(fills)
            for stopped in self.engine.decode() if self.active else ():
                self._stopped(self.active.pop(stopped.row), stopped)
            done, self.done = self.done, []
            yield from done

    # -- scheduling

    def _begin(self, siblings: _Spawned | None, number: int, path: tuple, prompt: list[int], allowance: int) -> _Live:
        live = _Live(Thread(path), siblings, number, allowance, thread_key(self.seed, self.requests[number], path))
        live.thread.calls.append(Call(0, prompt))
        self.running[number] += 1
        heapq.heappush(self.ready, (live.priority(), live))
        return live

    def _schedule(self) -> list[PrefillRequest]:
        """Gives rows to ready threads, best first, until rows run out."""
        fills = []
        while self.ready:
            _, live = self.ready[0]
            limit, reason = self._room(live)
            if limit > 0 and live.row is None and not self._take_row(live):
                break
            heapq.heappop(self.ready)
            if limit <= 0:
                self._end(live, reason)
                continue
            assert live.row is not None
            ids = live.thread.ids()
            fills.append(PrefillRequest(live.row, live.in_row, ids[live.in_row :], live.key, live.sampled(), limit))
            self.active[live.row] = live
            self.started.setdefault(live.number, time.monotonic())
        return fills

    def _room(self, live: _Live) -> tuple[int, str]:
        """How many ids the thread may sample now, and the bound that says so."""
        return min(
            (self.engine.context - len(live.thread.ids()), records.CONTEXT),
            (self.limits.thread_tokens + live.forced_answer_tokens - live.sampled(), records.THREAD_TOKENS),
            (live.allowance - live.sampled(), records.ROLLOUT_TOKENS),
            key=lambda bound: bound[0],
        )

    def _take_row(self, live: _Live) -> bool:
        """Finds a row on the least busy device. If there is none, a waiting parent may lose its row."""
        free = [row for row, holder in enumerate(self.rows) if holder is None]
        if not free:
            holders = [parent for parent in self.waiting if parent.row is not None]
            # An eviction costs a prefill: not for a new problem, nor while enough rows are busy.
            busy_enough = len(self.active) >= EVICT_BELOW_BUSY * self.engine.rows
            if not holders or live.priority()[0] == NEW or busy_enough:
                return False
            loser = holders[-1]
            assert loser.row is not None
            free = [loser.row]
            self.rows[loser.row], loser.row, loser.in_row = None, None, 0
            self.runtime.evictions += 1
        per_device = self.engine.rows // self.engine.devices
        busy = [0] * self.engine.devices
        for row in self.active:
            busy[row // per_device] += 1
        live.row = min(free, key=lambda row: (busy[row // per_device], row))
        self.rows[live.row] = live
        return True

    # -- what happens to a thread

    def _stopped(self, live: _Live, stopped: Completion) -> None:
        """Records what a row sampled and decides how its thread goes on."""
        _, reason = self._room(live)  # before the new ids count: the bound that the row decoded up to
        call = live.thread.calls[-1]
        call.sampled, call.logprobs = stopped.ids, stopped.logprobs
        live.in_row = len(live.thread.ids())
        if stopped.ids[-1] == self.task.end_id:
            self._end(live, records.END)
        elif stopped.ids[-1] == self.task.spawn_id:
            self._spawn(live)
        elif stopped.ids[-1] == self.join_id:
            self._ask_to_join(live)
        else:
            self._end(live, reason)

    def _spawn(self, live: _Live) -> None:
        """Starts the children a thread asked for, or ends it with the bound or fault that forbids them."""
        thread, limits = live.thread, self.limits
        if len(thread.path) // 2 >= limits.depth:
            return self._end(live, records.DEPTH)
        if len(thread.spawns) >= limits.spawns:
            return self._end(live, records.SPAWNS)
        try:
            spawn = self.task.spawn(thread.ids())
            if not spawn.prompts:
                raise MalformedSpawn("no child")
        except MalformedSpawn as fault:
            thread.detail = str(fault)
            return self._end(live, records.MALFORMED)
        if len(spawn.prompts) > limits.children:
            return self._end(live, records.CHILDREN)
        self._call_stopped(thread, records.FORK if self.asynchronous else records.SPAWN)
        # A parent that goes on keeps as much for itself, and for each spawn that it has left, as for this one.
        parts = len(spawn.prompts) * (limits.spawns - len(thread.spawns) + 1 if self.asynchronous else 1)
        share = (live.allowance - live.sampled()) // parts
        spawned = _Spawned(len(spawn.prompts))
        for number, prompt in enumerate(spawn.prompts):
            child = self._begin(spawned, live.number, (*thread.path, len(thread.spawns), number), prompt, share)
            spawned.threads.append(child.thread)
            live.allowance -= share
        thread.spawns.append(spawned.threads)
        live.unjoined.append(spawned)
        if self.asynchronous:
            self._continue(live, spawn.start, typing.cast(AsynchronousTask, self.task).started())
        else:
            self._wait(live, spawn.start)

    def _ask_to_join(self, live: _Live) -> None:
        """Makes a thread wait that sampled the join token, or ends it if it has no children left to join."""
        if not live.unjoined:
            live.thread.detail = "no children left to join"
            return self._end(live, records.MALFORMED)
        self._call_stopped(live.thread, records.JOIN)
        self._wait(live, len(live.thread.ids()) - 1)

    def _wait(self, live: _Live, keep: int) -> None:
        """Makes a thread wait for its oldest spawn, unless that has ended."""
        live.rewind, live.unjoined[0].waiter = keep, live
        self.waiting.append(live)
        if not live.unjoined[0].running:
            self._join(live)

    def _call_stopped(self, thread: Thread, reason: str) -> None:
        thread.calls[-1].stop = reason
        if self.runtime.on_call:
            self.runtime.on_call(thread)

    def _end(self, live: _Live, reason: str) -> None:
        """Ends a thread and frees its row. A parent that waited for it may go on. A root may be forced on."""
        self._call_stopped(live.thread, reason)
        siblings = live.siblings
        if siblings is None and (forced := self._forced(live)):
            return self._continue(live, *forced)
        if live.row is not None:
            self.rows[live.row] = None
        self.running[live.number] -= 1
        if siblings is None:
            self._grade(live)
        else:
            siblings.running -= 1
            siblings.unused += live.allowance - live.sampled()  # without what its own children may yet sample
            if siblings.waiter and not siblings.running:
                self._join(siblings.waiter)
        if not self.running[live.number]:
            self.done.append((live.number, self.ended.pop(live.number)))

    def _join(self, live: _Live) -> None:
        """Rewinds a parent to before it asked, extends it by the join block and makes it ready."""
        self.waiting.remove(live)
        joined = live.unjoined.pop(0)
        live.allowance += joined.unused
        self._continue(live, live.rewind, self.task.join(joined.threads))

    def _continue(self, live: _Live, keep: int, ids: list[int]) -> None:
        """Makes a thread ready whose next call keeps `keep` ids and adds `ids`."""
        live.in_row = min(live.in_row, keep)
        live.thread.calls.append(Call(keep, ids))
        heapq.heappush(self.ready, (live.priority(), live))

    def _forced(self, live: _Live) -> tuple[int, list[int]] | None:
        """How a root that has stopped goes on by budget forcing; None if it does not."""
        ids, task = live.thread.ids(), typing.cast(ForcedTask, self.task)
        cut = live.thread.stop == records.THREAD_TOKENS
        if cut and self.limits.forced_answer_tokens and not live.forced_answer_tokens:
            live.forced_answer_tokens = self.limits.forced_answer_tokens
            return task.force_answer(self.requests[live.number].problem, ids)
        if live.thread.stop == records.END and live.extended < self.limits.min_budget_rounds:
            live.extended += 1
            return task.force_continue(ids)
        return None

    def _grade(self, live: _Live) -> None:
        request = self.requests[live.number]
        milliseconds = 1e3 * (time.monotonic() - self.started.get(live.number, time.monotonic()))
        grade = self.task.grade(request.problem, live.thread)
        self.ended[live.number] = Rollout(request.problem, live.thread, grade, request.index, milliseconds)
