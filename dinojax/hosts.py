"""Several processes as one run: how they find each other, agree, and end together.

`launch/run.py` calls `start` before jax looks for devices and does everything inside `Team.run`.
One process is a team of one, for which nothing here costs anything.

What ends a run of several, all of it with one sentence on every host:

    a host fails         its sentence; the others say whose it was. All end with its code, 1.
    a host goes silent   killed, cut off, taken away: the others end with 75 (start all again, the
                         run goes on from its last checkpoint). Noticed after `patience` seconds.
    SIGTERM anywhere     all stop after the same step, save, and end with 75 (`train.StopRequest`).

jax itself ends a process whose coordinator is gone, with a C++ stack trace and abort(); the last
word after it is ours (`_speak_after_abort`).
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
from jax.sharding import Mesh

from dinojax import __version__

TRY_AGAIN = 75  # EX_TEMPFAIL: start all hosts again
PATIENCE = "DINOJAX_PATIENCE"  # environment: seconds to wait for another host, for all purposes
JOIN_SECONDS, SILENT_SECONDS = 300, 60
_BUSY_SECONDS = 3600  # a host may read a large directory before it answers
BEATS = 10  # signs of life in the time after which a host counts as silent
_NOW = "dinojax/now/"  # alive/<process>: a counter; left/<process>: why it ended
# What a collective, or jax's own service, says when the other side is gone.
_BROKEN = ("gloo", "unavailable", "deadline_exceeded", "barrier", "socket", "connection", "nccl")


class LostHostError(Exception):
    """Another host is not there (any more), in one sentence."""


class Found(NamedTuple):
    """How the processes of a run find each other."""

    name: str  # in words
    arguments: Mapping[str, Any]  # of jax.distributed.initialize


def find(environment: Mapping[str, str]) -> Found | None:
    """What the environment says about other processes; None: this is the only one.

    Raises:
      ValueError: there are others, but nothing says how to reach them.
    """
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS")
    if coordinator and "JAX_NUM_PROCESSES" in environment:
        number = {
            name: _whole(environment, f"JAX_{name.upper()}")
            for name in ("num_processes", "process_id")
        }
        return Found(f"JAX_COORDINATOR_ADDRESS={coordinator}", number)
    if _count(environment, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE") > 1:
        return _find_mpi(environment)
    if _count(environment, "SLURM_NTASKS") > 1 and "SLURM_STEP_NODELIST" in environment:
        return Found("Slurm", {"cluster_detection_method": "slurm"})
    listed = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    slices = _count(environment, "MEGASCALE_NUM_SLICES")
    if "," in listed or slices > 1:
        name = "TPU pod, from its environment" + (f", {slices} slices" if slices > 1 else "")
        return Found(name, {})
    if coordinator:  # launch/on_worker.sh: jax asks the metadata server who this host is
        return Found(f"TPU pod, first host {coordinator}", {})
    return None


def _find_mpi(environment: Mapping[str, str]) -> Found:
    if "OMPI_MCA_orte_hnp_uri" in environment:  # Open MPI 4; later versions do not tell
        return Found("Open MPI", {"cluster_detection_method": "ompi"})
    if "JAX_COORDINATOR_ADDRESS" in environment:
        rank = "OMPI_COMM_WORLD_RANK" if "OMPI_COMM_WORLD_RANK" in environment else "PMI_RANK"
        count = _count(environment, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
        return Found("MPI", {"num_processes": count, "process_id": _whole(environment, rank)})
    if importlib.util.find_spec("mpi4py"):
        return Found("MPI, through mpi4py", {"cluster_detection_method": "mpi4py"})
    raise ValueError(
        "MPI has started several processes but does not say where the first one is; "
        "pip install mpi4py, or set JAX_COORDINATOR_ADDRESS=HOST:PORT"
    )


def _whole(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r}; expected a whole number")
    return int(text)


def _count(environment: Mapping[str, str], *names: str) -> int:
    """The first of these variables that is a number; 1 where none is."""
    given = (environment.get(name, "") for name in names)
    return next((int(text) for text in given if text.isdecimal()), 1)


def start() -> "Team":
    """Join the other processes if the environment names any; with devices found on all of them.

    Raises:
      ValueError: one sentence; see `find`.
      LostHostError: another process did not come in time.
    """
    found = find(os.environ)
    if found is None:
        return Team("")
    patience = os.environ.get(PATIENCE)
    join = int(float(patience or JOIN_SECONDS))
    where = os.environ.get("JAX_COORDINATOR_ADDRESS", "the first host")
    _speak_after_abort(
        f"not all processes met at {where} within {join} s ({found.name}); is the same command "
        "running on every host, and may they reach each other?"
    )
    try:
        jax.distributed.initialize(**found.arguments, initialization_timeout=join)
        jax.device_count()  # a meeting of all: nothing that can fail on one of them may come before
    except ValueError as error:
        raise ValueError(f"{found.name}: {error}") from None
    except RuntimeError as error:  # jax's own errors too
        reason = str(error).partition("\n")[0]
        raise LostHostError(f"the hosts did not meet ({found.name}): {reason}") from None
    return Team(found.name, float(patience or SILENT_SECONDS))


class Team:
    """The processes of a run, as one of them sees the others. Made by `start`.

    Args:
        found: how they found each other, in words.
        patience: seconds after which a silent process counts as lost.
    """

    def __init__(self, found: str, patience: float = SILENT_SECONDS) -> None:
        self.found, self.patience = found, patience
        self.index, self.count, self.names = 0, 1, ["this host"]
        self._ending = threading.Event()
        if not found:
            return
        self.index, self.count = jax.process_index(), jax.process_count()
        from jax._src import distributed  # the service has no public name; orbax uses it so too

        self._client = distributed.global_state.client
        self.names = [f"host {k}" for k in range(self.count)]
        names = self.exchange("name", socket.gethostname())
        self.names = [f"host {k} ({name})" for k, name in enumerate(names)]
        _speak_after_abort(f"{self.names[0]}, which holds the hosts together, is gone; {_AGAIN}")
        threading.Thread(target=self._watch, name="hosts", daemon=True).start()

    def describe(self, mesh: Mesh) -> str:
        """4 hosts x 4 devices (TPU v5, Slurm), mesh data=1 fsdp=16 tensor=1"""
        what = jax.local_devices()[0].device_kind
        hosts = f"{self.count} host{'s' * (self.count > 1)} x {jax.local_device_count()} devices"
        sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        return f"{hosts} ({', '.join(filter(None, (what, self.found)))}), mesh {sizes}"

    def exchange(self, name: str, text: str) -> list[str]:
        """The texts of all processes, in order; each `name` is for one exchange."""
        if self.count == 1:
            return [text]
        self._client.key_value_set(f"dinojax/{name}/{self.index}", text)
        texts, until = [], time.monotonic() + _BUSY_SECONDS  # `_watch` sees to the dead
        for other in range(self.count):
            left = max(int(1000 * (until - time.monotonic())), 1)
            try:
                texts.append(self._client.blocking_key_value_get(f"dinojax/{name}/{other}", left))
            except jax.errors.JaxRuntimeError:
                lost = f"{self.names[other]} has not come as far as this one ({name})"
                raise LostHostError(f"{lost}; {_AGAIN}") from None
        return texts

    def agree(self, wrong: str, config: Mapping[str, Any]) -> str:
        """What is wrong on any host, or differs between them, in one sentence; "" if nothing.

        Args:
            wrong: what this one has found.
            config: the flat config; all hosts must have the same, and the same code.
        """
        facts = {**config, "the code": code_version(), "jax": jax.__version__}
        told = [json.loads(t) for t in self.exchange("prepared", json.dumps([wrong, facts]))]
        sentences = {sentence for sentence, _ in told}
        if len(sentences) == 1 and wrong:
            return wrong
        for name, (sentence, _) in zip(self.names, told):
            if sentence:
                return f"{name}: {sentence}"
        first = told[0][1]
        for name, (_, other) in zip(self.names, told):
            for key in sorted(first.keys() | other.keys()):
                if first.get(key) != other.get(key):
                    return (
                        f"{name} has {key} {other.get(key)!r} and {self.names[0]} has "
                        f"{first.get(key)!r}; give all hosts the same command and code"
                    )
        return ""

    def run(self, work: Callable[[], int]) -> int:
        """The exit code of `work`, after which all processes end together.

        Of several, one that fails does not come back from here: it tells the others and ends.
        """
        if self.count == 1:
            return work()
        try:
            code, reason = work(), "see its output"
        except LostHostError as error:
            code, reason = TRY_AGAIN, str(error)
            print(f"error: {reason}", file=sys.stderr)
        except Exception as error:
            self.wait_for_the_lost(error)
            traceback.print_exc()
            code, reason = 1, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if code == 1 or reason != "see its output":
            self._leave(code, reason)
        self._ending.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.distributed.shutdown()  # waits for all
        return code

    def wait_for_the_lost(self, error: Exception) -> None:
        """Give `_watch` the time to see whether a broken connection means a lost host.

        Called when something failed on this host; returns if it was not that.
        """
        if self.count > 1 and any(word in str(error).lower() for word in _BROKEN):
            time.sleep(self.patience * (1 + 3 / BEATS))

    def _watch(self) -> None:
        """Give signs of life, look for those of the others; ends the process where they stop."""
        beat = self.patience / BEATS
        seen: dict[str, tuple[str, float]] = {}  # what a host last said, and when it was new
        for number in range(sys.maxsize):
            try:
                mine = f"{_NOW}alive/{self.index}"
                self._client.key_value_set(mine, str(number), allow_overwrite=True)
                told = dict(self._client.key_value_dir_get(_NOW))
            except jax.errors.JaxRuntimeError:
                return  # the service is gone: all are done, or jax ends this process
            now = time.monotonic()
            for other in range(self.count):
                said = told.get(f"{_NOW}alive/{other}", "")
                if seen.get(other, ("",))[0] != said or other not in seen:
                    seen[other] = said, now
                left = told.get(f"{_NOW}left/{other}")
                silent = now - seen[other][1]
                if self._ending.is_set() or other == self.index:
                    continue
                if left is not None:
                    code, _, reason = left.partition(" ")
                    self._end(int(code), f"{self.names[other]} has ended: {reason}")
                if silent > self.patience:
                    lost = f"{self.names[other]} has been silent for {silent:.0f} s"
                    self._end(TRY_AGAIN, f"{lost}; {_AGAIN}")
            time.sleep(beat)

    def _leave(self, code: int, reason: str) -> NoReturn:
        """Tell the others why and end, without the meeting that jax holds at every normal end."""
        self._ending.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_NOW}left/{self.index}", f"{code} {reason}")
        if self.index == 0:  # its end is the end of the service: let the others read first
            time.sleep(3 * self.patience / BEATS)
        _exit(code)

    def _end(self, code: int, sentence: str) -> NoReturn:
        print(f"error: {sentence}", file=sys.stderr)
        if self.index == 0:
            time.sleep(3 * self.patience / BEATS)
        _exit(code)


def code_version() -> str:
    """The version of the package and the first letters of the SHA-256 of its sources."""
    package = pathlib.Path(__file__).parent
    text = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        text.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return f"{__version__} ({text.hexdigest()[:12]})"


_AGAIN = "start all hosts again, the run goes on from its last checkpoint"


def _exit(code: int) -> NoReturn:
    """End now: the normal end would wait for the processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _speak_after_abort(sentence: str) -> None:
    """What to say and how to end when jax's service aborts this process from a C++ thread.

    A handler of Python's own would run in the main thread, which may be waiting for ever. A
    callback for this exists in jaxlib 0.10 but cannot be written in Python (std::bad_cast).
    """

    def handler(number: int) -> None:
        os.write(2, f"error: {sentence}\n".encode())
        os._exit(TRY_AGAIN)

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    callback = kind(handler)
    _KEPT[:] = [callback]
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, kind), ctypes.c_void_p
    libc.signal(signal.SIGABRT, callback)


_KEPT: list[Any] = []  # the C library holds a pointer to it
