"""`launch/bench.py --data`: what it reports of a folder of JPEGs and of rendered images."""

import importlib
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from dinojax import config as configs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench_data():
    sys.path.insert(0, str(ROOT / "launch"))
    yield importlib.import_module("bench_data")
    sys.path.remove(str(ROOT / "launch"))


def config_of(source):
    config = configs.load_file(str(ROOT / "tests/e2e/tiny.py"), "pretrain")
    config.data.source, config.data.threads = source, 2
    return config


def test_stages_of_encoded_images(bench_data, tmp_path, monkeypatch):
    """Reading is made slow: it must be found, in its row and as the bottleneck."""
    rng = np.random.default_rng(0)
    for k in range(17):
        cv2.imwrite(str(tmp_path / f"{k}.jpg"), rng.integers(0, 256, (40, 50, 3), np.uint8))
    from dinojax.data import folders

    fast = folders.FileSource.encoded

    def slow(self, i):
        bench_data.time.sleep(0.05)
        return fast(self, i)

    monkeypatch.setattr(folders.FileSource, "encoded", slow)
    figures = bench_data.measure(config_of(f"folder:{tmp_path}"), 0, 0.2)
    stages = figures["milliseconds_per_image"]
    assert tuple(stages) == (*bench_data.HOST, *bench_data.DEVICE)
    assert 50 <= stages["read"] < 80
    assert all(0 < stages[name] < 25 for name in ("decode", "crop", "transfer"))
    assert figures["bottleneck"].startswith("host: read (")
    assert 10 < figures["images_per_second_host"] < 42  # two threads at 50 ms
    assert figures["images_per_second_one_thread"] < 20
    text = "\n".join(bench_data.lines(figures))
    assert "bottleneck: host: read" in text
    assert "host, 2 threads" in text


def test_stages_of_rendered_images(bench_data):
    figures = bench_data.measure(config_of("scenes:100?size=32"), 0, 0.05)
    stages = figures["milliseconds_per_image"]
    assert stages["read"] == 0 < stages["decode"]
    # Two crops of 24 pixels and two of 16, a bit for masks and seeds.
    crops = 3 * (2 * 24**2 + 2 * 16**2)
    assert crops < figures["bytes_per_image"] < crops + 200


def test_a_batch_larger_than_the_source_is_refused(bench_data):
    with pytest.raises(ValueError, match="has 4 images, the batch needs 16"):
        bench_data.measure(config_of("scenes:4"), 0, 0.05)


# ---- the step ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench_figures(bench_data):
    return importlib.import_module("bench_figures")


@pytest.fixture(scope="module")
def bench_shares(bench_data):
    return importlib.import_module("bench_shares")


def test_figures_of_a_step(bench_figures, bench_shares):
    """Two phases of the same experiment: the Gram teacher takes its share in the second only."""
    bench_step = importlib.import_module("bench_step")
    for index, gram in ((0, False), (1, True)):
        config = configs.load_file(str(ROOT / "tests/e2e/tiny.py"), "")
        config.mesh.fsdp = 8
        figures = bench_step.measure_step(config, index, 2, True, None)
        assert sum(figures["shares"].values()) == pytest.approx(1)
        assert ("gram teacher" in figures["shares"]) == gram
        assert figures["shares"]["student backward"] > figures["shares"]["teacher"] > 0
        assert 0 < figures["seconds_min"] <= figures["seconds_per_step"]
        assert 0 < figures["executed_utilisation"] < figures["nominal_utilisation"] < 1
    assert "  student backward" in "\n".join(bench_figures.lines(figures))


def test_figures_of_features(bench_data):
    bench_step = importlib.import_module("bench_step")
    config = configs.load_file(str(ROOT / "tests/e2e/tiny.py"), "pretrain")
    figures = bench_step.measure_features(config, 0, 2, 4)
    assert figures["images_per_second"] == pytest.approx(4 / figures["seconds_per_step"])


@pytest.mark.parametrize(
    ("scopes", "found"),
    [
        ("jit(step)/teacher/while/body/dot_general", "teacher"),
        ("jit(step)/jvp(student)/while/body/dot_general", "student forward"),
        ("jit(step)/transpose(jvp(student))/while/body/checkpoint/exp", "student backward"),
        ("jit(step)/jvp(losses)/gram/while/body/dot_general", "gram teacher"),
        ("jit(step)/transpose(jvp(losses))/dot_general", "heads and losses"),
        ("jit(step)/update/mul", "optimiser + EMA"),
        ("reduce_sum", "other"),
    ],
)
def test_part_of_a_step(bench_shares, scopes, found):
    assert bench_shares.part(scopes) == found


def test_shares_leave_out_containers(bench_shares):
    program = """
      %fusion.1 = f32[2]{0} fusion(%a), metadata={op_name="jit(step)/update/mul"}
      %while.2 = (f32[2]{0}) while(%b), metadata={op_name="jit(step)/teacher/while"}
      ROOT dot.3 = f32[2]{0} dot(%c, %d), metadata={op_name="jit(step)/teacher/dot_general"}
    """
    spent = iter([("fusion.1", 1.0), ("while.2", 90.0), ("dot.3", 2.0), ("dot.3", 1.0)])
    shares = bench_shares.divide(spent, bench_shares.parts(program))
    assert shares == {"teacher": 0.75, "optimiser + EMA": 0.25}
    with pytest.raises(ValueError, match="no operation of the step"):
        bench_shares.divide(iter([("other.1", 1.0)]), bench_shares.parts(program))


def test_comparison(bench_figures, tmp_path):
    a = {"seconds_per_step": 2.0, "device": "cpu", "shares": {"teacher": 0.5}}
    b = {"seconds_per_step": 1.0, "device": "cpu", "shares": {"teacher": 0.25}, "loss": 1.0}
    lines = bench_figures.compare(a, b)
    assert lines[1].split() == ["seconds_per_step", "2", "1", "0.500"]
    assert lines[4].split() == ["teacher", "0.5", "0.25", "0.500"]
    assert lines[5].split() == ["loss", "None", "1"]
    with pytest.raises(ValueError, match="no file that --json wrote"):
        bench_figures.read(str(tmp_path / "missing.json"))
