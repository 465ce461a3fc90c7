"""Rollouts on several runtimes at once: each has a host thread and an equal share of the requests."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Sequence

from parallel_runtime import Runtime
from protocols import Request
from records import Rollout


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; `rollouts` are those that were finished."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        super().__init__()
        self.rollouts = rollouts


def run_on_workers(
    runtimes: Sequence[Runtime],
    requests: Sequence[Request],
    seed: Sequence[int],
    on_rollout: Callable[[], None] | None = None,
) -> list[Rollout]:
    """All rollouts, in the order of `requests`. Each runtime runs an equal share in its own host thread.

    `on_rollout` is called after each rollout. Raises Interrupted, with the rollouts that are done, on Ctrl-C, and
    whatever a runtime raises.
    """
    finished: dict[int, Rollout] = {}
    leave = threading.Event()

    def worker(first: int) -> None:
        """Runs the share of runtime number `first`."""
        share = requests[first :: len(runtimes)]
        for number, rollout in runtimes[first].stream(share, seed):
            finished[first + number * len(runtimes)] = rollout
            if on_rollout:
                on_rollout()
            if leave.is_set():
                return

    try:
        with concurrent.futures.ThreadPoolExecutor(len(runtimes)) as pool:
            try:
                for running in concurrent.futures.as_completed(pool.submit(worker, n) for n in range(len(runtimes))):
                    running.result()
            finally:
                leave.set()  # without it, an error of one worker would wait until the others end
    except KeyboardInterrupt as interrupt:
        raise Interrupted([finished[number] for number in sorted(finished)]) from interrupt
    return [finished[number] for number in range(len(requests))]
