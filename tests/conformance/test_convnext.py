"""ConvNeXts against the reference's arrays."""

import functools

import jax
import jax.numpy as jnp
import reference_params as reference
import vectors

from dinojax.models import convnext

OUTPUTS = {
    "x_norm_clstoken": "cls",
    "x_norm_patchtokens": "patches",
    "x_storage_tokens": "storage",
    "x_prenorm": "prenorm",
}
CLOSE = {"atol": 3e-5, "rtol": 3e-4}


def model(case: vectors.Case) -> tuple:
    config = reference.convnext_config(case.meta["params"])
    return convnext.build(config), reference.backbone_params(case.group("params"), config)


def images(case: vectors.Case, name: str) -> jax.Array:
    return jnp.asarray(case[name].transpose(0, 2, 3, 1))


@vectors.files("convnext_*", sub=lambda case: case.matching(r"[^/]+(?=/grad_x$)"))
def test_features_and_gradient(case, sub):
    network, params = model(case)
    weights = case.group(f"{sub}/cotangent")

    def scalar(params, x):
        (features,) = network.apply(params, (x,))
        total = sum(jnp.sum(getattr(features, OUTPUTS[k]) * w) for k, w in weights.items())
        return total, features

    step = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))
    (_, features), (grads, grad_x) = step(params, images(case, f"{sub}/x"))
    for name, ours in OUTPUTS.items():
        if f"{sub}/{name}" in case:
            vectors.assert_close(getattr(features, ours), case[f"{sub}/{name}"], **CLOSE, name=name)
    expected = case[f"{sub}/grad_x"].transpose(0, 2, 3, 1)
    vectors.assert_close(grad_x, expected, atol=1e-4, rtol=1e-3, name="grad_x")
    ours = reference.to_reference(grads)
    for name, norm in case.group(f"{sub}/grad_norm").items():
        vectors.assert_close(jnp.linalg.norm(ours[name]), norm, atol=1e-4, rtol=1e-3, name=name)


@vectors.files("convnext_*", sub=lambda case: case.matching(r"[^/]+/layers_[^/]*"))
def test_intermediate_stages(case, sub):
    """layers_n4_norm: the last four, normed, as maps; layers_1_3_nonorm: stages 1 and 3, raw."""
    network, params = model(case)
    name, listed = sub.split("/")
    *numbers, norm = listed.removeprefix("layers_").split("_")
    layers = int(numbers[0][1:]) if numbers[0][0] == "n" else tuple(map(int, numbers))
    apply = functools.partial(
        network.apply, layers=layers, norm=norm == "norm", method="intermediate"
    )
    outputs = jax.jit(apply)(params, images(case, f"{name}/x"))
    found = case.group(sub)
    assert len(outputs) == 1 + max(int(key.split("/")[0]) for key in found)
    for key, expected in found.items():
        index, kind = key.split("/")
        ours = outputs[int(index)].patches if kind == "patch" else outputs[int(index)].cls
        if expected.ndim == 4:
            expected = expected.transpose(0, 2, 3, 1).reshape(ours.shape)
        vectors.assert_close(ours, expected, **CLOSE, name=key)
