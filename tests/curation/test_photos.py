"""The benchmark with real photographs, `tests/benchmarks/curation_photos.py`, from end to end."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "tests/benchmarks"
# A folder of three Parquet files of photographs; none come with the project.
PHOTOGRAPHS = Path(
    os.environ.get("DINOJAX_PHOTOGRAPH_SETS", ROOT.parent / "shared/data/images_small")
)


def photo_pool():
    found = importlib.util.spec_from_file_location("photo_pool", BENCHMARKS / "photo_pool.py")
    module = importlib.util.module_from_spec(found)
    sys.modules["photo_pool"] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ("jpeg", "crop", "brightness", "flip"))
def test_an_altered_copy_is_the_same_picture_but_not_the_same_bytes(kind):
    row = np.linspace(0, 255, 48)
    pixels = np.stack([np.tile(row, (40, 1)), np.tile(row[:40, None], (1, 48))], axis=-1)
    pixels = np.concatenate([pixels, pixels[..., :1] // 2], axis=-1).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    altered = photo_pool().alter(out.getvalue(), kind, np.random.default_rng(0))
    found = np.asarray(Image.open(io.BytesIO(altered)))
    assert found.shape == pixels.shape
    expected = pixels[:, ::-1] if kind == "flip" else pixels
    apart = np.abs(found.astype(int) - expected).mean()
    assert 0 < apart < 30
    if kind == "flip":
        assert np.abs(found.astype(int) - pixels).mean() > 30


@pytest.mark.slow
def test_curates_a_pool_of_photographs_and_trains_on_it(tmp_path):
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"there are no photographs in {PHOTOGRAPHS} (or DINOJAX_PHOTOGRAPH_SETS)")
    command = [sys.executable, BENCHMARKS / "curation_photos.py", "--data", PHOTOGRAPHS]
    command += ["--workdir", tmp_path, "--quick"]
    subprocess.run(command, check=True, timeout=900)
    results = json.loads((tmp_path / "results.json").read_text())
    pool, curated = results["pool"], results["curate"]
    assert pool["copies"] == 90 and pool["leaked"] == 20
    # After 20 steps the embedder knows little, but a leaked image as it was is found by any.
    assert curated["leaked"]["recall by kind"]["same"] == 1
    assert curated["labels"]["curated"]["images"] == curated["labels"]["uniform"]["images"] == 120
    trained = {"uniform", "curated", "known"}
    assert set(results["train"]["summary"]) == {"pixels", "untrained", *trained}
    # Pretended vectors that know the classes: the sample must be of more even classes.
    entropy = {name: of["entropy, nats"] for name, of in curated["labels"].items()}
    assert entropy["known"] > entropy["uniform"] + 0.3
    written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("train/*/knn.json")}
    assert len(written) == 4
    subprocess.run([*command, "--stage", "train"], check=True, timeout=300)
    assert written == {file: file.stat().st_mtime_ns for file in written}
    assert json.loads((tmp_path / "results.json").read_text())["train"] == results["train"]
