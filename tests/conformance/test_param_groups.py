"""Multipliers of every parameter against the reference's parameter groups (param_groups.json)."""

import jax
import numpy as np
import reference_params as reference
import vectors

from dinojax.training import optim


def abstract_network(kind: str, kwargs: dict, shapes: dict) -> tuple[str, dict]:
    """Name and tree of the network that a table describes, filled with zeros."""
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    if kind == "head":
        return "dino_head", reference.head_params(zeros)
    if kind == "vit":
        return "backbone", reference.backbone_params(zeros, reference.vit_config(kwargs))
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
    return "backbone", reference.backbone_params(zeros, {"name": "convnext", **config})


def spread(rules: dict[str, optim.Rule], tree: dict, network: str, field: str) -> dict:
    """A rule's field at every entry of every parameter, under reference names and layouts."""

    def fill(path: str, leaf: jax.Array) -> np.ndarray:
        number = np.asarray(getattr(rules[f"{network}/{path}"], field), np.float64)
        number = number.reshape(number.shape + (1,) * (leaf.ndim - number.ndim))
        return np.broadcast_to(number, leaf.shape)

    return reference.to_reference(optim.map_with_path(fill, tree))


def test_parameter_groups(vectors_dir):
    fields = {
        "lr_multiplier": "lr_multiplier",
        "wd_multiplier": "decay_multiplier",
        "is_last_layer": "is_last_layer",
    }
    for label, entry in vectors.table(vectors_dir, "param_groups").items():
        settings = entry["settings"]
        shapes = {name: group["shape"] for name, group in entry["params"].items()}
        network, tree = abstract_network(settings["kind"], settings["kwargs"], shapes)
        rules = optim.parameter_rules(
            {network: tree}, settings["layerwise_decay"], settings["patch_embed_lr_mult"]
        )
        for theirs, ours in fields.items():
            found = spread(rules, tree, network, ours)
            assert found.keys() == shapes.keys(), label
            for name, values in found.items():
                want = float(entry["params"][name][theirs])
                np.testing.assert_allclose(
                    values, want, rtol=1e-6, err_msg=f"{label}: {name}: {theirs}"
                )
