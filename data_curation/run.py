"""A curation from beginning to end: its stages in order, each of them resumable.

`run.json` in the work folder says for every stage that began: the config fields that decide what it
writes, digests of what it reads, and whether it is done. The same command again skips what is done
and goes on with what is not; a changed field or input is refused by name (spec 11). What the stages
do is in `stages.py`. Called by `__main__.py`.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_curation import config as configs
from data_curation.files import Stopped, read_json, write_json
from dinojax.hosts import Team, code_version
from dinojax.sharding import make_mesh

RECORD = "run.json"
ITERATION_SECONDS = 10  # between lines about iterations on the terminal
POLL_SECONDS = 0.5  # how often a waiting process looks whether the first one is through


@dataclasses.dataclass(frozen=True)
class Stage:
    """A piece of the work that is done once and skipped from then on."""

    name: str  # the verb, or verb/NAME of one sample or seed set
    keys: tuple[str, ...]  # config keys (or sections) that decide what it writes
    reads: tuple[str, ...]  # stages whose results it reads
    writes: tuple[str, ...]  # files and folders in the work folder
    work: Callable[["Work"], Mapping[str, Any]]  # returns what run.json keeps of it
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)  # digests from outside
    together: bool = False  # all processes work on it; else the first alone
    renews: bool = False  # quick, so it is done again, not refused, when what it reads changed

    @property
    def verb(self) -> str:
        return self.name.partition("/")[0]


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage is given."""

    folder: Path
    config: ConfigDict
    mesh: Mesh | None  # None: one device
    team: Team
    stop: Callable[[], bool]

    def path(self, *names: str) -> Path:
        """A place in the work folder."""
        return self.folder.joinpath(*names)

    def local_mesh(self) -> Mesh | None:
        """The devices of this process, for stages that the first does alone."""
        if self.mesh is None or self.team.count == 1:
            return self.mesh
        return make_mesh(data=-1, fsdp=1, devices=jax.local_devices())

    def say(self, stage: str, sentence: str, quiet: bool = False, **numbers: Any) -> None:
        """A line on the terminal, and the same with its numbers in stats.jsonl; first process."""
        if self.team.index:
            return
        if not quiet:
            print(f"{stage}: {sentence}", flush=True)
        row = {"time": round(time.time(), 3), "stage": stage, "text": sentence, **numbers}
        with self.path("stats.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def log(self, stage: str) -> Callable[[str], None]:
        """`say` for lines that may come fast: iterations are shown now and then only."""
        shown = [time.monotonic()]

        def line(sentence: str) -> None:
            now = time.monotonic()
            quiet = sentence.startswith("iteration") and now - shown[0] < ITERATION_SECONDS
            shown[0] = shown[0] if quiet else now
            self.say(stage, sentence, quiet)

        return line


@dataclasses.dataclass(frozen=True)
class Step:
    """A stage and what it would be recorded with."""

    stage: Stage
    fields: dict[str, Any]
    inputs: dict[str, str]
    digest: str


def check(
    folder: Path,
    config: ConfigDict,
    stages: Sequence[Stage],
    verb: str = "run",
    force: bool = False,
) -> None:
    """Raise ValueError, one sentence, if `run` would refuse; nothing is written."""
    steps = plan(config, stages)
    if verb not in ("run", *(step.stage.verb for step in steps)):
        have = ", ".join(dict.fromkeys(step.stage.verb for step in steps))
        raise ValueError(f"this config has nothing to {verb}; it has {have}")
    changed(steps, read_record(folder), force, folder)


def run(work: Work, stages: Sequence[Stage], verb: str = "run", force: bool = False) -> None:
    """Do what is left of `stages` (of one verb alone, if it is not "run").

    Raises:
      ValueError: a field or an input changed, an earlier stage is missing, or the work failed.
      Stopped: SIGTERM; all is saved.
    """
    steps = plan(work.config, stages)
    work.folder.mkdir(parents=True, exist_ok=True)
    record = read_record(work.folder)
    again = changed(steps, record, force, work.folder)
    work.team.exchange("curation/checked", "")  # all have read run.json before the first changes it
    for name in again:
        entry = record["stages"].pop(name)
        if work.team.index == 0:
            discard(work.folder, entry, record)
    save_config(work, record)
    done = {step.stage.name for step in steps if is_done(work.folder, step, record)}
    for step in steps:
        name = step.stage.name
        if verb not in ("run", step.stage.verb):
            continue
        if name in done:
            work.say(name, "done before")
            continue
        for earlier in step.stage.reads:
            if earlier not in done:
                raise ValueError(
                    f"{name} needs {earlier}, which is not done; do that first, or "
                    "`python -m data_curation run` with the same config does all"
                )
        _do(work, step, record)
        done.add(name)


def plan(config: ConfigDict, stages: Sequence[Stage]) -> list[Step]:
    """The stages with their fields, and digests of those, of all inputs and of what they read."""
    flat = configs.flatten(config)
    steps: dict[str, Step] = {}
    for stage in stages:
        fields = {
            _of_item(stage, key): value
            for key, value in json.loads(json.dumps(flat)).items()
            if any(key == one or key.startswith((f"{one}.", f"{one}[")) for one in stage.keys)
        }
        inputs = dict(stage.inputs) | {name: steps[name].digest for name in stage.reads}
        text = json.dumps([stage.name, fields, inputs], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        steps[stage.name] = Step(stage, fields, inputs, digest)
    return list(steps.values())


def _of_item(stage: Stage, key: str) -> str:
    """sample[2].target -> sample/web.target: an item may move in its tuple."""
    _, item, name = stage.name.partition("/")
    return f"{stage.name}.{key.partition('].')[2]}" if item and "]." in key else key


def changed(
    steps: Sequence[Step], record: Mapping[str, Any], force: bool, folder: Path
) -> list[str]:
    """Names of the stages to discard because something changed, which `force` allows.

    Raises:
      ValueError: one changed and it is not quick, nor forced; names the first field that differs.
    """
    again = []
    for step in steps:
        before = record["stages"].get(step.stage.name)
        if before is None or before["digest"] == step.digest or step.stage.renews:
            continue
        if not force:
            raise ValueError(_difference(step, before, folder))
        again.append(step.stage.name)
    return again


def _difference(step: Step, before: Mapping[str, Any], folder: Path) -> str:
    way = "take another workdir, or --force-restart to discard what was made"
    for key in sorted(step.fields.keys() | before["fields"].keys()):
        was, now = before["fields"].get(key), step.fields.get(key)
        if json.dumps(was) != json.dumps(now):
            return (
                f"changed field {key}: {folder} was begun with {_shown(was)}, now it is "
                f"{_shown(now)} (stage {step.stage.name}); {way}"
            )
    for key in sorted(step.inputs.keys() | before["inputs"].keys()):
        if step.inputs.get(key) != before["inputs"].get(key):
            return (
                f"changed input {key}: it is not what {folder} was begun with (stage "
                f"{step.stage.name}); {way}"
            )
    raise AssertionError("digests differ but nothing in them")


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def read_record(folder: Path) -> dict[str, Any]:
    """run.json; a fresh one where there is none."""
    if not (folder / RECORD).exists():
        return {"version": 1, "stages": {}}
    record = read_json(folder / RECORD)
    if record.get("version") != 1 or "stages" not in record:
        raise ValueError(f"{folder / RECORD} is no record of a curation; take another workdir")
    return record


def discard(folder: Path, entry: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Delete what a stage wrote; `record` has forgotten it."""
    # The record first: should this be cut short, the stage is done anew, over what is left.
    write_json(folder / RECORD, record)
    for path in (folder / one for one in entry["writes"]):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def is_done(folder: Path, step: Step, record: Mapping[str, Any]) -> bool:
    """Whether a stage is through, as it would be now, and all it wrote is still there."""
    entry = record["stages"].get(step.stage.name, {})
    return (
        entry.get("state") == "done"
        and entry["digest"] == step.digest
        and all((folder / one).exists() for one in entry["wrote"])
    )


def save_config(work: Work, record: dict[str, Any]) -> None:
    """What this command was: the config, the code, the processes and devices."""
    record["config"] = configs.plain(work.config)
    record["code"] = code_version()
    record["processes"], record["devices"] = work.team.count, jax.device_count()
    if work.team.index == 0:
        write_json(work.path(RECORD), record)


def _do(work: Work, step: Step, record: dict[str, Any]) -> None:
    """One stage, between two versions of run.json."""
    stage, began, first = step.stage, time.time(), work.team.index == 0
    # What is there already is of this very digest: a stage that was cut short goes on.
    before = record["stages"].get(stage.name, {})
    spent = before.get("seconds", 0.0) if before.get("state") != "done" else 0.0

    def write(state: str, **more: Any) -> None:
        record["stages"][stage.name] = {
            "state": state,
            "digest": step.digest,
            "fields": step.fields,
            "inputs": step.inputs,
            "writes": stage.writes,
            "seconds": round(spent + time.time() - began, 3),
            **more,
        }
        if first:
            write_json(work.path(RECORD), record)

    write("running")
    work.team.exchange(f"curation/{stage.name}/begins", "")
    facts: Mapping[str, Any] = {}
    if stage.together or first:
        try:
            facts = stage.work(work)
        except Stopped:
            write("stopped")
            raise
        wrote = [one for one in stage.writes if work.path(one).exists()]
        write("done", facts=dict(facts), wrote=wrote)
    else:
        wait_for_first(work, stage.name)
    work.team.exchange(f"curation/{stage.name}/ends", "")
    shown = ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in facts.items())
    seconds = time.time() - began
    work.say(stage.name, f"{shown or 'done'} ({seconds:.1f} s)", seconds=round(seconds, 3), **facts)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def wait_for_first(work: Work, name: str) -> None:
    """Wait until the first process is through with a stage.

    By looking at the file: meetings of processes run out of patience, a stage may take days. Should
    the first process die, `Team` ends this one.
    """
    while True:
        state = read_record(work.folder)["stages"].get(name, {}).get("state")
        if state == "done":
            return
        if state == "stopped":
            raise Stopped(f"{name} was stopped")
        time.sleep(POLL_SECONDS)


class Stop:
    """SIGTERM and Ctrl-C as a request that long work looks at; a second Ctrl-C interrupts it."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested

    def hear(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: this may come in the middle of one.
        os.write(2, b"stopping: finishing this block and saving\n")


@contextmanager
def stoppable() -> Iterator[Stop]:
    """A `Stop` that hears the signals meanwhile."""
    stop = Stop()
    before = {
        number: signal.signal(number, stop.hear) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
