"""A run on a mixture, with a file that cannot be read: killed, resumed, and the same."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photographs(tmp_path):
    """A folder of 40 images, of which three cannot be read."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    dice = np.random.default_rng(0)
    for number in range(40):
        pixels = dice.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.jpg")
    for number in (7, 20, 33):
        os.truncate(folder / f"{number:02d}.jpg", 300)
    return folder


def listed(workdir):
    """Names in unreadable.txt, in order."""
    return [line.split("\t")[0] for line in (workdir / "unreadable.txt").read_text().splitlines()]


def test_killed_and_resumed(tools, tmp_path, photographs):
    """With other numbers of worker processes each time; every row and name is the same."""
    mixture = f"{tools.TINY}:mixture"
    given = (f"--config.data.mixture[1].source=folder:{photographs}", "--config.eval.pictures=3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ended = tools.finish(tools.start(whole, *given, config=mixture), whole)
    assert ended.code == 0, ended.err
    assert "data: scenes 38.2% of the rows, others 61.8% of the rows (30% of" in ended.out
    assert list((whole / "pictures").glob("*.png"))

    workers = "--config.data.workers=2"
    process = tools.start(parts, *given, workers, config=mixture)
    tools.interrupt(process, signal.SIGKILL, lambda: any((parts / "checkpoints").glob("4*")))
    assert tools.finish(process, parts).code == -signal.SIGKILL
    ended = tools.finish(tools.start(parts, *given, config=mixture), parts)
    assert ended.code == 0, ended.err
    assert "resumed at step" in ended.out
    tools.same_rows(whole, parts)

    names = listed(whole)
    assert 1 <= len(names) == len(set(names))
    assert set(names) <= {f"others: {number:02d}.jpg" for number in (7, 20, 33)}
    assert sorted(listed(parts)) == sorted(names)
    for line in (whole / "unreadable.txt").read_text().splitlines():
        assert line.split("\t")[1]

    speeds = [json.loads(line) for line in (whole / "speed.jsonl").read_text().splitlines()]
    assert {row["batch"] for row in speeds} == {"mixed", "others"}
    last = speeds[-1]
    assert last["rows_scenes"] + last["rows_others"] == pytest.approx(1)
    assert 0.25 < last["rows_scenes"] < 0.55  # 0.38 is expected
