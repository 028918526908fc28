"""Conformance tests run over the reference vectors of `--vectors DIR` (see vectors.py)."""

import sys
from pathlib import Path

import pytest

# The loader is a module of this folder, importable whatever pytest's import mode is.
sys.path.insert(0, str(Path(__file__).parent))
import vectors


def _directory(config: pytest.Config) -> Path:
    given = config.getoption("--vectors", default=None)
    directory = Path(given).resolve() if given else vectors.DEFAULT_DIR
    if not directory.is_dir():
        raise pytest.UsageError(f"--vectors {given} is not a directory")
    return directory


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vectors(pattern): parametrised over reference vectors")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    vectors.generate(metafunc, _directory(metafunc.config))


@pytest.fixture(scope="session")
def vectors_dir(pytestconfig: pytest.Config) -> Path:
    """The directory of reference vectors under test."""
    return _directory(pytestconfig)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Says which arrays no test of this session looked at."""
    directory = _directory(config)
    for file in sorted([*directory.glob("*.npz"), *directory.glob("curation/*.npz")]):
        names = set(vectors.arrays(file.parent, file.stem))
        unread = sorted(n for n in names if (str(file.parent), file.stem, n) not in vectors.READ)
        if 0 < len(unread) < len(names):
            shown = ", ".join(unread[:8]) + (", ..." if len(unread) > 8 else "")
            terminalreporter.write_line(
                f"vectors: {file.stem}: {len(unread)} of {len(names)} arrays not read: {shown}"
            )
