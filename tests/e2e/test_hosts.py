"""Several hosts: processes on this machine that find each other, agree, stop and die."""

import json
import re
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest

from dinojax.training.checkpoint import Checkpoints

KILL, TERM = signal.SIGKILL, signal.SIGTERM
AGAIN = 75
# Its gradient at two crops nearly alike is mostly rounding (`close` of test_training).
NO_KOLEO = "--config.phases[0].losses.koleo=0."
EACH_STEP = ("--config.checkpoint.every=1", "--config.checkpoint.keep=9")


@pytest.fixture
def pretrain(tools):
    return {"config": f"{tools.TINY}:pretrain"}


def saved(workdir, step):
    return lambda: (workdir / "checkpoints" / str(step)).is_dir()


def close(one, other, tolerance=1e-5):
    """All values of all rows, relative to the larger of the value and 1."""
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for a, b in zip(one, other, strict=True):
        for name in a:
            if isinstance(a[name], float):
                assert abs(a[name] - b[name]) <= tolerance * max(abs(a[name]), 1.0), (name, a, b)


def same_state(one, other, step, lr=1e-3):
    """Weights of two runs after a step: the reference's bounds, and 1e-6 on average."""
    states = [
        Checkpoints(run / "checkpoints", read_only=True).restore_item(step, "student")
        for run in (one, other)
    ]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, atol=0.2 * lr, rtol=1e-4)
        assert np.abs(a - b).mean() < 1e-6


def same_gradients(one, other):
    """Adam's first moment after the first step is a tenth of the (clipped) gradient."""
    moments = [
        Checkpoints(run / "checkpoints", read_only=True).restore_item(1, "optimizer")["mu"]
        for run in (one, other)
    ]
    for a, b in zip(*map(jax.tree.leaves, moments), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(a), 1e-12)


@pytest.fixture(scope="module")
def alone(tools, tmp_path_factory):
    """Pretraining without KoLeo on one device, never interrupted."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    process = tools.start(workdir, NO_KOLEO, *EACH_STEP, config=f"{tools.TINY}:pretrain")
    ended = tools.finish(process, workdir)
    assert ended.code == 0, ended.err
    return workdir


@pytest.fixture(scope="module")
def stopped(tools, tmp_path_factory):
    """Two hosts of four devices; SIGTERM to the second alone, after the second step."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    how = {"devices": 4, "config": f"{tools.TINY}:pretrain"}
    team = tools.start_team(workdir, NO_KOLEO, *EACH_STEP, **how)
    tools.interrupt(team[1], TERM, saved(workdir, 2))
    return workdir, tools.finish_team(team, workdir)


def test_two_hosts_equal_one_device_and_stop_together(alone, stopped, tools):
    workdir, (first, second) = stopped
    assert first.code == second.code == AGAIN, first.err + second.err
    assert "2 hosts x 4 devices (cpu, JAX_COORDINATOR_ADDRESS=127.0.0.1" in first.out
    assert "mesh data=1 fsdp=8 tensor=1" in first.out
    assert "SIGTERM: saving, then stopping" in second.out
    last = tools.rows(workdir)[-1]["step"]
    assert 2 <= last <= 6 and saved(workdir, last)()
    close(tools.rows(alone)[:last], tools.rows(workdir))  # one row a step: one host writes
    same_gradients(alone, workdir)
    same_state(alone, workdir, 2)


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_began(alone, stopped, tools, launch, tmp_path, pretrain):
    workdir = tmp_path / "run"
    shutil.copytree(stopped[0], workdir)
    last = tools.rows(workdir)[-1]["step"]
    ended = launch(tools.command(workdir, NO_KOLEO, *EACH_STEP, **pretrain))
    assert ended.code == 0, ended.err
    assert f"resumed at step {last}" in ended.out and "1 host x 8 devices" in ended.out
    close(tools.rows(alone), tools.rows(workdir))
    same_state(alone, workdir, 6)


@pytest.mark.slow
def test_the_first_host_dies(tools, tmp_path, pretrain):
    """The other ends with a sentence, at once."""
    workdir = tmp_path / "run"
    team = tools.start_team(workdir, NO_KOLEO, devices=4, **pretrain)
    tools.interrupt(team[0], KILL, saved(workdir, 2))
    first, second = tools.finish_team(team, workdir)
    assert first.code == -KILL and second.code == AGAIN
    assert "host 0 (" in second.sentence() and "start all hosts again" in second.sentence()


def preflight(tools, workdir, pretrain, *arguments, **how):
    team = tools.start_team(workdir, "--preflight", *arguments, devices=2, **pretrain, **how)
    return tools.finish_team(team, workdir)


def test_preflight(tools, tmp_path, pretrain):
    first, second = preflight(tools, tmp_path / "run", pretrain)
    assert first.code == second.code == 0, first.err + second.err
    lines = [line for line in first.out.splitlines() if line.startswith("ok  ")]
    assert [line[4:].split(":")[0] for line in lines] == [
        *("config and code", "all-reduce", "data", "workdir", "clocks")
    ]
    assert "the ranks of 4 devices add up to 6" in lines[1]
    assert "a batch shared out in 2 parts" in lines[2]
    assert not list((tmp_path / "run").iterdir())


def test_preflight_finds_another_config(tools, tmp_path, pretrain):
    each = ((), ("--config.optim.clip=2.",))
    ended = preflight(tools, tmp_path / "run", pretrain, each=each)
    for one in ended:
        assert one.code == 2 and "host 1 (" in one.sentence()
        assert "has optim.clip 2.0 and host 0 (" in one.sentence()


@pytest.mark.slow
def test_preflight_finds_a_config_that_cannot_work_on_one_host(tools, tmp_path, pretrain):
    each = ((), ("--config.batch_size=15",))
    first, second = preflight(tools, tmp_path / "run", pretrain, each=each)
    assert first.code == second.code == 2
    assert "host 1 (" in first.sentence() and "nearest: batch_size=16" in first.sentence()


@pytest.mark.slow
def test_preflight_finds_a_wrong_clock(tools, tmp_path, pretrain):
    """The second host's is a minute late: a module that Python loads first sets it back."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nright = time.time\ntime.time = lambda: right() - 60\n"
    )
    late = ("env", f"PYTHONPATH={tmp_path}:{tools.ROOT}")
    ended = preflight(tools, tmp_path / "run", pretrain, befores=((), late))
    for one in ended:
        assert one.code == 1
        assert re.search(r"host 1 \(.*\) is (59|6\d) s behind host 0", one.sentence())
    assert "no  clocks: host 1 (" in ended[0].out and ended[0].out.count("ok  ") == 4


@pytest.mark.slow
def test_preflight_finds_a_directory_of_another(tools, tmp_path, pretrain):
    each = ((), ("--workdir", str(tmp_path / "other")))
    ended = preflight(tools, tmp_path / "run", pretrain, each=each)
    for one in ended:
        assert one.code == 1 and "not the same directory as on host 0" in one.sentence()


READ_ONLY = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all")


@pytest.mark.slow
def test_preflight_finds_a_workdir_that_cannot_be_written(tools, tmp_path, pretrain):
    """Both the place for a new run, and one that a run was begun in."""
    if subprocess.run([*READ_ONLY, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs setpriv to take away the right to write anywhere")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o555)
    each = ((), ("--workdir", str(tmp_path / "closed" / "run")))
    ended = preflight(tools, tmp_path / "run", pretrain, each=each, befores=(READ_ONLY, READ_ONLY))
    for one in ended:
        assert one.code == 2 and "cannot write into --workdir" in one.sentence()
        assert "host 1 (" in one.sentence() and "ermission denied" in one.sentence()


@pytest.mark.slow
def test_a_host_that_never_comes(tools, tmp_path, pretrain):
    workdir = tmp_path / "run"
    team = tools.start_team(workdir, "--preflight", patience=10, devices=2, **pretrain)
    team[1].kill()
    first, _ = tools.finish_team(team, workdir)
    assert first.code == AGAIN
    assert "not all processes met at 127.0.0.1" in first.sentence()


@pytest.mark.slow
def test_the_second_host_dies_and_a_restart_goes_on(alone, tools, tmp_path, pretrain):
    """Bit for bit what a run without the death gives, on the same hosts."""
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    ended = tools.finish_team(tools.start_team(whole, NO_KOLEO, devices=4, **pretrain), whole)
    assert [one.code for one in ended] == [0, 0], ended[0].err + ended[1].err
    close(tools.rows(alone), tools.rows(whole))

    team = tools.start_team(workdir, NO_KOLEO, patience=15, devices=4, **pretrain)
    tools.interrupt(team[1], KILL, saved(workdir, 2))
    first, second = tools.finish_team(team, workdir)
    assert first.code == AGAIN and second.code == -KILL
    assert "host 1 (" in first.sentence() and "has been silent for" in first.sentence()

    ended = tools.finish_team(tools.start_team(workdir, NO_KOLEO, devices=4, **pretrain), workdir)
    assert [one.code for one in ended] == [0, 0], ended[0].err + ended[1].err
    assert "resumed at step" in ended[0].out
    tools.same_rows(whole, workdir)


@pytest.mark.slow
def test_a_failure_on_one_host_ends_all(tools, tmp_path, pretrain):
    """The second host says what it was, the first whose it was; none waits for the other."""
    workdir = tmp_path / "run"
    (workdir / "unreadable.1.txt").mkdir(parents=True)
    team = tools.start_team(workdir, NO_KOLEO, devices=4, patience=30, **pretrain)
    first, second = tools.finish_team(team, workdir)
    assert first.code == second.code == 1, first.err + second.err
    assert "unreadable.1.txt" in second.sentence()
    assert "host 1 (" in first.sentence() and "has ended" in first.sentence()


@pytest.mark.slow
def test_a_host_that_cannot_write_its_part_of_a_checkpoint(tools, tmp_path, pretrain):
    """Known at the next step; orbax would have both wait for one another for 20 minutes."""
    workdir = tmp_path / "run"
    limited = ("sh", "-c", 'ulimit -f 40; exec "$@"', "sh")  # 20 kB of a file, as on a full disk
    how = {"devices": 4, "befores": ((), limited), **pretrain}
    team = tools.start_team(workdir, NO_KOLEO, *EACH_STEP, **how)
    first, second = tools.finish_team(team, workdir)
    assert first.code == second.code == 1, first.err + second.err
    assert "the checkpoint of step 1 could not be written" in second.sentence()
    assert "file too large" in second.sentence()
    assert "host 1 (" in first.sentence() and "has ended" in first.sentence()
    assert len(tools.rows(workdir)) <= 2


@pytest.mark.slow
def test_eight_four_one(alone, tools, tmp_path, pretrain):
    """A run moves from 8 devices to 4, then to 1; each goes on from the other's checkpoint."""
    workdir = tmp_path / "run"
    for devices, step in ((8, 2), (4, 4)):
        process = tools.start(workdir, NO_KOLEO, devices=devices, **pretrain)
        tools.interrupt(process, KILL, saved(workdir, step))
        assert tools.finish(process, workdir).code == -KILL
    ended = tools.finish(tools.start(workdir, NO_KOLEO, **pretrain), workdir)
    assert ended.code == 0, ended.err
    assert all(f"1 host x {n} devices" in ended.out for n in (8, 4, 1))
    assert json.dumps([row["step"] for row in tools.rows(workdir)]) == "[1, 2, 3, 4, 5, 6]"
    close(tools.rows(alone), tools.rows(workdir))
    same_state(alone, workdir, 6)
