"""Resolved experiments, changed where a test asks for it."""

from pathlib import Path

import jax
import pytest

from dinojax import config as c
from dinojax.planning import figures
from dinojax.planning.topology import parse

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "e2e" / "tiny.py"


@pytest.fixture(scope="session")
def experiment():
    """(name, section__key=value, ...) -> a resolved, valid config."""

    def load(name, **changes):
        config = c.load_file(str(TINY if name == "tiny" else ROOT / "experiments" / f"{name}.py"))
        for key, value in changes.items():
            section, _, last = key.replace("__", ".").rpartition(".")
            node = config[section] if section else config
            node[last] = value
        config = c.resolve(config)
        c.validate(config)
        return config

    return load


@pytest.fixture(scope="session")
def here(experiment):
    """The tiny run's Gram phase on this machine's eight devices, compiled."""
    config = experiment("tiny", mesh__shard_above=1)
    topology = parse("cpu", jax.device_count())
    crops = tuple(config.phases[1].crops.sizes[0])
    return config, crops, figures.measure(config, 1, crops, topology)
