"""A disk that takes no more: one sentence, exit code 1, and what was saved before stays good.

A limit on the size of files stands in for the disk, since a small one cannot be mounted everywhere.
"""

import resource
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from dinojax import config as configs
from dinojax import train
from dinojax.training.checkpoint import Checkpoints

KIB = 32  # no file may grow beyond
LIMITED = ("sh", "-c", f'ulimit -f {2 * KIB}; exec "$@"', "sh")  # blocks of 512 bytes


def test_checkpoint(whole, tools, tmp_path):
    workdir = tools.rewound(whole, tmp_path / "run", step=12)
    quiet = "--config.eval.pictures=0"
    ended = tools.finish(tools.start(workdir, quiet, before=LIMITED), workdir)
    assert ended.code == 1, ended.err
    sentence = ended.sentence()
    assert "the checkpoint of step 14 could not be written" in sentence
    assert "file too large; the one of step 12 is kept" in sentence
    assert Checkpoints(workdir / "checkpoints", read_only=True).latest() == 12


def test_weights(whole, tools, tmp_path):
    """The file of an earlier phase stays whole."""
    workdir = tmp_path / "run"
    shutil.copytree(whole / "weights", workdir / "weights")
    before = load_file(workdir / "weights" / "teacher.safetensors")
    run = train.prepare(configs.load_file(str(tools.TINY)), workdir)
    state = {"teacher": {"big": np.zeros(100_000, np.float32)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (KIB << 10, hard))
    try:
        with pytest.raises(OSError, match="teacher.safetensors could not be written.*too large"):
            train.write_weights(run, state, 18)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = load_file(workdir / "weights" / "teacher.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert [p.name for p in (workdir / "weights").iterdir()] == ["teacher.safetensors"]
