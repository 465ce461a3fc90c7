"""Threads that spawn and join: the record of a rollout, and the runtime that fills it.

The record is the one idea of this project: a demonstration of a symbolic solver
and a rollout of the model are the same object. A `Rollout` is a problem and a
tree of `Thread`s; a thread is a list of `Call`s, one per uninterrupted decode.
Training, metrics, grading and pictures read the record and cannot tell who
wrote it.

The runtime (`Runtime.run`) drives any engine that can fill rows and decode them
(`Engine`; the JAX one is `sampler.Sampler`, the tests use scripts) and speaks
the language of the task only through a `Task`. Per round:

  1. Ready threads take rows: a joined parent goes first, then children, then
     new problems, so that few problems are in flight. A parent that waits keeps
     its row and with it its KV cache, unless waiting parents hold more than half
     of the rows: then the one that began to wait last (its children end last)
     gives its row up and is prefilled again after its join.
  2. The engine prefills what is new in these rows and decodes until enough rows
     have stopped.
  3. A thread that stopped at the spawn token becomes waiting and its children
     become ready; one that ended hands its result to its parent; when the last
     child of a spawn is in, the parent is *rewound* to just before the spawn
     block, *extended* by the join block, and is ready again (paper section 3.2).

Several runtimes, an engine each, share the requests of a run (`side_by_side`).
Everything is bounded (`Limits`), and what a bound cuts is named in the record.
Budget forcing (s1, arXiv 2501.19393) is the same rewind and extend, done to a root
that ends: one cut by its token bound is made to answer, one that gave up is sent on.
This module knows nothing of JAX and nothing of Countdown.

Deviations from the paper: threads may nest (`Limits.depth`, 1 as in the paper by
default), and the parent's context before the spawn is kept in its row instead of
being sent again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import heapq
import threading
import time
import typing
from collections.abc import Callable, Iterator, Sequence

# Why a call stopped. Only END and SPAWN are the model's own doing.
END = "end"  # the thread is over
SPAWN = "spawn"  # the thread asked for children
CONTEXT = "context"  # the context window is full
THREAD_TOKENS = "thread_tokens"  # Limits.thread_tokens reached
ROLLOUT_TOKENS = "rollout_tokens"  # Limits.rollout_tokens reached
# Why a thread that asked for children got none; these replace SPAWN.
MALFORMED = "malformed"  # the spawn block does not parse (see Thread.detail)
CHILDREN = "children"  # more than Limits.children in one spawn
SPAWNS = "spawns"  # more than Limits.spawns spawns in one thread
DEPTH = "depth"  # deeper than Limits.depth
STOPS = (END, SPAWN, CONTEXT, THREAD_TOKENS, ROLLOUT_TOKENS, MALFORMED, CHILDREN, SPAWNS, DEPTH)
TRUNCATED = (CONTEXT, THREAD_TOKENS, ROLLOUT_TOKENS, CHILDREN, SPAWNS, DEPTH)  # cut by a bound, not by the model


@dataclasses.dataclass
class Call:
    """One uninterrupted decode of a thread.

    Its context is the first `keep` ids of the call before it (context and
    sampled ids together), followed by `injected`. For a first call `keep` is 0
    and `injected` the prompt; for a call after a join `keep` is the rewind point
    and `injected` the join block. Injected ids are never training targets.
    """

    keep: int
    injected: list[int]
    sampled: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)  # one per sampled id; empty in demonstrations
    stop: str = END


@dataclasses.dataclass
class Thread:
    """A thread of a rollout.

    `path` is () for the root and, for a child, its parent's path followed by
    (number of the spawn within the parent, number of the child within the
    spawn). `spawns[i]` are the children of the i-th call that stopped at SPAWN.
    """

    path: tuple[int, ...]
    calls: list[Call] = dataclasses.field(default_factory=list)
    spawns: list[list[Thread]] = dataclasses.field(default_factory=list)
    detail: str = ""  # what was wrong with a malformed spawn block

    def ids(self) -> list[int]:
        """Context and sampled ids of the last call: what the thread remembers."""
        ids: list[int] = []
        for call in self.calls:
            ids = ids[: call.keep] + call.injected + call.sampled
        return ids

    @property
    def stop(self) -> str:
        """Why the thread's last call stopped (one of `STOPS`)."""
        return self.calls[-1].stop

    def walk(self) -> Iterator[Thread]:
        """This thread, then its descendants in order of spawn."""
        yield self
        for children in self.spawns:
            for child in children:
                yield from child.walk()


@dataclasses.dataclass(frozen=True)
class Grade:
    """Verdict on a rollout: `answer` are the steps found, `reason` why they are wrong ("" if they are right)."""

    correct: bool
    reason: str
    answer: tuple[str, ...] = ()


@dataclasses.dataclass
class Rollout:
    """A problem, the tree of threads that worked on it, and the verdict.

    `index` tells repeated rollouts of one problem apart; `milliseconds` is the
    wall clock from the root's first prefill to its end (0 in demonstrations).
    """

    problem: typing.Any
    root: Thread
    grade: Grade
    index: int = 0
    milliseconds: float = 0.0

    def threads(self) -> list[Thread]:
        """All threads, parents before their children."""
        return list(self.root.walk())


class MalformedSpawn(ValueError):
    """The ids before a spawn token are no spawn block the task can read."""


@dataclasses.dataclass(frozen=True)
class Spawn:
    """A parsed spawn: `start` is the index in the thread's ids of the block's first id (the rewind point)."""

    start: int
    prompts: list[list[int]]


class Task(typing.Protocol):
    """What the runtime must know of a task. All text is ids already."""

    @property
    def end_id(self) -> int:
        """Sampling this id ends the thread."""

    @property
    def spawn_id(self) -> int:
        """Sampling this id suspends the thread and starts children."""

    def prompt(self, problem: typing.Any) -> list[int]:
        """Prompt of the root thread."""

    def spawn(self, ids: Sequence[int]) -> Spawn:
        """Reads the spawn block that ends `ids` (the last id is `spawn_id`); raises MalformedSpawn."""

    def join(self, children: Sequence[Thread]) -> list[int]:
        """Join block of finished children, in the order of the spawn. A child that did not end has failed."""

    def answer(self, problem: typing.Any, ids: Sequence[int]) -> tuple[int, list[int]]:
        """How a root cut at `ids` is made to answer: ids to keep, and at least one to append."""

    def extend(self, ids: Sequence[int]) -> tuple[int, list[int]] | None:
        """The same for a root that ended with `ids` and is to search on; None if it has answered or nothing is left."""

    def grade(self, problem: typing.Any, root: Thread) -> Grade:
        """Verdict on a finished root thread."""


# ------------------------------------------------------------------- metrics


def total_tokens(thread: Thread) -> int:
    """Ids sampled by the thread and all its descendants (paper, section 4: total tokens)."""
    return sum(len(call.sampled) for member in thread.walk() for call in member.calls)


def sequential_tokens(thread: Thread) -> int:
    """Longest chain of dependent ids: the thread's own plus, per join, its slowest child's (recursive)."""
    own = sum(len(call.sampled) for call in thread.calls)
    return own + sum(max(map(sequential_tokens, children)) for children in thread.spawns)


def longest_context(thread: Thread) -> int:
    """Most ids that any call of the thread or its descendants had in view, sampled ids included."""
    longest = 0
    for call in thread.calls:
        ids = call.keep + len(call.injected) + len(call.sampled)
        longest = max(longest, ids)
    return max([longest] + [longest_context(child) for children in thread.spawns for child in children])


def metrics(rollout: Rollout) -> dict[str, float]:
    """Costs of one rollout: tokens (ids), context (ids), threads (counts), wall clock (milliseconds)."""
    threads = rollout.threads()
    return {
        "total_tokens": total_tokens(rollout.root),
        "sequential_tokens": sequential_tokens(rollout.root),
        "longest_context": longest_context(rollout.root),
        "children": len(threads) - 1,
        "width": max(len(children) for thread in threads for children in [*thread.spawns, []]),
        "depth": max(len(thread.path) // 2 for thread in threads),
        "truncated": float(any(thread.stop in TRUNCATED for thread in threads)),
        "malformed": float(any(thread.stop == MALFORMED for thread in threads)),
        "milliseconds": rollout.milliseconds,
    }


# ------------------------------------------------------------------- engine


@dataclasses.dataclass
class Fill:
    """Work for one row: rewind it to its first `keep` ids, append `ids` (at least one), then sample.

    `key` and `drawn` (ids the thread has drawn so far) fix the thread's random
    draws; at most `limit` (at least 1) ids are sampled before the row stops.
    """

    row: int
    keep: int
    ids: list[int]
    key: tuple[int, int]
    drawn: int
    limit: int


@dataclasses.dataclass
class Stopped:
    """A row that sampled a stop id or reached its limit, with what it sampled since its `Fill`.

    `logprobs` are those of the model's own distribution, `sampled_logprobs` those
    of the distribution sampled from (temperature, top-k and top-p applied).
    """

    row: int
    ids: list[int]
    logprobs: list[float]
    sampled_logprobs: list[float]


class Engine(typing.Protocol):
    """What the runtime needs of a sampler: `rows` KV caches of `context` ids, spread evenly over `devices`."""

    rows: int
    devices: int
    context: int

    def reset(self) -> None:
        """Stops every row."""

    def prefill(self, fills: list[Fill]) -> None:
        """Sets rows going."""

    def decode(self) -> list[Stopped]:
        """Samples on until some rows have stopped, and returns those."""


# ------------------------------------------------------------------- runtime


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a rollout. Reaching one stops the thread with the reason of the same name."""

    children: int  # per spawn
    spawns: int  # per thread
    depth: int  # of nesting; 0 forbids spawning, 1 is the paper's
    thread_tokens: int  # sampled ids per thread
    rollout_tokens: int  # sampled ids per rollout; the children of a spawn share what is left in equal parts
    answer_tokens: int = 0  # for the answer of a root that reached thread_tokens; 0 lets it end without one
    extensions: int = 0  # times that a root which gives up is sent on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 1 if field.name in ("thread_tokens", "rollout_tokens") else 0
            if getattr(self, field.name) < least:
                raise ValueError(f"limit {field.name}={getattr(self, field.name)} must be at least {least}")


@dataclasses.dataclass(frozen=True)
class Request:
    """One rollout to run: a problem and which of its rollouts this is."""

    problem: typing.Any
    index: int = 0


JOINED, CHILD, NEW = range(3)  # in this order threads are given rows
BUSY = 2  # waiting parents keep their rows while 1 / BUSY of all rows decode


@dataclasses.dataclass
class _Live:
    """A thread in flight. `allowance` bounds the ids sampled by it and its descendants together."""

    thread: Thread
    parent: _Live | None
    number: int  # of the request
    allowance: int
    key: tuple[int, int]
    row: int | None = None
    cached: int = 0  # ids of the thread that its row holds
    pending: int = 0  # children that have not ended
    rewind: int = 0  # where the spawn block being waited for starts
    answering: bool = False  # made to, past its bound
    extended: int = 0  # times sent on

    def priority(self) -> tuple:
        """Joined parents, then children, then new problems; older requests first."""
        kind = JOINED if len(self.thread.calls) > 1 else CHILD if self.thread.path else NEW
        return kind, self.number, self.thread.path


def thread_key(seed: Sequence[int], request: Request, path: Sequence[int]) -> tuple[int, int]:
    """Two 32-bit words that fix a thread's draws; `seed` is what the run adds (key, update step)."""
    digest = hashlib.blake2b(repr((tuple(seed), request.problem, request.index, tuple(path))).encode(), digest_size=8)
    word = int.from_bytes(digest.digest(), "little")
    return word & 0xFFFFFFFF, word >> 32


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; `rollouts` are those that were finished."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        super().__init__()
        self.rollouts = rollouts


class Runtime:
    """Runs rollouts of `task` on `engine` within `limits`."""

    def __init__(
        self, engine: Engine, task: Task, limits: Limits, watch: Callable[[Thread], None] | None = None
    ) -> None:
        """`watch` is called with a thread whenever a call of it has stopped."""
        self.engine, self.task, self.limits, self.watch = engine, task, limits, watch
        self.evictions = 0  # waiting parents that lost their row

    def run(self, requests: Sequence[Request], seed: Sequence[int]) -> list[Rollout]:
        """All rollouts, in the order of `requests`. Raises Interrupted, with those that are done, on Ctrl-C."""
        return side_by_side([self], requests, seed)

    def stream(self, requests: Sequence[Request], seed: Sequence[int]) -> Iterator[tuple[int, Rollout]]:
        """Yields (number of the request, rollout) as rollouts finish.

        A caller that is interrupted keeps what it has been given. Raises
        ValueError if a prompt leaves no room to sample in the engine's context.
        """
        self._requests, self._seed = list(requests), tuple(seed)
        self._ready: list[tuple[tuple, _Live]] = []
        self._rows: list[_Live | None] = [None] * self.engine.rows
        self._active: dict[int, _Live] = {}
        self._waiting: list[_Live] = []
        self._done: list[tuple[int, Rollout]] = []
        self._start: dict[int, float] = {}
        self.engine.reset()
        for number, request in enumerate(self._requests):
            prompt = self.task.prompt(request.problem)
            if len(prompt) >= self.engine.context:
                raise ValueError(
                    f"the prompt of {request.problem} has {len(prompt)} ids and the context {self.engine.context}: "
                    "use a model with a longer context"
                )
            self._begin(None, number, (), prompt, self.limits.rollout_tokens)
        while self._ready or self._active:
            if fills := self._schedule():
                self.engine.prefill(fills)
            for stopped in self.engine.decode() if self._active else ():
                self._stopped(self._active.pop(stopped.row), stopped)
            done, self._done = self._done, []
            yield from done

    # -- scheduling

    def _begin(self, parent: _Live | None, number: int, path: tuple, prompt: list[int], allowance: int) -> _Live:
        live = _Live(Thread(path), parent, number, allowance, thread_key(self._seed, self._requests[number], path))
        live.thread.calls.append(Call(0, prompt))
        heapq.heappush(self._ready, (live.priority(), live))
        return live

    def _schedule(self) -> list[Fill]:
        """Gives rows to ready threads, best first, until rows run out."""
        fills = []
        while self._ready:
            _, live = self._ready[0]
            limit, reason = self._room(live)
            if limit > 0 and live.row is None and not self._take_row(live):
                break
            heapq.heappop(self._ready)
            if limit <= 0:
                self._end(live, reason)
                continue
            assert live.row is not None
            ids = live.thread.ids()
            drawn = sum(len(call.sampled) for call in live.thread.calls)
            fills.append(Fill(live.row, live.cached, ids[live.cached :], live.key, drawn, limit))
            self._active[live.row] = live
            self._start.setdefault(live.number, time.monotonic())
        return fills

    def _room(self, live: _Live) -> tuple[int, str]:
        """How many ids the thread may sample now, and the bound that says so."""
        own = sum(len(call.sampled) for call in live.thread.calls)
        return min(
            (self.engine.context - len(live.thread.ids()), CONTEXT),
            (self.limits.thread_tokens + live.answering * self.limits.answer_tokens - own, THREAD_TOKENS),
            (live.allowance - total_tokens(live.thread), ROLLOUT_TOKENS),
            key=lambda bound: bound[0],
        )

    def _take_row(self, live: _Live) -> bool:
        """Finds a row on the least busy device; the parent that began to wait last yields its row if need be."""
        free = [row for row, holder in enumerate(self._rows) if holder is None]
        if not free:
            holders = [parent for parent in self._waiting if parent.row is not None]
            # An eviction costs a prefill: not for a new problem, nor while enough rows are busy.
            if not holders or live.priority()[0] == NEW or BUSY * len(self._active) >= self.engine.rows:
                return False
            loser = holders[-1]
            assert loser.row is not None
            free = [loser.row]
            self._rows[loser.row], loser.row, loser.cached = None, None, 0
            self.evictions += 1
        per_device = self.engine.rows // self.engine.devices
        busy = [0] * self.engine.devices
        for row in self._active:
            busy[row // per_device] += 1
        live.row = min(free, key=lambda row: (busy[row // per_device], row))
        self._rows[live.row] = live
        return True

    # -- what happens to a thread

    def _stopped(self, live: _Live, stopped: Stopped) -> None:
        """Books what a row sampled and decides what becomes of its thread."""
        _, reason = self._room(live)
        call = live.thread.calls[-1]
        call.sampled, call.logprobs = stopped.ids, stopped.logprobs
        live.cached = len(live.thread.ids())
        if stopped.ids[-1] == self.task.end_id:
            self._end(live, END)
        elif stopped.ids[-1] == self.task.spawn_id:
            self._spawn(live)
        else:
            self._end(live, reason)

    def _spawn(self, live: _Live) -> None:
        """Starts the children a thread asked for, or ends it with the bound or fault that forbids them."""
        thread, limits = live.thread, self.limits
        if len(thread.path) // 2 >= limits.depth:
            return self._end(live, DEPTH)
        if len(thread.spawns) >= limits.spawns:
            return self._end(live, SPAWNS)
        try:
            spawn = self.task.spawn(thread.ids())
        except MalformedSpawn as fault:
            thread.detail = str(fault)
            return self._end(live, MALFORMED)
        if len(spawn.prompts) > limits.children:
            return self._end(live, CHILDREN)
        thread.calls[-1].stop = SPAWN
        if self.watch:
            self.watch(thread)
        live.rewind, live.pending = spawn.start, len(spawn.prompts)
        allowance = (live.allowance - total_tokens(thread)) // len(spawn.prompts)
        children = [
            self._begin(live, live.number, (*thread.path, len(thread.spawns), child), prompt, allowance)
            for child, prompt in enumerate(spawn.prompts)
        ]
        thread.spawns.append([child.thread for child in children])
        self._waiting.append(live)

    def _end(self, live: _Live, reason: str) -> None:
        """Ends a thread; its row is free, and its parent goes on if it was the last child. A root may be forced on."""
        live.thread.calls[-1].stop = reason
        if self.watch:
            self.watch(live.thread)
        if live.parent is None and (forced := self._forced(live)):
            return self._continue(live, *forced)
        if live.row is not None:
            self._rows[live.row] = None
        if live.parent is None:
            return self._finish(live)
        live.parent.pending -= 1
        if live.parent.pending == 0:
            self._join(live.parent)

    def _join(self, live: _Live) -> None:
        """Rewinds a parent to before its spawn block, extends it by the join block and makes it ready."""
        self._waiting.remove(live)
        self._continue(live, live.rewind, self.task.join(live.thread.spawns[-1]))

    def _continue(self, live: _Live, keep: int, ids: list[int]) -> None:
        live.cached = min(live.cached, keep)
        live.thread.calls.append(Call(keep, ids))
        heapq.heappush(self._ready, (live.priority(), live))

    def _forced(self, live: _Live) -> tuple[int, list[int]] | None:
        """How a root that has stopped goes on by budget forcing; None if it does not."""
        ids = live.thread.ids()
        if live.thread.stop == THREAD_TOKENS and self.limits.answer_tokens and not live.answering:
            live.answering = True
            return self.task.answer(self._requests[live.number].problem, ids)
        if live.thread.stop == END and live.extended < self.limits.extensions:
            live.extended += 1
            return self.task.extend(ids)
        return None

    def _finish(self, live: _Live) -> None:
        request = self._requests[live.number]
        milliseconds = 1e3 * (time.monotonic() - self._start.get(live.number, time.monotonic()))
        grade = self.task.grade(request.problem, live.thread)
        self._done.append((live.number, Rollout(request.problem, live.thread, grade, request.index, milliseconds)))


def side_by_side(
    runtimes: Sequence[Runtime],
    requests: Sequence[Request],
    seed: Sequence[int],
    tell: Callable[[], None] | None = None,
) -> list[Rollout]:
    """All rollouts, in the order of `requests`: each runtime runs an equal share, in a host thread of its own.

    `tell` is called after each rollout. Raises Interrupted, with those that are done, on Ctrl-C, and whatever a
    runtime raises.
    """
    finished: dict[int, Rollout] = {}
    leave = threading.Event()

    def lane(first: int) -> None:
        share = requests[first :: len(runtimes)]
        for number, rollout in runtimes[first].stream(share, seed):
            finished[first + number * len(runtimes)] = rollout
            if tell:
                tell()
            if leave.is_set():
                return

    try:
        with concurrent.futures.ThreadPoolExecutor(len(runtimes)) as pool:
            try:
                for running in concurrent.futures.as_completed(pool.submit(lane, n) for n in range(len(runtimes))):
                    running.result()
            finally:
                leave.set()  # or the others would run to their end before an error is heard of
    except KeyboardInterrupt as interrupt:
        raise Interrupted([finished[number] for number in sorted(finished)]) from interrupt
    return [finished[number] for number in range(len(requests))]
