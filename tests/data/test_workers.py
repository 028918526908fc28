"""Results in order whoever computes them; errors at their place; nothing left behind."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from dinojax.data.workers import Ahead


@pytest.mark.parametrize("computed_by", [{"threads": 0}, {"threads": 3}, {"workers": 2}])
def test_in_order_from_anywhere(computed_by):
    # Defined here, so that its code travels: a worker cannot import this module.
    offset = 4

    def function(number):
        array = np.full((number, 2), offset + number, np.int16)
        return {"array": array, "text": str(number), "empty": (), "flat": array[:0]}

    ahead = Ahead(function, 7, **computed_by, ahead=4)
    for number in range(7, 30):
        found = next(ahead)
        assert found["text"] == str(number) and found["empty"] == ()
        expected = np.full((number, 2), 4 + number, np.int16)
        np.testing.assert_array_equal(found["array"], expected, strict=True)
        found["array"][:] = 0  # the caller's own
    ahead.close()
    ahead.close()
    with pytest.raises(ValueError, match="closed"):
        next(ahead)


@pytest.mark.parametrize("computed_by", [{"threads": 2}, {"workers": 1}])
def test_an_error_comes_at_its_place(computed_by):
    def function(number):
        if number == 3:
            raise FileNotFoundError(2, "not there", "three")
        return number

    ahead = Ahead(function, **computed_by, ahead=8)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(FileNotFoundError) as caught:
            next(ahead)
        assert caught.value.filename == "three"
    ahead.close()


def test_no_more_than_asked_for_is_begun():
    begun, gate = [], threading.Event()

    def function(number):
        begun.append(number)
        gate.wait(5)
        return number

    ahead = Ahead(function, threads=2, ahead=5)
    gate.set()
    for k in range(1, 6):
        next(ahead)
        time.sleep(0.05)
        assert len(begun) == k + 5
    ahead.close()


def test_threads_end_when_closed_or_forgotten():
    def names():
        return [t.name for t in threading.enumerate() if t.name.startswith("dinojax-data")]

    before = len(names())
    ahead = Ahead(lambda number: time.sleep(0.01), threads=4, ahead=100)
    next(ahead)
    assert len(names()) == before + 4
    ahead.close()  # waits for them
    assert len(names()) == before
    ahead = Ahead(lambda number: time.sleep(0.01), threads=4, ahead=100)
    next(ahead)
    del ahead
    deadline = time.monotonic() + 5
    while len(names()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(names()) == before


def test_a_killed_worker_is_told_in_a_sentence():
    def function(number):
        print("not among the results")
        return os.getpid()

    ahead = Ahead(function, workers=1, ahead=2)
    worker = next(ahead)
    assert worker != os.getpid() and next(ahead) == worker
    for number in (signal.SIGINT, signal.SIGTERM):  # these are for the run to hear
        os.kill(worker, number)
    for _ in range(3):
        assert next(ahead) == worker
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=f"process {worker} .* killed by signal 9.*workers"):
        for _ in range(5):
            next(ahead)
    ahead.close()


def test_closing_ends_the_workers():
    def function(number):
        return os.getpid()

    ahead = Ahead(function, workers=2, ahead=8)
    workers = {next(ahead) for _ in range(8)}
    ahead.close()
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
