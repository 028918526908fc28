"""`launch/plan.py` as a command: what it prints and writes, what it refuses, what it advises.

That its memory is that of a really run step is measured by `tests/benchmarks/plan_memory.py`.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "e2e" / "tiny.py"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[plan]'"
)


def plan(*flags):
    """(exit code, what was printed, what was said on stderr)."""
    command = [sys.executable, "launch/plan.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_command(tmp_path):
    """A phase of the tiny run on one device of this machine."""
    file = tmp_path / "plan.json"
    flags = ("--config", str(TINY), "--topology", "cpu", "--phase", "gram")
    code, out, err = plan(*flags, "--json", str(file))
    assert code == 0, err
    for words in ("pretrain: steps 0 to 6", "student", "at the roofline", "host cores"):
        assert words in out
    assert "all-" not in out  # one device: no collectives
    figures = json.loads(file.read_text())
    assert figures["fits"] and figures["advice"] is None
    (step,) = figures["steps"]
    assert (step["phase"], step["bound"]) == ("gram", "compute")
    assert step["how"] == "compiled for the CPU here"
    assert step["memory"]["total"] == pytest.approx(sum(step["memory"]["parts"].values()))
    assert figures["phases"][0]["step_seconds"] == step["step_seconds"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--config", str(TINY)], "--topology is missing; for example --topology v5p:4x8x8"),
        (["--config", str(TINY), "--topology", "cpu", "v5e"], "unexpected argument 'v5e'"),
        (["--config", str(TINY), "--topology", "cpu", "--phase", "grm"], "did you mean 'gram'"),
        (["--config", str(TINY), "--topology", "cpu", "--json", "no/where"], "there is no no"),
    ],
)
def test_impossible_commands(flags, sentence):
    code, _, err = plan(*flags)
    assert code == 2 and sentence in err and err.count("\n") == 1, err


def test_what_does_not_fit_ends_in_advice():
    code, out, err = plan(
        *("--config", "experiments/pretrain_vitl.py", "--config.model.remat=none"),
        *("--topology", "gpu:h100x8"),
    )
    assert code == 1, err
    assert "does not fit: pretrain 224+96 needs" in out
    assert "\nadd --config.model.remat=full (" in out and "estimated from shapes" in out


@needs_libtpu
@pytest.mark.slow
def test_too_small_a_tpu_ends_in_advice():
    code, out, err = plan(
        *("--config", "experiments/pretrain_vitl.py", "--topology", "v5e:4x4"),
        *("--config.model.variant=small", "--config.model.remat=none"),
    )
    assert code == 1, err
    assert "does not fit" in out and "\nadd --config.model.remat=" in out
    assert "compiled by libtpu" in out.splitlines()[-1]
