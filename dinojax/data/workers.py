"""A function of 0, 1, 2, ... computed ahead by threads or worker processes, results in order.

Used by `data.pipeline`. A worker process reads numbers from a pipe, writes results to another, and
ends when either is gone: whatever becomes of this process (kill -9 too), none is left behind, and
there is no shared memory to leak. It imports what it needs and not the main module, so scripts need
no `if __name__ == "__main__"`, and it takes no notice of Ctrl-C and SIGTERM, which are for this
process to hear. (Worker processes of grain 0.2.18 outlived a parent that got SIGTERM, with 300
segments of shared memory, and hung after an early Ctrl-C: tests/data/test_shutdown.py.)
"""

import contextlib
import itertools
import os
import pickle
import subprocess
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar

import cloudpickle

T = TypeVar("T")

# Signals first: importing takes a second. Paths next: without them there is nothing to import.
_WORKER = """
import signal, pickle, sys
signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.path[:] = pickle.load(sys.stdin.buffer)
from dinojax.data.workers import serve
serve()
"""


class Ahead(Iterator[T]):
    """function(first), function(first + 1), ... without end, each begun before it is asked for.

    `workers` processes compute it, or (workers 0) `threads` threads of this one, or (both 0) the
    caller. At most max(ahead, workers, threads) results are there or in the making. An error of the
    function comes at its place, again at every call.
    """

    def __init__(
        self,
        function: Callable[[int], T],
        first: int = 0,
        *,
        workers: int = 0,
        threads: int = 1,
        ahead: int = 1,
    ) -> None:
        self._stopped = threading.Event()
        processes: list[subprocess.Popen[bytes]] = []
        self._function = _in_processes(function, processes) if workers else function
        self._numbers = itertools.count(first)
        self._begun: deque[Future[T]] = deque()
        count = workers or threads
        self._limit = max(ahead, count) if count else 0
        self._pool = ThreadPoolExecutor(count, "dinojax-data") if count else None
        # Nobody waits then: it may be one of the threads that finds out.
        self._forgotten = weakref.finalize(self, _close, self._stopped, self._pool, processes)
        self._begin()

    def __next__(self) -> T:
        if self._stopped.is_set():
            raise ValueError("this stream of batches has been closed.")
        if self._pool is None:
            return self._function(next(self._numbers))
        # Taken off only when it is there: a Ctrl-C while waiting loses nothing.
        result = self._begun[0].result()
        self._begun.popleft()
        self._begin()
        return result

    def close(self) -> None:
        """Drops what is computed ahead; ends processes, and threads after their present call."""
        self._begun.clear()
        resources = self._forgotten.detach()
        if resources:
            _close(*resources[2], wait=True)

    def _begin(self) -> None:
        while len(self._begun) < self._limit:
            call = _unless(self._stopped, self._function)
            self._begun.append(self._pool.submit(call, next(self._numbers)))


def serve() -> None:
    """What a worker process does: function(number) for every number that comes in."""
    inbox, outbox = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # prints must not get among the results
    function = None
    with contextlib.suppress(EOFError, BrokenPipeError):  # the other side has gone
        payload = pickle.load(inbox)
        while True:
            number = pickle.load(inbox)
            try:
                function = function or pickle.loads(payload)
                outcome = (True, function(number))
            except Exception as error:
                error.add_note(traceback.format_exc())
                outcome = (False, error)
            _send(outbox, outcome)
    os._exit(0)  # nothing here needs an orderly end


def _unless(stopped: threading.Event, function: Callable[[int], T]) -> Callable[[int], T]:
    """`function`, but not any more once the stream is closed or the interpreter is about to end.

    (It waits for what its thread pools have begun, before anything else happens at exit.)
    """

    def call(number: int) -> T:
        if stopped.is_set() or not threading.main_thread().is_alive():
            raise CancelledError
        return function(number)

    return call


def _close(
    stopped: threading.Event,
    pool: ThreadPoolExecutor | None,
    processes: list[subprocess.Popen[bytes]],
    wait: bool = False,
) -> None:
    stopped.set()
    for process in list(processes):
        process.kill()  # it holds nothing but its memory
    if pool is not None:
        pool.shutdown(wait=wait, cancel_futures=True)
    for process in processes:  # with those that were just being started
        process.kill()
        process.wait()


# ---- worker processes ----------------------------------------------------------------------------


def _in_processes(
    function: Callable[[int], T], processes: list[subprocess.Popen[bytes]]
) -> Callable[[int], T]:
    """`function`, computed in a process of its own for every thread that calls it."""
    # Not pickle: what a notebook or a script defines travels with its code.
    payload, mine = cloudpickle.dumps(function), threading.local()

    def call(number: int) -> T:
        try:
            if not hasattr(mine, "process"):
                mine.process = subprocess.Popen(
                    [sys.executable, "-c", _WORKER],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C goes to all processes of a terminal's session
                )
                processes.append(mine.process)
                pickle.dump(sys.path, mine.process.stdin)
                pickle.dump(payload, mine.process.stdin)
            pickle.dump(number, mine.process.stdin)
            mine.process.stdin.flush()
            done, outcome = _receive(mine.process.stdout)
        except (EOFError, BrokenPipeError):
            raise ChildProcessError(_how_it_ended(mine.process)) from None
        if not done:
            raise outcome
        return outcome

    return call


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    hint = "; is memory short? Try fewer config.data.workers" if code == -9 else ""
    return f"worker process {process.pid} of the data {how}{hint}."


def _send(pipe: BinaryIO, value: Any) -> None:
    """Pickled, with arrays behind it as they lie in memory."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, 5, buffer_callback=buffers.append)
    arrays = [buffer.raw() for buffer in buffers]
    pickle.dump((head, [array.nbytes for array in arrays]), pipe)
    for array in arrays:
        pipe.write(array)
    pipe.flush()


def _receive(pipe: BinaryIO) -> Any:
    head, sizes = pickle.load(pipe)
    buffers = [bytearray(size) for size in sizes]
    for buffer in buffers:
        if pipe.readinto(buffer) != len(buffer):
            raise EOFError
    return pickle.loads(head, buffers=buffers)
