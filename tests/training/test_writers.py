"""Rows that read back exactly, a resume that leaves no row twice, a line that says it all."""

import json
import sys
import types

import numpy as np
import pytest

from dinojax.training import writers
from dinojax.training.profiling import Speed

SPEED = Speed(
    images_per_second=812.4,
    mfu=0.412,
    executed_mfu=0.3,
    data_wait=0.021,
    step_seconds=0.1,
    eta_seconds=11525.2,
    goodput=0.9,
    peak_bytes=None,
)


def rows(directory, name="metrics"):
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def test_rows_read_back_bit_for_bit(tmp_path):
    values = {
        "loss": float(np.float32(0.1)),
        "tiny": np.float32(1e-42),
        "third": 1 / 3,
        "array": np.asarray(2.5, np.float32),
        "skipped": 3,
    }
    log = writers.MetricsLog(tmp_path)
    log.write(10, "pretrain", values)
    log.write(11, "pretrain", {"loss": float("nan"), "ibot": float("inf")})
    log.write_eval(11, "pretrain", {"knn_top1": 0.5})
    (first, second, evaluated) = rows(tmp_path)  # before close: a killed process loses nothing
    assert first == {"step": 10, "phase": "pretrain", **{k: float(v) for k, v in values.items()}}
    assert np.isnan(second["loss"]) and second["ibot"] == float("inf")
    assert evaluated == {"step": 11, "phase": "pretrain", "knn_top1": 0.5}
    log.close()


def test_speed_has_a_file_of_its_own(tmp_path):
    log = writers.MetricsLog(tmp_path)
    log.write_speed(10, "gram", SPEED, {"rows_a": 0.25, "batch": "mixed"})
    log.close()
    (row,) = rows(tmp_path, "speed")
    assert row["rows_a"] == 0.25 and row["batch"] == "mixed"
    assert row["images_per_second"] == 812.4 and row["phase"] == "gram" and row["step"] == 10
    assert "peak_bytes" not in row
    assert rows(tmp_path) == []


def test_resuming_removes_the_rows_that_come_again(tmp_path):
    log = writers.MetricsLog(tmp_path)
    for step in range(1, 8):
        log.write(step, "pretrain", {"loss": step / 7})
        log.write_speed(step, "pretrain", SPEED)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 8, "phase": "pre')  # killed while writing
    whole = (tmp_path / "metrics.jsonl").read_text().splitlines()
    log = writers.MetricsLog(tmp_path, resume_step=4)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == whole[:4]
    assert [row["step"] for row in rows(tmp_path, "speed")] == [1, 2, 3, 4]
    for step in range(5, 8):
        log.write(step, "pretrain", {"loss": step / 7})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == whole[:7]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_without_a_checkpoint_starts_over(tmp_path):
    log = writers.MetricsLog(tmp_path)
    log.write_eval(0, "floor", {"knn_top1": 0.1})
    log.close()
    writers.MetricsLog(tmp_path, resume_step=0).close()
    assert rows(tmp_path) == []


def test_tensorboard_holds_scalars_and_pictures(tmp_path):
    pytest.importorskip("tensorboardX")
    log = writers.MetricsLog(tmp_path)
    log.write(1, "pretrain", {"loss": 1.5})
    log.picture(1, "pca", np.zeros((8, 8, 3), np.uint8))
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/loss" in content and b"pictures/pca" in content and b"PNG" in content


def test_wandb_must_be_there_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="config.wandb is 'dino' but wandb is not installed"):
        writers.MetricsLog(tmp_path, wandb="dino")


def test_wandb_goes_on_in_the_same_curves(tmp_path, monkeypatch):
    opened, logged = [], []
    run = types.SimpleNamespace(
        log=lambda row, step: logged.append((step, row)), finish=lambda: None
    )
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace()
    module.util = types.SimpleNamespace(generate_id=lambda: "abc")
    module.init = lambda **settings: opened.append(settings) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    for _ in range(2):
        log = writers.MetricsLog(tmp_path, wandb="dino")
        log.write(3, "pretrain", {"loss": 1.0})
        log.close()
    assert [o["id"] for o in opened] == ["abc", "abc"] and opened[0]["project"] == "dino"
    assert logged[0] == (3, {"phase": "pretrain", "train/loss": 1.0})


def test_a_full_disk_is_named(tmp_path):
    log = writers.MetricsLog(tmp_path)
    log._files["metrics"].close()
    log._files["metrics"] = open("/dev/full", "a")
    with pytest.raises(OSError, match="/dev/full could not be written: No space left"):
        log.write(1, "pretrain", {"loss": 1.0})


def test_the_line():
    row = {"lr": 1e-3, "ibot": 5.25, "loss": 10.123456, "dino_global": 7.0}
    assert writers.describe("gram", 1200, 20000, row, SPEED) == (
        "gram 1,200/20,000 | loss 10.12 dino_global 7 ibot 5.25 | 812 img/s | MFU 41% | wait 2% | "
        "ETA 3:12:05"
    )
    slow = SPEED._replace(images_per_second=1.234, mfu=None, eta_seconds=200_000.0)
    assert writers.describe("a", 1, 2, {}, slow) == "a 1/2 | 1.2 img/s | wait 2% | ETA 2d 7:33:20"


def test_without_a_terminal_one_line_per_update(capsys):
    line = writers.ProgressLine("pretrain", 100)
    line.update(10, {"loss": 1.0}, SPEED)
    line.update(20, {"loss": 0.5}, SPEED)
    line.close()
    printed = capsys.readouterr().out.splitlines()
    assert [text.split(" | ")[0] for text in printed] == ["pretrain 10/100", "pretrain 20/100"]


def test_on_a_terminal_the_line_stays_in_place(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    line = writers.ProgressLine("pretrain", 100)
    line.update(10, {"loss": 1.0}, SPEED)
    line.update(20, {"loss": 0.5}, SPEED)
    line.close()
    line.close()
    out = capsys.readouterr().out
    assert "\x1b[2K" in out and "pretrain 20/100" in out  # erased and written again
    assert out.count("\n") <= 2
