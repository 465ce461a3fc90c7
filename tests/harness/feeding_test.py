"""Demonstrations made ahead: the same batches for any number of workers, exact resume, one error for any failure."""

import gc
import io
import itertools
import os
import pickle
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import sft
from configs import apr
from harness import feeding
from harness.build import build
from harness.cli import UsageError
from packing import TokenBatch

CONTEXT = 384  # of four numbers: threads join twice and some overrun


def config(**train: str | int) -> ConfigDict:
    """Four numbers, of which some overrun the context."""
    found = apr.get_config("smoke")
    found.mesh.data, found.problems.count, found.model.context, found.train.rows = 1, 4, CONTEXT, 3
    found.train.micro_rows = 1
    found.train.update(train)
    return found


def stream(feeders: int, cursor: dict | None = None, **train: str | int) -> sft.DemonstrationStream:
    return sft.DemonstrationStream(build(config(**train)), cursor, feeders)


def assert_same(one: TokenBatch, other: TokenBatch) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_batches_do_not_depend_on_the_number_of_workers(overlong):
    streams = [stream(feeders, overlong=overlong) for feeders in (0, 1, 3)]
    for _ in range(12):
        here, *others = [each.next() for each in streams]
        for other in others:
            assert_same(here, other)
        assert [each.cursor for each in streams] == [streams[0].cursor] * 3
        assert len({each.used for each in streams}) == 1
    assert streams[0].overlong > 0


@pytest.mark.parametrize(("before", "after"), [(3, 2), (0, 3), (3, 0)])
def test_a_stream_resumes_to_the_same_batches_with_other_workers(before, after):
    first = stream(before)
    for _ in range(5):
        first.next()
    resumed = stream(after, first.cursor)
    for _ in range(5):
        assert_same(first.next(), resumed.next())


def test_an_exception_in_a_worker_is_one_sentence():
    wrong = config()
    wrong.demonstrator.method = "guess"
    feeder = feeding.Feeder(build(config()).domain, wrong, 0, 2)
    for _ in range(2):  # and again for whoever asks again
        with pytest.raises(UsageError, match=r"failed, ValueError: .*guess.*: train.feeders=0") as error:
            feeder.next()
        assert "\n" not in str(error.value)


def test_a_worker_that_dies_is_one_sentence():
    feeder = feeding.Feeder(build(config()).domain, config(), 0, 2)
    feeder.next()
    os.kill(feeder._workers[1].process.pid, signal.SIGKILL)
    with pytest.raises(UsageError, match="failed, it ended with status -9"):
        for _ in itertools.count():
            feeder.next()


def test_what_was_made_before_a_failure_is_kept(monkeypatch):
    """The third of the demonstrations 5, 7, 9 cannot be made."""
    made, whole = io.BytesIO(), feeding.make

    def breaks(domain, config, index):
        if index == 9:
            raise ZeroDivisionError("of nine")
        return whole(domain, config, index)

    monkeypatch.setattr(feeding, "make", breaks)
    feeding.serve(config(overlong="cut"), 5, 2, made)
    made.seek(0)
    for index in (5, 7):
        segments, _ = pickle.load(made)
        expected, _ = whole(build(config()).domain, config(overlong="cut"), index)
        assert [segment.tokens.tolist() for segment in segments] == [segment.tokens for segment in expected]
    assert pickle.load(made) == "ZeroDivisionError: of nine"


def test_workers_end_with_their_feeder():
    feeder = feeding.Feeder(build(config()).domain, config(), 0, 2)
    processes: list[subprocess.Popen] = [worker.process for worker in feeder._workers]
    assert all(process.poll() is None for process in processes)
    del feeder
    gc.collect()
    assert all(process.poll() is not None for process in processes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_ends_no_worker(number):
    feeder = feeding.Feeder(build(config()).domain, config(), 0, 1)
    feeder.next()  # it is at work, and ignores them
    feeder._workers[0].process.send_signal(number)
    for _ in range(3 * feeding.AHEAD):
        feeder.next()
    assert feeder._workers[0].process.poll() is None


def test_a_worker_is_only_so_far_ahead():
    """The queue and the pipe are bounded, so the made demonstrations are."""
    feeder = feeding.Feeder(build(config()).domain, config(), 0, 1)
    feeder.next()
    deadline = time.monotonic() + 60
    while not feeder._workers[0]._made.full():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert feeder._workers[0]._made.qsize() == feeding.AHEAD
