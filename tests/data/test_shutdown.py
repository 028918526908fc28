"""However a process ends: no traceback but the user's own, no worker and no memory left behind."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL

# Without `if __name__ == "__main__"`: a worker must not run it again.
START = """
import sys, time
from dinojax.data.masking import Masks
from dinojax.data.multicrop import Crops
from dinojax.data.pipeline import Batches
from dinojax.data.sources import open_source

source, masks = open_source("scenes:200?size=64"), Masks(patch=8)
batches = Batches(source, (Crops(48, 24, locals=2),), (1.0,), masks, 16, 4, seed=1)
print("started", flush=True)
stream = batches.stream(workers=2, prefetch=8)
"""
LOOK = "for _ in range(3): next(stream)\nprint('seen', flush=True)\n"
GO_ON = "while True: next(stream)\n"
HANDLED = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")


def run(arguments, number=None, after="seen", group=False, text=None):
    """(exit code, stderr) of a Python that perhaps gets a signal after a line on stdout."""
    mark = f"DINOJAX_TEST_MARK={uuid.uuid4()}"
    shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | dict([mark.split("=")])
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    if number is not None:
        while process.stdout.readline().strip() != after:
            assert process.poll() is None, process.stderr.read()
        time.sleep(0.3)
        (os.killpg if group else os.kill)(process.pid, number)
    _, errors = process.communicate(text, timeout=120)
    deadline = time.monotonic() + 30
    while left := (alive(mark) or new_segments(shared)):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)
    for word in ("leaked", "Exception ignored", "resource_tracker", "Fatal"):
        assert word not in errors, errors
    return process.returncode, errors


def alive(mark):
    """Processes that inherited the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def new_segments(before):
    """Shared memory that was not there before."""
    if not os.path.isdir("/dev/shm"):
        return []
    return sorted(set(os.listdir("/dev/shm")) - before)


def test_never_closed():
    assert run(["-c", START + LOOK]) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("after", ["started", "seen"])
@pytest.mark.parametrize("number", [INT, TERM, KILL])
def test_signals(number, after, group, tmp_path):
    """To the process or, as a terminal does, to its group; while workers start, or at work."""
    script = tmp_path / "script.py"
    script.write_text(START + LOOK + GO_ON)
    code, errors = run([str(script)], number, after, group)
    assert code == -number
    if number == INT:
        assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
    else:
        assert errors == ""


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True])
def test_sigterm_with_a_handler(group):
    """As `launch/run.py` has one: the workers go on meanwhile, whoever else got the signal."""
    assert run(["-c", START + HANDLED + LOOK + GO_ON], TERM, group=group) == (75, "")


@pytest.mark.slow
@pytest.mark.parametrize("block", ["{}", "with stream:\n    {}"])
def test_the_consumer_raises(block):
    code, errors = run(["-c", START + LOOK + block.format("raise ValueError('mine')")])
    assert code == 1
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("ValueError: mine")


@pytest.mark.slow
def test_a_session():
    """Cell after cell, as in a notebook; a source of its own, an interrupted cell, then the end."""
    own = """
class Grey:
    classes = None
    def __len__(self): return 99
    def encoded(self, i): raise NotImplementedError
    def image(self, i): return np.full((60, 60, 3), i, np.uint8)
    def label(self, i): return None
    def labels(self): return None
    def name(self, i): return str(i)

"""
    cells = "import numpy as np\n" + own + START + "\n" + LOOK.splitlines()[0] + "\n\n"
    cells += "other = Batches(Grey(), batches.crops, (1.0,), masks, 16, 4, seed=1)\n"
    cells += "mine = other.stream(workers=1)\n"
    cells += "first = next(mine)['global_crops']\n"
    cells += "assert (first == other.at(0)['global_crops']).all()\n"
    cells += "1 / 0\nprint('the end')\n"
    code, errors = run(["-i", "-q"], text=cells)
    assert code == 0
    assert errors.count("Traceback") == 1 and "ZeroDivisionError" in errors, errors


@pytest.mark.slow
def test_a_pytest_process(tmp_path):
    lines = [f"    {line}" for line in (START + LOOK).splitlines()]
    (tmp_path / "test_it.py").write_text("\n".join(["def test_it():", *lines, ""]))
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    code, errors = run(["-m", "pytest", *options, str(tmp_path / "test_it.py")])
    assert (code, errors) == (0, "")
