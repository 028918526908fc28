"""The attention layer: layout of qkv, masked k bias, padded keys."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dinojax.layers.attention import Attention
from dinojax.models.functional import functional
from dinojax.planning import program
from dinojax.sharding import make_mesh

DIM, HEADS = 12, 3


def network(mask_k_bias=False):
    return functional(
        lambda r: Attention(
            DIM,
            HEADS,
            qkv_bias=True,
            proj_bias=True,
            mask_k_bias=mask_k_bias,
            implementation="xla",
            rngs=r,
        )
    )


def inputs():
    """Parameters of visible size, tokens."""
    params = network().init(jax.random.key(0))
    params = jax.tree.map(lambda a: 20 * a + jax.random.normal(jax.random.key(1), a.shape), params)
    return params, jax.random.normal(jax.random.key(2), (2, 5, DIM))


def plain(params, x, keep_k_bias=True, keys=slice(None)):
    """Columns q | k | v, each with heads contiguous; float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)
    bias = p["qkv"]["bias"].copy()
    if not keep_k_bias:
        bias[DIM : 2 * DIM] = 0
    q, k, v = np.split(x @ p["qkv"]["kernel"] + bias, 3, axis=-1)
    out = np.zeros_like(x)
    for h in range(HEADS):
        one = slice(4 * h, 4 * h + 4)
        scores = q[:, :, one] @ k[:, keys, one].swapaxes(1, 2) / 2  # sqrt(4)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, :, one] = weights / weights.sum(-1, keepdims=True) @ v[:, keys, one]
    return out @ p["proj"]["kernel"] + p["proj"]["bias"]


def test_against_float64():
    params, x = inputs()
    np.testing.assert_allclose(network().apply(params, x), plain(params, x), rtol=1e-4, atol=1e-4)


def test_invalid_tokens_are_no_keys():
    params, x = inputs()
    valid = jnp.array([[True, False, True, True, False]])
    y = network().apply(params, x, valid=valid)
    expected = plain(params, x, keys=np.array([0, 2, 3]))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_masked_k_bias():
    """Softmax does not see a k bias anyway; masked, it gets no gradient at all, q and v do."""
    params, x = inputs()
    masked = network(mask_k_bias=True)
    expected = plain(params, x, keep_k_bias=False)
    np.testing.assert_allclose(masked.apply(params, x), expected, rtol=1e-4, atol=1e-4)
    grads = jax.grad(lambda p: jnp.sin(masked.apply(p, x)).sum())(params)["qkv"]["bias"]
    q, k, v = jnp.split(grads, 3)
    assert not k.any()
    assert jnp.abs(q).max() > 1e-3 and jnp.abs(v).max() > 1e-3


def test_heads_over_the_tensor_axis():
    """Columns q | k | v lie in runs over the axis: weights are moved, activations are not."""
    dim, heads, mesh = 32, 4, make_mesh(fsdp=2, tensor=4)
    options = {"qkv_bias": True, "proj_bias": True, "mask_k_bias": True, "implementation": "xla"}
    layer = functional(lambda r: Attention(dim, heads, **options, rngs=r))
    params = layer.init(jax.random.key(0))
    noise = lambda a: 9 * a + 0.2 * jax.random.normal(jax.random.key(1), a.shape)  # noqa: E731
    params = jax.tree.map(noise, params)
    x = jax.random.normal(jax.random.key(2), (8, 5, dim))

    def loss(params, x):
        return jnp.sin(layer.apply(params, x)).sum()

    alone = jax.value_and_grad(loss, (0, 1))(params, x)
    places = jax.tree.map(
        lambda a: NamedSharding(mesh, a),
        {
            "qkv": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")},
            "proj": {"kernel": P(("tensor", "fsdp")), "bias": P()},
        },
    )
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("fsdp"))
        arrays = jax.device_put((params, x), (places, rows))
        placed = (NamedSharding(mesh, P()), (places, rows))
        step = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=placed)
        compiled = step.lower(*arrays).compile()
        for a, b in zip(jax.tree.leaves(compiled(*arrays)), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    moved = [
        c.operand_bytes
        for c in program.read(compiled.as_text()).collectives
        if c.kind in ("all-to-all", "collective-permute")
    ]
    # Where anything is exchanged it is a piece of the weights.
    assert max(moved, default=0) <= 4 * dim * 3 * dim / 8
