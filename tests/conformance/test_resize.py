"""Resizing of patch grids against the reference's numbers, images as features [n, (y x), c]."""

import jax
import jax.numpy as jnp
import numpy as np
import vectors

from dinojax.losses.gram import resize_features


@vectors.cases("resize", sub=lambda case: case.matching(r"[a-z]+_aa[01](?=/y)"))
def test_resize(case, sub):
    method, antialias = sub.split("_aa")
    x, expected = case["x"], case[f"{sub}/y"]
    n, c, *grid = x.shape
    to = tuple(case.meta.get("size", expected.shape[2:]))

    def resized(x):
        features = x.reshape(n, c, -1).swapaxes(1, 2)  # n c y x -> n (y x) c
        y = resize_features(features, tuple(grid), to, method, antialias == "1")
        return y.swapaxes(1, 2).reshape(expected.shape)

    y, pull = jax.vjp(resized, jnp.asarray(x))
    vectors.assert_close(y, expected, name="y")
    cotangent = np.linspace(-1, 1, y.size, dtype=np.float32).reshape(y.shape)
    gradient = pull(jnp.asarray(cotangent))[0]
    vectors.assert_close(gradient, case[f"{sub}/grad_x"], atol=1e-4, rtol=1e-3, name="grad_x")
