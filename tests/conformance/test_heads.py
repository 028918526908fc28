"""Projection heads against the reference's arrays."""

import jax
import jax.numpy as jnp
import reference_params as reference
import vectors

from dinojax.models import heads


@vectors.cases("dino_head")
def test_head(case):
    state = case.group("params")
    config = reference.head_config(state)
    network = heads.build(config, config.pop("in_dim"), "float32")
    params = reference.head_params(state)

    def scalar(x):
        logits = network.apply(params, x)
        return jnp.sum(logits * case["cotangent"]), logits

    step = jax.jit(jax.value_and_grad(scalar, has_aux=True))
    (_, logits), gradient = step(jnp.asarray(case["x"]))
    vectors.assert_close(logits, case["out"], name="out")
    vectors.assert_close(gradient, case["grad_x"], atol=1e-4, rtol=1e-3, name="grad_x")
    bottleneck = network.apply(params, jnp.asarray(case["x"]), method="bottleneck")
    vectors.assert_close(bottleneck, case["out_no_last_layer"], name="bottleneck")
    x = jnp.asarray(case["only_last_layer_in"])
    logits = network.apply(params, x, method="logits")
    vectors.assert_close(logits, case["only_last_layer_out"], name="last layer")
