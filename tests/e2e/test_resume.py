"""A run that is killed, stopped or damaged goes on as if nothing had happened, bit for bit."""

import random
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

KILL, TERM = signal.SIGKILL, signal.SIGTERM


def saving(workdir, step):
    """Whether the checkpoint of a step is there, or being written."""
    return lambda: any((workdir / "checkpoints").glob(f"{step}*"))


def same_weights(one, other):
    a, b = (load_file(run / "weights" / "teacher.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_interrupted_in_every_phase(whole, tools, tmp_path):
    """SIGTERM in pretraining, kill -9 in the Gram phase and in the high-resolution phase."""
    workdir = tmp_path / "run"

    process = tools.start(workdir)
    tools.interrupt(process, TERM, saving(workdir, 2))
    ended = tools.finish(process, workdir)
    assert ended.code == 75, ended.err
    assert "SIGTERM: saving, then stopping" in ended.out
    assert "after a save; run the same command to go on" in ended.out
    stopped = tools.rows(workdir)[-1]["step"]
    assert 2 <= stopped <= 6  # in the phase in which the signal came, or at its end
    assert (workdir / "checkpoints" / str(stopped)).is_dir()

    for step in (8, 14):
        process = tools.start(workdir)
        tools.interrupt(process, KILL, saving(workdir, step))
        assert tools.finish(process, workdir).code == -KILL

    ended = tools.finish(tools.start(workdir), workdir)
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert f"resumed at step {stopped}" in ended.out
    tools.same_rows(whole, workdir)
    same_weights(whole, workdir)


def test_truncated_checkpoint(whole, tools, tmp_path):
    """One sentence, and the run goes on from the checkpoint before it."""
    workdir = tools.rewound(whole, tmp_path / "run", step=16)
    files = (path for path in (workdir / "checkpoints" / "16").rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    ended = tools.finish(tools.start(workdir), workdir)
    assert ended.code == 0, ended.err
    told = [line for line in (ended.out + ended.err).splitlines() if "damaged" in line]
    assert len(told) == 1 and "step 16" in told[0] and "step 14" in told[0]
    assert "resumed at step 14" in ended.out
    assert (workdir / "checkpoints" / "broken-16").is_dir()
    tools.same_rows(whole, workdir)
    same_weights(whole, workdir)


def test_a_finished_run_is_left_alone(whole, tools, tmp_path, launch):
    """The same command once more does nothing, and quickly (here even on other devices)."""
    workdir = tools.rewound(whole, tmp_path / "run", step=18)
    before = (workdir / "metrics.jsonl").read_bytes()
    ended = launch(tools.command(workdir))
    assert ended.code == 0, ended.err
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(whole, tools, tmp_path, seed):
    """Kill -9 some random time after the start, again and again, until a run gets through."""
    workdir, dice = tmp_path / "run", random.Random(seed)
    kills = 0
    for _ in range(4):
        process = tools.start(workdir)
        moment = saving(workdir, dice.choice([2, 4, 6, 8, 10, 12, 14, 16]))
        try:
            tools.interrupt(process, KILL, moment, delay=dice.uniform(0, 3))
        except AssertionError:
            break  # done before the moment came
        kills += tools.finish(process, workdir).code == -KILL
    ended = tools.finish(tools.start(workdir), workdir)
    assert ended.code == 0, ended.err
    assert kills
    tools.same_rows(whole, workdir)
    same_weights(whole, workdir)
