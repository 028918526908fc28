"""Reads a directory of reference vectors and parametrises tests over what it holds.

A directory has `<topic>.npz` files with arrays named `<case>/<array>` and one `meta.json`; its
README says what each array is. `pytest tests/conformance --vectors DIR` runs the same tests over
another directory of the same format, so a test names topics and array kinds, never cases, sizes or
temperatures:

    @vectors.cases("dino_loss")  # one test per case of dino_loss.npz
    def test_loss(case): case["teacher_logits"], case.meta["K"]

    @vectors.cases("dino_loss", sub=lambda case: case.matching(r"t[^/]*(?=/teacher_probs)"))
    def test_loss(case, sub): case[f"{sub}/teacher_probs"]  # one per case and temperature

    @vectors.files("vit_*")  # one per file, arrays under their full names
    def test_model(case): case["params/cls_token"], case.meta["params"]

    @vectors.files("curation/hkm*")  # files of DIR/curation, or of DIR if it has no such folder
    def test_levels(case): case["X"]

A topic whose file is missing is skipped in words.
"""

import fnmatch
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

DEFAULT_DIR = Path(__file__).parent / "vectors"
# (directory, topic, full array name) of every array a test looked at; conftest reports the others.
READ: set[tuple[str, str, str]] = set()


class Case(Mapping[str, np.ndarray]):
    """Arrays of one case (or of one whole file, prefix "") with its settings in `meta`."""

    def __init__(self, directory: Path, topic: str, prefix: str):
        self.topic, self.name = topic, prefix.rstrip("/")
        self.meta = meta(directory).get(topic, {})
        if prefix:
            self.meta = self.meta.get(self.name, {})
        self._source, self._prefix = (str(directory), topic), prefix
        flat = arrays(directory, topic)
        self._arrays = {k[len(prefix) :]: v for k, v in flat.items() if k.startswith(prefix)}

    def __getitem__(self, name: str) -> np.ndarray:
        READ.add((*self._source, self._prefix + name))
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, name: object) -> bool:  # Mapping's own would count as a reading
        return name in self._arrays

    def matching(self, pattern: str) -> list[str]:
        """Distinct matches of a pattern at the start of the array names, in file order."""
        found = (re.match(pattern, name) for name in self._arrays)
        return list(dict.fromkeys(m.group() for m in found if m))

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays below `prefix/`, named without it."""
        prefix = prefix.rstrip("/") + "/"
        return {k[len(prefix) :]: self[k] for k in self._arrays if k.startswith(prefix)}


@functools.cache
def arrays(directory: Path, topic: str) -> dict[str, np.ndarray]:
    """All arrays of `<topic>.npz` under their full names."""
    with np.load(directory / f"{topic}.npz", allow_pickle=False) as z:
        return {name: z[name] for name in z.files}


@functools.cache
def meta(directory: Path) -> dict:
    """`meta[topic][case]` = settings of a case; {} where there is no meta.json."""
    file = Path(directory) / "meta.json"
    return json.loads(file.read_text()) if file.exists() else {}


def table(directory: Path, name: str) -> dict:
    """One of the JSON tables (`param_groups`, ...); the test is skipped without it."""
    file = Path(directory) / f"{name}.json"
    if not file.exists():
        pytest.skip(f"{file.name} is not in {directory}")
    return json.loads(file.read_text())


def located(directory: Path, pattern: str) -> tuple[Path, str]:
    """Where the files of a pattern are, and the pattern there.

    `curation/X` is X of DIR/curation; of DIR itself if that holds the files of the folder.
    """
    *folders, name = pattern.split("/")
    below = Path(directory, *folders)
    return (below if below.is_dir() else Path(directory)), name


def topic(directory: Path, name: str) -> dict[str, Case]:
    """`topic(dir, "koleo")["b8"]["x"]`: all cases of one file, in file order."""
    names = dict.fromkeys(k.split("/")[0] for k in arrays(Path(directory), name))
    return {case: Case(Path(directory), name, f"{case}/") for case in names}


def cases(pattern: str, sub: Callable[[Case], Sequence] | None = None) -> pytest.MarkDecorator:
    """Parametrises `case` over the cases of the files `pattern`.npz, and `sub` over `sub(case)`.

    A case for which `sub` gives nothing is left out.
    """
    return pytest.mark.vectors(pattern, sub=sub, whole=False)


def files(pattern: str, sub: Callable[[Case], Sequence] | None = None) -> pytest.MarkDecorator:
    """As `cases`, with one `case` per file that holds all its arrays under their full names."""
    return pytest.mark.vectors(pattern, sub=sub, whole=True)


def generate(metafunc: pytest.Metafunc, directory: Path) -> None:
    """Turns the mark made by `cases` or `files` into parameters (called by conftest)."""
    mark = metafunc.definition.get_closest_marker("vectors")
    if mark is None:
        return
    directory, pattern = located(directory, mark.args[0])
    sub, whole = mark.kwargs["sub"], mark.kwargs["whole"]
    found = sorted(f.stem for f in directory.glob("*.npz") if fnmatch.fnmatch(f.stem, pattern))
    params = []
    for name in found:
        held = [Case(directory, name, "")] if whole else topic(directory, name).values()
        for case in held:
            label = f"{name}-{case.name}" if case.name else name
            if sub is None:
                params.append(pytest.param(case, id=label))
            else:
                params += [pytest.param(case, s, id=f"{label}-{_label(s)}") for s in sub(case)]
    if not params:
        reason = f"{pattern}.npz is not in {directory}" if not found else f"no such case in {found}"
        params = [pytest.param(*[None] * (1 if sub is None else 2), marks=pytest.mark.skip(reason))]
    metafunc.parametrize(["case"] if sub is None else ["case", "sub"], params)


def _label(sub: object) -> str:
    return "-".join(map(str, sub)) if isinstance(sub, tuple) else str(sub)


def assert_close(
    actual, expected: np.ndarray, atol: float = 2e-5, rtol: float = 2e-4, name: str = "array"
) -> None:
    """Equal shapes and |actual - expected| <= atol + rtol |expected|; says how bad and where."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{name}: {actual.shape} != {expected.shape}"
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    error = np.abs(actual - expected)
    bad = ~(error <= atol + rtol * np.abs(expected))  # a NaN is bad
    if bad.any():
        at = np.unravel_index(
            np.argmax(np.where(bad, np.nan_to_num(error, nan=np.inf), 0)), bad.shape
        )
        at = tuple(map(int, at))
        relative = np.linalg.norm(error) / max(np.linalg.norm(expected), 1e-300)
        raise AssertionError(
            f"{name}: {bad.sum()} of {bad.size} entries off (atol {atol}, rtol {rtol}); "
            f"worst at {at}: {actual[at]:.8g}, expected {expected[at]:.8g}; "
            f"relative L2 {relative:.2e}"
        )
