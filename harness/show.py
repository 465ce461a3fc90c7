"""Rollouts as text for people: what every thread was given and wrote, and the verdict. No JAX."""

from __future__ import annotations

import records
from protocols import Language
from records import Grade, Rollout, Thread


def show_call(thread: Thread, number: int, language: Language) -> str:
    """One call of a thread: what it was given (after "|") and what it wrote."""
    call = thread.calls[number]
    name = "parent" if not thread.path else "child " + ".".join(map(str, thread.path))
    given = "".join(f"  | {line}\n" for line in language.decode(call.injected).splitlines())
    wrote = "".join(f"    {line}\n" for line in language.decode(call.sampled).splitlines() if line)
    detail = f": {thread.detail}" if thread.detail and number == len(thread.calls) - 1 else ""
    return f"[{name}, call {number}] {len(call.sampled)} tokens, stopped by {call.stop}{detail}\n{given}{wrote}"


def show(rollout: Rollout, language: Language) -> str:
    """All threads of a rollout, call by call in the order they ran: children stand where they were spawned."""
    parts = []

    def visit(thread: Thread) -> None:
        """Shows a thread, and its children between the calls that spawned and joined them."""
        spawns = iter(thread.spawns)
        for number, call in enumerate(thread.calls):
            parts.append(show_call(thread, number, language))
            if call.stop in records.SPAWNED:
                for child in next(spawns):
                    visit(child)

    visit(rollout.root)
    return "".join(parts)


def verdict(grade: Grade) -> str:
    """The answer, and whether it is right or why not."""
    answer = ", ".join(grade.answer) or "none"
    return f"answer: {answer} ({'right' if grade.correct else f'wrong: {grade.reason}'})"
