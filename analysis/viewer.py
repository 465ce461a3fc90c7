"""The viewer: one self-contained page that shows a single rollout.

The page is one file that needs no network: the header, the search tree, the threads on a clock of tokens, and the
text of each thread.

  1. `read_trace` rebuilds the `Rollout` that a trace file keeps, and refuses what is none.
  2. `timeline` puts every call on the clock and marks the critical path.
  3. The task's own hook (`harness.tasks`) reads the search tree off the text.
  4. `page` puts all this into viewer.html as JSON; the script there only draws.

Run: python -m analysis.figures --trace=trace.json
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import typing
from collections.abc import Callable

import records
from analysis.timeline import timeline
from harness import tasks
from harness.cli import UsageError, usage_errors
from protocols import Language
from records import Call, Grade, Rollout, Thread

TEMPLATE = pathlib.Path(__file__).parent / "viewer.html"
MAX_DEPTH = 50  # of threads in a trace file
JOINED, STARTED, FORCED = "joined", "that children have started", "forced"  # why a call was extended
EXTENDED = {records.SPAWN: JOINED, records.JOIN: JOINED, records.FORK: STARTED}  # by why the one before it stopped
PLACEHOLDER = "{{DATA}}"  # in the template
STOPPED = {
    records.END: "ended by itself",
    records.SPAWN: "asked for children",
    records.FORK: "started children and goes on",
    records.JOIN: "asked for the results of children",
    records.CONTEXT: "cut: its context was full",
    records.THREAD_TOKENS: "cut: the thread's tokens were used up",
    records.ROLLOUT_TOKENS: "cut: the rollout's tokens were used up",
    records.MALFORMED: "its spawn block or join was malformed",
    records.CHILDREN: "cut: it asked for too many children",
    records.SPAWNS: "cut: it asked for children too often",
    records.DEPTH: "cut: it asked for children too deep down",
}

# ---------------------------------------------------------------- trace files


def _fields(value: typing.Any, name: str, **kinds: type | tuple[type, ...]) -> dict[str, typing.Any]:
    """`value`, if it is a JSON object with these fields; ValueError if not."""
    if not isinstance(value, dict) or not all(isinstance(value.get(field), kind) for field, kind in kinds.items()):
        raise ValueError(f"{name} must be an object with {', '.join(kinds)}")
    return value


def rollout_from_json(value: typing.Any, vocab_size: int, problem: Callable[[typing.Any], typing.Any]) -> Rollout:
    """The inverse of `dataclasses.asdict`; `problem` reads the problem. Raises ValueError where it can be no record."""

    def call(value: typing.Any, before: int) -> Call:
        """A call of a thread that had `before` ids until then. Raises ValueError."""
        result = Call(**_fields(value, "a call", keep=int, injected=list, sampled=list, logprobs=list, stop=str))
        if not all(type(token) is int and 0 <= token < vocab_size for token in result.injected + result.sampled):
            raise ValueError(f"the ids of a call must be integers from 0 to {vocab_size - 1}")
        if not 0 <= result.keep <= before or result.stop not in records.STOPS:
            raise ValueError(f"a call cannot keep {result.keep} of {before} ids, or cannot stop by {result.stop!r}")
        return result

    def thread(value: typing.Any, depth: int = 0) -> Thread:
        """A thread and its descendants. Raises ValueError."""
        fields = _fields(value, "a thread", path=list, calls=list, spawns=list, detail=str)
        result = Thread(tuple(fields["path"]), detail=fields["detail"])
        if len(result.path) != 2 * depth or not all(type(number) is int for number in result.path) or depth > MAX_DEPTH:
            raise ValueError(f"a thread has two numbers of a path per level, and at most {MAX_DEPTH} levels above it")
        for stored in fields["calls"]:
            result.calls.append(call(stored, len(result.ids())))
        result.spawns = [[thread(child, depth + 1) for child in children] for children in fields["spawns"]]
        stops = [call.stop for call in result.calls]
        forced = {records.END, records.THREAD_TOKENS}  # a root may go on after these
        goes_on = {*EXTENDED} if result.path else {*EXTENDED, *forced}
        spawned = sum(stop in records.SPAWNED for stop in stops[:-1])
        whole = stops and {*stops[:-1]} <= goes_on and stops[-1] not in EXTENDED
        if not (whole and all(result.spawns) and len(result.spawns) == spawned):
            raise ValueError("a thread goes on only after a spawn, or forced, and has children for each of its spawns")
        unjoined = [(stop in records.SPAWNED) - (stop in records.WAITED) for stop in stops[:-1]]
        if min(itertools.accumulate(unjoined), default=0) < 0:
            raise ValueError("a thread joins only what it has spawned")
        return result

    fields = _fields(value, "rollout", problem=dict, root=dict, grade=dict, index=int, milliseconds=(int, float))
    grade = _fields(fields["grade"], "grade", correct=bool, reason=str, answer=list)
    return Rollout(
        problem(fields["problem"]),
        thread(fields["root"]),
        Grade(grade["correct"], grade["reason"], tuple(grade["answer"])),
        fields["index"],
        fields["milliseconds"],
    )


@dataclasses.dataclass(frozen=True)
class Trace:
    """A trace file: a rollout, the method of its demonstrator or model, its task and the language of its ids."""

    rollout: Rollout
    method: str
    task: str
    language: Language


def read_trace(path: str) -> Trace:
    """Reads a trace file (`records.stored`). Raises UsageError if it is none."""
    with usage_errors():
        data = pathlib.Path(path).read_bytes()
        try:
            fields = _fields(json.loads(data), "it", task=str, facts=dict, rollout=dict)
            domain = tasks.part(fields["task"], "domain")
            facts = _fields(fields["facts"], "facts", method=str)
            language = domain.read_language(facts)
            rollout = rollout_from_json(fields["rollout"], language.vocab_size, domain.from_json)
            return Trace(rollout, facts["method"], fields["task"], language)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UsageError(f"{path} is no trace file of evaluate.py --record or solver.py --json: {error}") from error


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


def page_data(trace: Trace) -> dict[str, typing.Any]:
    """All that the page shows. Threads and states are named by their index."""
    rollout, language = trace.rollout, trace.language
    lanes = timeline(rollout.root)
    states = tasks.part(trace.task, "states")(rollout, lanes, language)
    number = {id(lane.thread): i for i, lane in enumerate(lanes)}
    costs = records.metrics(rollout)
    threads = [
        {
            "name": "child " + ".".join(map(str, lane.thread.path)) if lane.thread.path else "parent",
            "detail": lane.thread.detail,
            "joins": lane.joins,
            "spawns": [[number[id(child)] for child in children] for children in lane.thread.spawns],
            "spawned": [i for i, call in enumerate(lane.thread.calls) if call.stop in records.SPAWNED],  # the calls
            "calls": [
                {
                    "start": start,
                    "tokens": len(call.sampled),
                    "keep": call.keep,
                    "stop": call.stop,
                    "critical": lane.critical[i],
                    "extended": EXTENDED.get(lane.thread.calls[i - 1].stop, FORCED) if i else "",
                    "why": STOPPED[call.stop],
                    "text": [
                        {"kind": kind, "removed": removed, "tokens": len(ids), "text": language.decode(ids)}
                        for kind, removed, ids in pieces(lane.thread, i)
                    ],
                }
                for i, (start, call) in enumerate(lane.runs())
            ],
        }
        for lane in lanes
    ]
    return {
        "method": trace.method,
        "task": trace.task.capitalize(),
        "problem": tasks.part(trace.task, "domain").to_json(rollout.problem),
        "grade": dataclasses.asdict(rollout.grade),
        "costs": {**costs, "speedup": costs["total_tokens"] / max(1, costs["sequential_tokens"])},
        "threads": threads,
        "states": [dataclasses.asdict(state) for state in states],
    }


def page(data: dict[str, typing.Any]) -> str:
    """The HTML. No text in `data` can end the script element that holds it: "<" is written as an escape."""
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, json.dumps(data).replace("<", "\\u003c"))
