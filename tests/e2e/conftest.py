"""The real program: as processes with one device, and inside this process with eight.

What costs time is compiling, so processes share a cache of compiled programs and compile with few
optimisations; that changes roundings, not what is tested.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from absl import flags

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launch" / "run.py"
TINY = ROOT / "tests" / "e2e" / "tiny.py"
LIMIT = 1200  # seconds of a process, on a slow and busy machine


class Ended(NamedTuple):
    """How a run ended."""

    code: int
    out: str
    err: str

    def sentence(self) -> str:
        """The only line on stderr that is ours; fails on a traceback."""
        assert "Traceback" not in self.out + self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


def command(workdir: Path, *extra: str, config: str = str(TINY)) -> list[str]:
    """Arguments of the launcher."""
    return ["--config", config, "--workdir", str(workdir), *extra]


def start(
    workdir: Path,
    *extra: str,
    before: Sequence[str] = (),
    config: str = str(TINY),
    devices: int = 1,
    variables: Mapping[str, str] | None = None,
    name: str = "",
) -> subprocess.Popen:
    """Start the program; output goes to files beside the work directory.

    `before` are words in front of the command, `variables` of its environment; `name` tells apart
    the output of several.
    """
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    environment |= variables or {}
    outputs = (workdir.with_suffix(f"{name}{suffix}") for suffix in (".out", ".err"))
    with next(outputs).open("a") as out, next(outputs).open("w") as err:
        return subprocess.Popen(
            [*before, sys.executable, str(LAUNCHER), *command(workdir, *extra, config=config)],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=err,
        )


def finish(process: subprocess.Popen, workdir: Path, name: str = "") -> Ended:
    """Wait for the end."""
    code = process.wait(LIMIT)
    texts = (workdir.with_suffix(f"{name}{suffix}").read_text() for suffix in (".out", ".err"))
    return Ended(code, *texts)


def start_team(
    workdir: Path,
    *extra: str,
    patience: int = 60,
    each: Sequence[Sequence[str]] = ((), ()),
    befores: Sequence[Sequence[str]] | None = None,
    **how: Any,
) -> list[subprocess.Popen]:
    """Start a process for each of `each`, its own arguments, as one run on this machine.

    `befores` are the words in front of each one's command.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(len(each)),
        "DINOJAX_PATIENCE": str(patience),
    }
    return [
        start(
            workdir,
            *extra,
            *own,
            variables=variables | {"JAX_PROCESS_ID": str(number)},
            name=f".{number}",
            before=befores[number] if befores else (),
            **how,
        )
        for number, own in enumerate(each)
    ]


def finish_team(processes: Sequence[subprocess.Popen], workdir: Path) -> list[Ended]:
    """Wait for the end of all."""
    try:
        return [finish(process, workdir, f".{k}") for k, process in enumerate(processes)]
    finally:
        for process in processes:
            process.kill()


def interrupt(
    process: subprocess.Popen, number: signal.Signals, when: Callable[[], bool], delay: float = 0.0
) -> None:
    """Send a signal once `when()` holds."""
    deadline = time.monotonic() + LIMIT
    while not when():
        assert process.poll() is None, f"the run ended before the signal ({process.returncode})"
        assert time.monotonic() < deadline, "the run did not come that far"
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(number)


def rows(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def same_rows(one: Path, other: Path) -> None:
    """Every value of every row, bit for bit (NaN equals NaN)."""
    a, b = rows(one), rows(other)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for x, y in zip(a, b, strict=True):
        assert json.dumps(x) == json.dumps(y), {k: (x[k], y.get(k)) for k in x if x[k] != y.get(k)}


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """A run in this process leaves the mesh, the signals and the flags as they were."""
    hook = sys.unraisablehook
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        try:
            yield
        finally:
            sys.unraisablehook = hook
            for number, handler in handlers.items():
                signal.signal(number, handler)


def launcher() -> Any:
    """launch/run.py as a fresh module, without the flags of an earlier one."""
    for name in list(flags.FLAGS):
        if name in ("workdir", "config", "preflight") or name.startswith("config."):
            delattr(flags.FLAGS, name)
    spec = importlib.util.spec_from_file_location("dinojax_launch_run", LAUNCHER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def launch(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Sequence[str]], Ended]:
    """Run the launcher in this process, on eight devices."""

    def call(arguments: Sequence[str]) -> Ended:
        capfd.readouterr()
        module = launcher()
        argv = [str(LAUNCHER), *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # the config flag looks there for its values
        with restored():
            try:
                code = module.main(module.parse(argv))
            except SystemExit as stop:
                code = stop.code
        return Ended(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run through all three phases, never interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    ended = finish(start(workdir), workdir)
    assert ended.code == 0, ended.err
    return workdir


def rewound(run: Path, target: Path, step: int) -> Path:
    """A copy of a run as it was when the checkpoint of `step` was its newest."""
    shutil.copytree(run, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return target


@pytest.fixture(scope="session")
def tools() -> Any:
    """The functions above (test modules cannot import this file)."""
    return sys.modules[__name__]
