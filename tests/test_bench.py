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
