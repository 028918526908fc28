"""The command: what it teaches, what it refuses, exit codes, killing and going on."""

import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_curation import __main__ as cli
from data_curation import run as runs

ROOT = Path(__file__).parents[2]
TINY = str(Path(__file__).with_name("tiny.py"))
TIMES = ("run.json", "stats.jsonl", "provenance.json", "report.json", "report.html")


@pytest.fixture
def command(capfd):
    """Run the command in this process, on eight devices; (exit code, stdout, stderr)."""
    return partial(call, capfd)


def call(capfd, *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    return code, *capfd.readouterr()


def start(workdir: Path, *settings: str, devices: int = 8, before=(), **variables: str):
    """The command as a process of its own."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    words = [*before, sys.executable, "-m", "data_curation", "run", "--config", TINY]
    return subprocess.Popen(
        [*words, f"workdir={workdir}", *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment | variables,
        text=True,
    )


def digests(workdir: Path) -> dict[str, str]:
    """Of every file that holds no times."""
    return {
        str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(workdir.rglob("*"))
        if path.is_file() and path.name not in TIMES
    }


# ---- words --------------------------------------------------------------------------------------


def test_help_teaches(command):
    code, out, err = command("--help")
    assert code == 0 and not err
    assert all(f"\n  {verb} " in out for verb in cli.VERBS)
    assert "--config ring2d" in out and "--force-restart" in out
    for verb in cli.VERBS:
        code, out, _ = command(verb, "--help")
        assert code == 0 and "key=value" in out
    assert command()[0] == 2


def test_keys_are_listed(command):
    code, out, _ = command("run", "--config", "ring2d", "--help-keys")
    assert code == 0 and "\ncluster.levels[0].k=1000\n" in out


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["clutser"], "there is no verb 'clutser'; did you mean 'cluster'?"),
        (["run"], "--config is missing; give a file, or one of"),
        (["run", "--config", "ring3d"], "did you mean 'ring2d'?"),
        (["run", "--config", "ring2d", "sed=3"], "there is no key 'sed'; did you mean 'seed'?"),
        (["run", "--config", "ring2d", "workdir="], "workdir is ''"),
        (["run", "--confg", "ring2d"], "unrecognized arguments"),
        (["run", "--config", "ring2d", "embed.source=", "embeddings=/no.npy"], "/no.npy"),
        (["run", "--config", "ring2d", "embed.source=normal:9"], "normal:100000x256"),
        (["run", "--config", "lvd1689m"], "embeddings is ''; give embeddings=DIR"),
        (["run", "--config", "photos"], "embed.weights is ''; give the backbone"),
        (["retrieve", "--config", TINY], "nothing to retrieve; it has embed, index, dedup"),
        (["index", "/nowhere"], "/nowhere"),
    ],
)
def test_refused_in_a_sentence(arguments, sentence, command, tmp_path):
    if "--config" in arguments and "workdir=" not in arguments:
        arguments = [*arguments, f"--workdir={tmp_path / 'run'}"]
    code, out, err = command(*arguments)
    assert code == 2 and sentence in err and "Traceback" not in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_more_clusters_than_rows(command, tmp_path):
    np.save(tmp_path / "few.npy", np.ones((20, 8), np.float32))
    settings = ("embed.source=", f"embeddings={tmp_path / 'few.npy'}")
    code, _, err = command("run", "--config", TINY, f"workdir={tmp_path / 'run'}", *settings)
    assert code == 2 and "cluster.levels[0].k is 24, and there are 20 rows; nearest" in err


def test_dry_run(command, tmp_path):
    workdir = f"workdir={tmp_path / 'run'}"
    code, out, err = command("run", "--config", TINY, workdir, "--dry-run")
    assert code == 0 and "level 1" in out and "operations a second" in out, err
    budget = ("plan.rows=40e9", "plan.dim=1024")
    code, out, err = command("run", "--config", TINY, workdir, "--dry-run", *budget)
    assert code == 2 and "level 1" in out and "budget.host_memory" in err
    assert not (tmp_path / "run").exists()


def test_index_of_a_folder(command, tmp_path):
    np.save(tmp_path / "emb-00000.npy", np.eye(5, dtype=np.float16))
    code, out, _ = command("index", str(tmp_path))
    assert code == 0 and "5 rows of 5, 1 shards" in out
    assert command("index", str(tmp_path), "--verify")[0] == 0
    data = bytearray((tmp_path / "emb-00000.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "emb-00000.npy").write_bytes(data)
    code, _, err = command("index", str(tmp_path), "--verify")
    assert code == 2 and "emb-00000.npy" in err


# ---- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed, on eight devices."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(["run", "--config", TINY, f"workdir={workdir}"]) == 0
    return workdir


STAGES = ["embed", "index", "dedup", "cluster", "sample/small", "report"]


def test_a_run(whole):
    record = json.loads((whole / "run.json").read_text())
    assert [name for name, one in record["stages"].items() if one["state"] == "done"] == STAGES
    assert record["devices"] == 8
    table = pq.read_table(whole / "samples" / "small" / "samples.parquet")
    assert table["count"].to_numpy().sum() == 100
    assert {"id", "row", "count", "cluster_1", "cluster_2", "dist", "part"} <= {*table.column_names}
    made = json.loads((whole / "samples" / "small" / "provenance.json").read_text())
    assert [one["name"] for one in made["stages"]] == STAGES[:5]
    assert made["stages"][4]["rows_out"] == 100 and made["stages"][1]["rows_in"] == 600
    lines = [json.loads(line)["text"] for line in (whole / "stats.jsonl").open()]
    assert any(line.startswith("iteration 1: inertia") for line in lines)


def test_again_does_nothing(whole, command):
    before = digests(whole)
    code, out, err = command("run", "--config", TINY, f"workdir={whole}")
    assert code == 0 and out.count("done before") == len(STAGES), err
    assert digests(whole) == before


def test_a_changed_field_is_refused(whole, command):
    code, _, err = command("sample", "--config", TINY, f"workdir={whole}", "cluster.n_iters=6")
    assert code == 2 and "changed field cluster.n_iters" in err and "--force-restart" in err


def test_another_sample_of_the_same_tree(whole, command, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    before = digests(workdir)
    more = 'sample=(sample("small", 100), sample("all", 9999))'
    code, out, err = command("sample", "--config", TINY, f"workdir={workdir}", more)
    assert code == 0 and out.count("done before") == 1, err
    after = digests(workdir)
    assert {name for name in after if name not in before} == {
        f"samples/all/{name}" for name in ("samples.parquet", "rows.npy", "ids.txt")
    }
    assert before.items() <= after.items()


def test_export_without_some_rows(whole, command, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    gone = pq.read_table(workdir / "samples/small/samples.parquet")["id"].to_pylist()[:20]
    (tmp_path / "gone.txt").write_text("".join(f"{one}\n" for one in gone))
    words = ("--format", "txt", "--exclude", str(tmp_path / "gone.txt"))
    code, _, err = command("export", "--config", TINY, f"workdir={workdir}", *words)
    assert code == 0, err
    ids = (workdir / "export" / "small" / "ids.txt").read_text().split()
    assert len(ids) == 100 and not set(map(str, gone)) & set(ids)


def test_changed_embeddings_are_refused(command, tmp_path):
    data = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", data)
    words = ["--config", TINY, f"workdir={tmp_path / 'run'}", "embed.source="]
    words.append(f"embeddings={tmp_path / 'x.npy'}")
    assert command("index", *words)[0] == 0
    data[7, 2] += 1
    np.save(tmp_path / "x.npy", data)
    code, _, err = command("dedup", *words)
    assert code == 2 and "changed input embeddings" in err


def kill_when(process, there: Path, number: signal.Signals) -> tuple[str, str]:
    deadline = time.monotonic() + 300
    while not there.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    return process.communicate(timeout=300)


def test_killed_and_gone_on(whole, command, tmp_path):
    """The same files as undisturbed, bit for bit."""
    workdir = tmp_path / "run"
    process = start(workdir)
    kill_when(process, workdir / "level1" / "step1", signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    code, out, err = command("run", "--config", TINY, f"workdir={workdir}")
    assert code == 0 and "dedup: done before" in out and "cluster: done" not in out, err
    assert digests(workdir) == digests(whole)


def test_sigterm(whole, command, tmp_path, monkeypatch):
    """To this very process, when the first level is being clustered."""
    workdir = tmp_path / "run"
    say = runs.Work.say

    def signalled(self: runs.Work, stage: str, sentence: str, *more, **numbers) -> None:
        say(self, stage, sentence, *more, **numbers)
        if sentence.startswith("level 1 step 1"):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Work, "say", signalled)
        code, _, err = command("run", "--config", TINY, f"workdir={workdir}")
    assert code == cli.TRY_AGAIN and "run the same command to go on" in err
    record = runs.read_record(workdir)
    assert record["stages"]["cluster"]["state"] == "stopped"
    code, out, err = command("run", "--config", TINY, f"workdir={workdir}")
    assert code == 0 and "dedup: done before" in out, err
    assert digests(workdir) == digests(whole)


def test_a_full_disk(whole, command, tmp_path):
    """A limit on the size of files stands in for the disk."""
    workdir = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        code, _, err = command("run", "--config", TINY, f"workdir={workdir}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (sentence,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert code == 1 and "cannot be written (File too large)" in sentence
    assert not [path for path in workdir.rglob("*") if ".part" in path.name]
    assert command("run", "--config", TINY, f"workdir={workdir}")[0] == 0
    assert digests(workdir) == digests(whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random_moments(seed, whole, tmp_path):
    draw, workdir, kills = np.random.default_rng(seed), tmp_path / "run", 0
    while True:
        process = start(workdir)
        try:
            _, err = process.communicate(timeout=float(draw.uniform(2, 6)) if kills < 4 else 600)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, err
        break
    assert kills and digests(workdir) == digests(whole)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """On one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    process = start(workdir, devices=1)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return workdir


def same_tree(one: Path, other: Path) -> None:
    """The same rows in the same clusters; centroids up to the order of sums."""
    for name in ("dedup/kept.npy", "level1/parent.npy", "level2/parent.npy"):
        np.testing.assert_array_equal(*(np.load(folder / name) for folder in (one, other)))
    for name in ("level1/centroids.npy", "level2/centroids.npy"):
        made = (np.load(folder / name) for folder in (one, other))
        np.testing.assert_allclose(*made, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_one_device_and_eight(whole, alone):
    same_tree(whole, alone)
    rows = (np.load(folder / "samples" / "small" / "rows.npy") for folder in (whole, alone))
    np.testing.assert_array_equal(*rows)


@pytest.mark.slow
def test_two_processes(alone, tmp_path):
    workdir = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": where, "JAX_NUM_PROCESSES": "2"}
    team = [start(workdir, devices=1, **shared, JAX_PROCESS_ID=str(number)) for number in range(2)]
    ended = [process.communicate(timeout=600) for process in team]
    assert [process.returncode for process in team] == [0, 0], ended
    assert "cluster: rows in " in ended[0][0] and "cluster: rows in " not in ended[1][0]
    same_tree(workdir, alone)
