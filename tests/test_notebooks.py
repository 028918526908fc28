"""The notebooks of `launch/colab/`, run top to bottom on CPU at small sizes, as Colab would."""

import ast
import os
from pathlib import Path
from typing import Any

import jax
import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from PIL import Image

from dinojax import backbone

ROOT = Path(__file__).parents[1]
COLAB = ROOT / "launch" / "colab"
BOOKS = sorted(path.stem for path in COLAB.glob("*.ipynb"))
# Compiling is what they spend their time on; see tests/e2e/conftest.py.
ENVIRONMENT = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": str(ROOT),
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(COLAB / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def run(name: str, folder: Path, **settings: Any) -> dict[str, tuple[str, int]]:
    """Run in `folder`, other values after the settings; by cell, its text and its pictures."""
    book = read(name)
    (at,) = (
        k for k, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    known = {n.id for n in ast.walk(ast.parse(book.cells[at].source)) if isinstance(n, ast.Name)}
    assert settings.keys() <= known
    lines = "\n".join(f"{key} = {value!r}" for key, value in settings.items())
    book.cells.insert(at + 1, nbformat.v4.new_code_cell(lines))
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(book, timeout=600, resources=resources).execute(env=os.environ | ENVIRONMENT)
    seen = {}
    for cell in book.cells:
        if cell.cell_type == "code":
            text = "".join(out.text for out in cell.outputs if out.output_type == "stream")
            pictures = sum("image/png" in out.get("data", {}) for out in cell.outputs)
            seen[cell.id] = text, pictures
    return seen


@pytest.mark.parametrize("name", BOOKS)
def test_what_is_committed(name):
    """Valid, without outputs, and every cell has an id that a person can read."""
    book = read(name)
    nbformat.validate(book)
    assert (book.nbformat, book.nbformat_minor) == (4, 5)
    assert all(cell.id.replace("-", "").isalpha() for cell in book.cells)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    text = (COLAB / f"{name}.ipynb").read_text()
    assert "/home/" not in text and "/tmp" not in text


def test_pretrain(tmp_path):
    seen = run(
        "pretrain_tpu",
        tmp_path,
        IMAGES="scenes:128?even=1",
        LABELLED="scenes:64?even=1",
        NEW="scenes:16?split=val&even=1",
        STEPS=2,
    )
    assert "on 1 x cpu: no accelerator" in seen["device"][0]
    assert "pretrain 2/2" in seen["train"][0] and "step 2: knn20/top1" in seen["train"][0]
    assert "knn20/top1" in seen["knn"][0]
    assert "its features differ by 0.0e+00" in seen["save"][0]
    assert (tmp_path / "backbone.safetensors").stat().st_size > 1e6
    drawn = {cell: count for cell, (_, count) in seen.items() if count}
    assert drawn == dict.fromkeys(("look", "views", "curves", "pca", "neighbours"), 1)


def test_use(tmp_path):
    """A folder of a user's own: two classes, several sizes, one file that is no image."""
    rng = np.random.default_rng(0)
    for kind, level in (("dark", 40), ("light", 200)):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for k in range(10):
            pixels = rng.integers(level, level + 40, (40, 30 + k, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / kind / f"{k}.png")
    (tmp_path / "photos" / "dark" / "broken.png").write_bytes(b"no image")
    weights(tmp_path / "backbone.safetensors")

    seen = run("use_a_backbone", tmp_path, IMAGES="folder:photos", SIZE=32)
    assert "trained for 7 steps" in seen["load"][0]
    assert seen["images"][0].startswith("left out: ") and "broken.png" in seen["images"][0]
    assert "cls (20, 32)  patches (20, 16, 32)  grid (4, 4)" in seen["features"][0]
    assert "the most common label alone: 50.0 %" in seen["knn"][0]
    assert " 1 neighbours: 100.0 % are right" in seen["knn"][0]  # dark and light: even untrained
    drawn = {cell: count for cell, (_, count) in seen.items() if count}
    assert drawn == dict.fromkeys(("images", "pca", "similarity", "neighbours"), 1)
    with np.load(tmp_path / "features.npz") as kept:
        assert kept["cls"].shape == (20, 32) and kept["patches"].shape == (20, 16, 32)
        assert sorted(kept["names"])[0].endswith("dark/0.png")


def weights(path: Path) -> None:
    """A backbone that has never been trained."""
    model = {"name": "vit", "variant": "tiny", "width": 32, "depth": 1, "heads": 2}
    model |= {"patch_size": 8, "layerscale": 1.0, "dtype": "float32"}
    params = jax.jit(backbone.build(model).init)(jax.random.key(0))
    data = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    backbone.save_weights(path, {"backbone": params}, {"model": model, "data": data}, step=7)


class Shell:
    """What a cell asks of IPython: shell lines and magics, written down."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def system(self, line: str) -> None:
        self.lines.append(line)

    def run_line_magic(self, name: str, line: str) -> None:
        self.lines.append(f"{name} {line}")


def install(name: str, monkeypatch: pytest.MonkeyPatch, tool: str, repository: str) -> list[str]:
    """What the first cells send where dinojax is not installed; `tool` is on the machine."""
    first = {cell.id: cell.source for cell in read(name).cells}
    assert 'REPOSITORY = ""' in first["repository"]
    shell = Shell()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda program: program == tool)
    monkeypatch.setattr("os.path.exists", lambda path: path == tool)
    monkeypatch.setattr("sys.path", [])
    # IPython itself fills in {names}.
    names = {"get_ipython": lambda: shell, "REPOSITORY": repository}
    exec(TransformerManager().transform_cell(first["install"]), names)
    return [line.format(**names) for line in shell.lines]


@pytest.mark.parametrize("name", BOOKS)
def test_installation(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="dinojax is not here; set REPOSITORY"):
        install(name, monkeypatch, "", "")
    clone = tmp_path / "dinojax-code"
    for tool, extra in (("", ""), ("nvidia-smi", "[cuda]"), ("/dev/vfio/0", "[tpu]")):
        assert install(name, monkeypatch, tool, "https://host/it") == [
            "git clone --quiet --depth 1 https://host/it dinojax-code",
            f'pip install --quiet --editable "{clone}{extra}"',
        ]
    (clone / "dinojax").mkdir(parents=True)
    (clone / "dinojax" / "train.py").touch()
    assert install(name, monkeypatch, "", "") == [f'pip install --quiet --editable "{clone}"']
