"""Feed-forward layers: exact GELU, SwiGLU, hidden widths."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.layers.ffn import gate, gelu, hidden_width, make_ffn
from dinojax.models import variants
from dinojax.models.functional import functional


def test_gelu_is_the_exact_form():
    """The tanh approximation is off by 5e-4 near 2.3."""
    x = np.linspace(-6, 6, 241)
    phi = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), x * phi, atol=1e-6)
    slope = jax.grad(lambda x: gelu(x).sum())(jnp.asarray(x, jnp.float32))
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(slope, phi + x * density, atol=1e-6)


def test_gate():
    a, b = np.random.default_rng(0).normal(size=(2, 50)) * 4
    y = gate(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(y, a / (1 + np.exp(-a)) * b, rtol=1e-5, atol=1e-6)


# Spec 1.1: hidden widths of the published sizes, and both kinds of giant2.
HIDDEN = {
    "small": 1536,
    "splus": 1536,
    "base": 3072,
    "large": 4096,
    "lplus": 4096,
    "so400m": 4352,
    "huge2": 5120,
    "hplus": 5120,
    "giant2": 6144,
    "7b": 8192,
}


def test_hidden_widths():
    for name, hidden in HIDDEN.items():
        sizes = variants.VIT[name]
        assert hidden_width(sizes["ffn"], sizes["width"], sizes["ffn_ratio"]) == hidden, name
    assert hidden_width("swiglu", 1536, 4.0) == 4096
    # Rounded up to the alignment: 2/3 of 40 x 3 = 80.
    alignments = {"swiglu": 80, "swiglu32": 96, "swiglu64": 128, "swiglu128": 128}
    assert {kind: hidden_width(kind, 40, 3.0) for kind in alignments} == alignments
    with pytest.raises(ValueError, match="'swiglu16'; expected one of mlp, swiglu"):
        hidden_width("swiglu16", 40, 3.0)


def test_swiglu_order_of_weights():
    """w3(silu(w1 x) ⊙ w2 x): w1 is the one inside silu."""
    network = functional(lambda r: make_ffn("swiglu", 8, 3.0, bias=True, rngs=r))
    params = jax.tree.map(lambda a: 10 * a + 0.1, network.init(jax.random.key(0)))
    x = np.random.default_rng(0).normal(size=(5, 8))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    a, b = (x @ p[w]["kernel"] + p[w]["bias"] for w in ("w1", "w2"))
    expected = (a / (1 + np.exp(-a)) * b) @ p["w3"]["kernel"] + p["w3"]["bias"]
    y = network.apply(params, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, expected, atol=1e-5)
