"""ViTs, and one block with stochastic depth, against the reference's arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import reference_params as reference
import vectors

from dinojax.layers import rope
from dinojax.layers.block import Block, kept_count
from dinojax.models import vit
from dinojax.models.functional import Features, functional

OUTPUTS = {
    "x_norm_clstoken": "cls",
    "x_storage_tokens": "storage",
    "x_norm_patchtokens": "patches",
    "x_prenorm": "prenorm",
}


def tolerances(case: vectors.Case) -> tuple[dict, dict]:
    """For outputs and for gradients. bfloat16 tables of the reference are only approximated."""
    if case.meta["params"].get("pos_embed_rope_dtype", "bf16") == "bf16":
        return {"atol": 0.3, "rtol": 0.0}, {"atol": 0.3, "rtol": 0.05}
    return {"atol": 3e-5, "rtol": 3e-4}, {"atol": 1e-4, "rtol": 1e-3}


def model(case: vectors.Case) -> tuple:
    """(network, parameters) of a file."""
    config = reference.vit_config(case.meta["params"])
    network = vit.build(config)
    return network, reference.backbone_params(case.group("params"), config)


def images(case: vectors.Case, name: str) -> jax.Array:
    return jnp.asarray(case[name].transpose(0, 2, 3, 1))


def runs(case: vectors.Case) -> list[str]:
    """Inputs of a file that have gradients: plain, masked, ..."""
    return case.matching(r"[^/]+(?=/grad_x$)")


@vectors.files("vit_*", sub=runs)
def test_features_and_gradients(case, sub):
    network, params = model(case)
    close, close_gradient = tolerances(case)
    x = images(case, f"{sub}/x")
    masks = (jnp.asarray(case[f"{sub}/masks"]) if f"{sub}/masks" in case else None,)
    weights = case.group(f"{sub}/cotangent")

    def scalar(params, x):
        (features,) = network.apply(params, (x,), masks)
        total = sum(jnp.sum(getattr(features, OUTPUTS[k]) * w) for k, w in weights.items())
        return total, features

    step = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))
    (_, features), (grads, grad_x) = step(params, x)
    for name, ours in OUTPUTS.items():
        if f"{sub}/{name}" in case:
            vectors.assert_close(getattr(features, ours), case[f"{sub}/{name}"], **close, name=name)
    expected = case[f"{sub}/grad_x"].transpose(0, 2, 3, 1)
    vectors.assert_close(grad_x, expected, **close_gradient, name="grad_x")
    norms = case.group(f"{sub}/grad_norm")
    ours = reference.to_reference(grads)
    assert set(norms) == set(ours)
    for name, norm in norms.items():
        vectors.assert_close(np.linalg.norm(ours[name]), norm, **close_gradient, name=name)
    if f"{sub}/forward_default" in case:
        vectors.assert_close(features.cls, case[f"{sub}/forward_default"], **close)


@vectors.files("vit_*", sub=lambda case: case.matching(r"(?!params)[^/]+/(last\d|blocks_)[^/]*"))
def test_intermediate_layers(case, sub):
    network, params = model(case)
    close, _ = tolerances(case)
    found = case.group(sub)
    count = 1 + max(int(name.split("/")[0]) for name in found)
    x = images(case, f"{sub.split('/')[0]}/x")
    layers, norm = (count, True) if "/last" in sub else ((0, -1), False)
    apply = functools.partial(network.apply, layers=layers, norm=norm, method="intermediate")
    outputs = jax.jit(apply)(params, x)
    assert len(outputs) == count
    for name, expected in found.items():
        index, kind = name.split("/")
        compare(outputs[int(index)], kind, expected, close)


def compare(features: Features, kind: str, expected: np.ndarray, close: dict) -> None:
    """`patch` (as map [n, d, y, x] or as tokens), `cls` or `storage` of one layer."""
    ours = {"patch": features.patches, "cls": features.cls, "storage": features.storage}[kind]
    if kind == "patch" and expected.ndim == 4:
        expected = expected.transpose(0, 2, 3, 1).reshape(ours.shape)
    vectors.assert_close(ours, expected, **close, name=kind)


@vectors.files("vit_*", sub=lambda case: case.matching(r"list/(train|eval)(?=/)"))
def test_list_of_crops(case, sub):
    network, params = model(case)
    crops = (images(case, "list/x_global"), images(case, "list/x_local"))
    masks = (jnp.asarray(case["list/masks_global"]), None)
    key = jax.random.key(0) if sub.endswith("train") else None
    features = jax.jit(network.apply)(params, crops, masks, key=key)
    for entry, outputs in zip(("global", "local"), features, strict=True):
        for name, expected in case.group(f"{sub}/{entry}").items():
            ours = getattr(outputs, OUTPUTS[name])
            vectors.assert_close(ours, expected, **tolerances(case)[0], name=f"{entry}/{name}")


@vectors.cases("block_droppath")
def test_block_with_given_subsets(case):
    meta = case.meta
    names = {"ffn_layer": "ffn", "ffn_ratio": "ffn_ratio", "norm_layer": "norm"}
    options = {ours: meta[theirs] for theirs, ours in names.items() if theirs in meta}
    options |= {k: meta[k] for k in ("mask_k_bias", "qkv_bias") if k in meta}
    options["layerscale"] = 1.0 if "params/ls1.gamma" in case else None
    network = functional(lambda r: Block(meta["dim"], meta["num_heads"], **options, rngs=r))
    params = reference.block_params(case.group("params"), network)
    periods = rope.periods_from_base(100.0, meta["dim"] // meta["num_heads"])
    for i, (rows, height, width) in enumerate(meta["inputs"]):
        tables = rope.tables(rope.coordinates(height, width)[None], periods)
        x, kept = jnp.asarray(case[f"{i}/x"]), (case[f"{i}/kept_attn"], case[f"{i}/kept_mlp"])
        assert all(len(k) == kept_count(rows, meta["drop_path"]) for k in kept)
        out = network.apply(params, x, tables, kept=tuple(jnp.asarray(k)[None] for k in kept))
        vectors.assert_close(out, case[f"{i}/out"], atol=3e-5, rtol=3e-4, name="out")
        out = network.apply(params, x, tables)
        vectors.assert_close(out, case[f"{i}/out_eval"], atol=3e-5, rtol=3e-4, name="out_eval")
