"""What every test starts from: eight pretend CPU devices, strict broadcasting, checked shapes.

    pytest                                      the default suite
    pytest --slow                               with the tests marked `slow`
    pytest tests/conformance --vectors DIR      reference vectors of another directory
    pytest -m oracle                            only what compares with torch (extra `oracle`)

(Without a path, write `--vectors=DIR` with the equals sign: pytest looks for this file before it
knows the option, and would take a bare DIR for the folder to collect.)
"""

import importlib.util
import os
import tempfile
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

# XLA runs independent collectives of the pretend devices on one pool, each blocking a thread: on a
# mesh of several axes and two cores they wait for each other for ever. This is the pool's size.
os.environ.setdefault("NPROC", "64")

# Before any backend starts: jax fixes the number of devices when it first looks for them.
jax.config.update("jax_platforms", "cpu")
os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation is most of what tests cost. Compiled programs are kept between runs, and between the
# processes that one run starts: a second run of 86 tests took 17 s of CPU instead of 34 s, a first
# one no longer than without. JAX_COMPILATION_CACHE_DIR names another place; empty, it means none.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"dinojax-tests-{os.getuid()}-jax-{jax.__version__}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"] or None)
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs",
    float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
)

# Shapes and dtypes in annotations are checked at run time in tests, never in training runs. The
# hook works on modules imported after it: `dinojax` must not be imported above this line.
install_import_hook(["dinojax", "data_curation"], "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--vectors",
        metavar="DIR",
        default=str(Path(__file__).parent / "conformance" / "vectors"),
        help="directory of reference vectors (default: tests/conformance/vectors)",
    )
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out `slow` tests unless asked for; skip `oracle` tests where torch is missing."""
    if not config.getoption("slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        if slow:
            items[:] = [item for item in items if not item.get_closest_marker("slow")]
            config.hook.pytest_deselected(items=slow)
    if importlib.util.find_spec("torch") is None:
        skip = pytest.mark.skip(reason="needs torch: pip install -e '.[oracle]'")
        for item in items:
            if item.get_closest_marker("oracle"):
                item.add_marker(skip)
