"""Initial parameters against the statistics of the reference's."""

from typing import Any

import jax
import numpy as np
import reference_params as reference
import vectors

from dinojax.models import convnext, heads, vit
from dinojax.models.functional import Network


def network_of(settings: dict[str, Any]) -> Network:
    kwargs = dict(settings["kwargs"])
    if settings["kind"] == "vit":
        return vit.build(reference.vit_config(kwargs))
    if settings["kind"] == "convnext":
        return convnext.build(reference.convnext_config(kwargs))
    names = {
        "out_dim": "prototypes",
        "bottleneck_dim": "bottleneck",
        "hidden_dim": "hidden",
        "nlayers": "layers",
    }
    in_dim = kwargs.pop("in_dim")
    return heads.build({names[k]: v for k, v in kwargs.items()}, in_dim, "float32")


def same_statistics(name: str, ours: np.ndarray, theirs: dict[str, Any]) -> None:
    """Constants exactly; draws of n numbers within four standard errors of both samples."""
    assert list(ours.shape) == theirs["shape"], name
    if theirs["min"] == theirs["max"]:
        assert ours.min() == ours.max() == np.float32(theirs["min"]), name
        return
    # Standard errors of a difference of two independent samples; for a normal law the standard
    # deviation's is s / sqrt(2n), for a uniform one less. Extremes of small samples vary a lot.
    error = theirs["std"] / np.sqrt(ours.size) * np.sqrt(2)
    assert abs(ours.mean() - theirs["mean"]) < 4 * error, name
    assert abs(ours.std() - theirs["std"]) < 4 * error / np.sqrt(2), name
    if ours.size > 1000:
        assert 0.65 < ours.min() / theirs["min"] < 1.5, name
        assert 0.65 < ours.max() / theirs["max"] < 1.5, name


def test_initial_parameters(vectors_dir):
    for name, entry in vectors.table(vectors_dir, "init_stats").items():
        params = network_of(entry["settings"]).init(jax.random.key(1))
        ours = reference.to_reference(params)
        expected = {k: v for k, v in entry["params"].items() if not reference.BUFFERS.fullmatch(k)}
        assert set(ours) == set(expected), name
        for key, theirs in expected.items():
            same_statistics(f"{name}: {key}", ours[key], theirs)
