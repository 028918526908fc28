"""Which stages are done, done again or refused: with stages that only write what they are told."""

import json
from pathlib import Path

import pytest

from data_curation import settings as given
from data_curation.files import Stopped, write_text
from data_curation.run import Stage, Work, check, read_record, run
from dinojax.hosts import Team


def config(tmp_path, *settings):
    return given.change(given.load("ring2d"), [f"workdir={tmp_path / 'run'}", *settings])


def stage(name, keys, reads=(), calls=None, text="", **how):
    """Writes NAME.txt; counts its calls."""
    file = f"{name.replace('/', '_')}.txt"

    def work(of: Work) -> dict:
        if calls is not None:
            calls.append(name)
        write_text(of.path(file), text)
        return {"rows": 1000}

    return Stage(name, keys, reads, (file,), work, **how)


def stages(calls, data="a"):
    return [
        stage("index", ("index",), calls=calls, inputs={"embeddings": data}),
        stage("dedup", ("dedup", "seed"), ("index",), calls),
        stage("sample/x", ("sample[0]",), ("dedup",), calls),
        stage("report", ("report",), ("sample/x",), calls, renews=True),
    ]


def do(cfg, todo, verb="run", force=False, stop=lambda: False):
    run(Work(Path(cfg.workdir), cfg, None, Team(""), stop), todo, verb, force)


def test_everything_once(tmp_path, capsys):
    calls, cfg = [], config(tmp_path)
    do(cfg, stages(calls))
    assert calls == ["index", "dedup", "sample/x", "report"]
    assert "dedup: rows 1,000 (" in capsys.readouterr().out
    do(cfg, stages(calls))
    assert len(calls) == 4 and "dedup: done before" in capsys.readouterr().out
    record = read_record(Path(cfg.workdir))
    assert record["config"]["dedup"]["threshold"] == 0.6 and record["processes"] == 1
    assert record["stages"]["dedup"]["facts"] == {"rows": 1000}
    rows = [json.loads(line) for line in (Path(cfg.workdir) / "stats.jsonl").open()]
    assert rows[1]["stage"] == "dedup" and rows[1]["rows"] == 1000


def test_a_changed_field_is_named(tmp_path):
    do(config(tmp_path), stages([]))
    other = config(tmp_path, "dedup.threshold=0.7")
    calls = []
    before = {p: p.read_bytes() for p in Path(other.workdir).iterdir()}
    with pytest.raises(
        ValueError, match=r"changed field dedup\.threshold: .* 0\.6, now it is 0\.7"
    ):
        do(other, stages(calls))
    with pytest.raises(ValueError, match="--force-restart"):
        check(Path(other.workdir), other, stages(calls))
    assert not calls and before == {p: p.read_bytes() for p in Path(other.workdir).iterdir()}


def test_force_discards_the_stage_and_what_followed(tmp_path):
    do(config(tmp_path), stages([]))
    calls, other = [], config(tmp_path, "dedup.threshold=0.7")
    (Path(other.workdir) / "sample_x.txt").write_text("old")
    do(other, stages(calls), force=True)
    assert calls == ["dedup", "sample/x", "report"]
    assert (Path(other.workdir) / "sample_x.txt").read_text() == ""


def test_a_changed_input_is_named(tmp_path):
    do(config(tmp_path), stages([]))
    with pytest.raises(ValueError, match="changed input embeddings"):
        do(config(tmp_path), stages([], data="b"))


def test_a_quick_stage_is_renewed(tmp_path):
    do(config(tmp_path), stages([]))
    calls = []
    do(config(tmp_path, "report.by=source"), stages(calls))
    assert calls == ["report"]


def test_fields_that_a_stage_does_not_read_may_change(tmp_path):
    do(config(tmp_path), stages([]))
    calls = []
    do(config(tmp_path, "mix.seed=3", "budget.hours=2"), stages(calls))
    assert not calls


def test_an_item_may_move_in_its_tuple(tmp_path):
    do(config(tmp_path, "sample=(sample('x', 10), sample('y', 5))"), stages([]))
    moved = config(tmp_path, "sample=(sample('y', 5), sample('x', 10))")
    todo = stages([])
    todo[2] = stage("sample/x", ("sample[1]",), ("dedup",))
    do(moved, todo)
    with pytest.raises(ValueError, match=r"changed field sample/x\.target: .* 10, now it is 11"):
        do(config(tmp_path, "sample=(sample('x', 11),)"), stages([]))


def test_a_stage_whose_files_are_gone_is_done_again(tmp_path):
    cfg = config(tmp_path)
    do(cfg, stages([]))
    (Path(cfg.workdir) / "dedup.txt").unlink()
    calls = []
    do(cfg, stages(calls))
    assert calls == ["dedup"]


def test_one_verb_needs_the_stages_before(tmp_path):
    calls, cfg = [], config(tmp_path)
    do(cfg, stages(calls), "index")
    assert calls == ["index"]
    with pytest.raises(ValueError, match="sample/x needs dedup, which is not done"):
        do(cfg, stages(calls), "sample")
    with pytest.raises(
        ValueError, match="nothing to retrieve; it has index, dedup, sample, report"
    ):
        check(Path(cfg.workdir), cfg, stages(calls), "retrieve")
    do(cfg, stages(calls), "dedup")
    assert calls == ["index", "dedup"]


def test_stopped_and_gone_on(tmp_path):
    cfg, todo = config(tmp_path), stages([])

    def stopping(work: Work) -> dict:
        raise Stopped("3 of 5 shards")

    todo[1] = Stage("dedup", ("dedup",), ("index",), ("dedup.txt",), stopping)
    with pytest.raises(Stopped):
        do(cfg, todo)
    assert read_record(Path(cfg.workdir))["stages"]["dedup"]["state"] == "stopped"
    todo[1] = stage("dedup", ("dedup",), ("index",))
    do(cfg, todo)
    assert read_record(Path(cfg.workdir))["stages"]["report"]["state"] == "done"


def test_what_fails_is_begun_but_not_done(tmp_path):
    cfg, todo = config(tmp_path), stages([])

    def failing(work: Work) -> dict:
        raise ValueError("dedup.npy cannot be written (No space left on device)")

    todo[1] = Stage("dedup", ("dedup",), ("index",), ("dedup.txt",), failing)
    with pytest.raises(ValueError, match="No space left"):
        do(cfg, todo)
    record = read_record(Path(cfg.workdir))
    assert record["stages"]["dedup"]["state"] == "running" and "report" not in record["stages"]


def test_a_folder_of_something_else(tmp_path):
    cfg = config(tmp_path)
    Path(cfg.workdir).mkdir()
    (Path(cfg.workdir) / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="no record of a curation"):
        check(Path(cfg.workdir), cfg, stages([]))
