"""AdamW by path against torch's rule written out in numpy float64, and the rules of spec 6.1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.training import optim

SHAPES = {
    "backbone": {
        "cls_token": (1, 4),
        "storage_tokens": (2, 4),
        "mask_token": (1, 4),
        "patch_embed": {"kernel": (2, 2, 3, 4), "bias": (4,)},
        "blocks": {
            "norm1": {"scale": (3, 4), "bias": (3, 4)},
            "attn": {"qkv": {"kernel": (3, 4, 12), "bias": (3, 12)}},
            "ls1": {"gamma": (3, 4)},
        },
        "norm": {"scale": (4,), "bias": (4,)},
        "local_cls_norm": {"scale": (4,)},
    },
    "dino_head": {
        "fc1": {"kernel": (4, 5), "bias": (5,)},
        "last_layer": {"prototypes": (7, 5)},
    },
    "ibot_head": {"last_layer": {"prototypes": (6, 5)}},
}


def over_shapes(make, shapes):
    return jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))


def abstract_arrays(shapes):
    return over_shapes(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes)


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return over_shapes(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), SHAPES)


def test_rules_of_a_vit():
    abstract = abstract_arrays(SHAPES)
    rules = optim.parameter_rules(abstract, layer_decay=0.5, patch_embed_multiplier=0.2)
    assert rules.keys() == optim.flatten(abstract).keys()
    rates = {path: rule.lr_multiplier for path, rule in rules.items()}
    np.testing.assert_allclose(rates["backbone/cls_token"], 0.5**4)
    np.testing.assert_allclose(rates["backbone/mask_token"], 0.5**4)
    np.testing.assert_allclose(rates["backbone/storage_tokens"], 0.5**4)
    np.testing.assert_allclose(rates["backbone/patch_embed/bias"], 0.2 * 0.5**4)
    np.testing.assert_allclose(rates["backbone/blocks/attn/qkv/kernel"], [0.125, 0.25, 0.5])
    assert rates["backbone/norm/scale"] == rates["dino_head/fc1/kernel"] == 1.0
    decayed = {path for path, rule in rules.items() if rule.decay_multiplier == 1.0}
    assert decayed == {
        "backbone/cls_token",
        "backbone/storage_tokens",
        "backbone/mask_token",
        "backbone/patch_embed/kernel",
        "backbone/blocks/attn/qkv/kernel",
        "dino_head/fc1/kernel",
        "dino_head/last_layer/prototypes",
        "ibot_head/last_layer/prototypes",
    }
    last = {path for path, rule in rules.items() if rule.is_last_layer}
    assert last == {"dino_head/last_layer/prototypes", "ibot_head/last_layer/prototypes"}


def test_rates_of_the_7b():
    """The values that spec 6.1 quotes."""
    shapes = {"cls_token": (1, 4), "patch_embed": {"bias": (4,)}, "blocks": {"ls1": {"g": (40, 4)}}}
    abstract = abstract_arrays(shapes)
    rules = optim.parameter_rules({"backbone": abstract}, 0.98, 0.2)
    assert rules["backbone/cls_token"].lr_multiplier == pytest.approx(0.43679, rel=1e-4)
    assert rules["backbone/patch_embed/bias"].lr_multiplier == pytest.approx(0.087357, rel=1e-4)
    np.testing.assert_allclose(
        rules["backbone/blocks/ls1/g"].lr_multiplier[[0, -1]], [0.4457, 0.98], rtol=1e-4
    )


def test_convnext_decays_its_outer_norms():
    names = {
        "stem": {"conv": {"kernel": (1,), "bias": (1,)}, "norm": {"scale": (1,), "bias": (1,)}},
        "downsample2": {"norm": {"scale": (1,), "bias": (1,)}},
        "stages0": {"norm": {"scale": (2, 1)}, "gamma": (2, 1), "fc1": {"kernel": (2, 1, 1)}},
        "norm": {"scale": (1,)},
    }
    abstract = abstract_arrays(names)
    rules = optim.parameter_rules({"backbone": abstract}, 0.5, 0.2)
    assert all(rule.lr_multiplier == 1.0 for rule in rules.values())
    decayed = {path.removeprefix("backbone/") for path, r in rules.items() if r.decay_multiplier}
    assert decayed == {
        "stem/conv/kernel",
        "stem/norm/scale",
        "downsample2/norm/scale",
        "stages0/fc1/kernel",
    }


def adamw_float64(p, grads, steps, rule, betas, eps):
    """torch.optim.AdamW on one array in float64; steps are (lr, weight decay)."""
    p, m, v = p.astype(np.float64), np.zeros(p.shape), np.zeros(p.shape)
    rate = np.reshape(rule.lr_multiplier, (-1,) + (1,) * (p.ndim - 1))
    for t, (g, (lr, decay)) in enumerate(zip(grads, steps), start=1):
        lr = lr * rate
        p = p * (1 - lr * decay * rule.decay_multiplier)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        p = p - lr * m_hat / (np.sqrt(v_hat) + eps)
    return p


def test_update_is_torch_adamw(params):
    rng = np.random.default_rng(1)
    betas, eps = (0.8, 0.95), 1e-3  # a large eps, so that one inside the root would show
    rules = optim.parameter_rules(params, 0.5, 0.2)
    rates = [dict(lr=0.1, last_layer_lr=0.0, weight_decay=0.3)]
    rates += [dict(lr=0.05, last_layer_lr=0.05, weight_decay=0.5)] * 2
    grads = [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.01, p.dtype), params)
        for _ in rates
    ]
    step = jax.jit(lambda p, g, s, r: optim.update(p, g, s, r, rules, betas, eps))
    new, state = params, optim.init(params)
    for g, r in zip(grads, rates):
        new, state = step(new, g, state, r)
        if r["last_layer_lr"] == 0.0:  # frozen: neither moved nor decayed, moments advanced
            for head in ("dino_head", "ibot_head"):
                frozen = new[head]["last_layer"]["prototypes"]
                np.testing.assert_array_equal(frozen, params[head]["last_layer"]["prototypes"])
                assert np.any(state["mu"][head]["last_layer"]["prototypes"] != 0)
    assert int(state["count"]) == len(rates)
    start, flat = optim.flatten(params), optim.flatten(new)
    for path, rule in rules.items():
        name = "last_layer_lr" if rule.is_last_layer else "lr"
        steps = [(r[name], r["weight_decay"]) for r in rates]
        gs = [np.asarray(optim.flatten(g)[path], np.float64) for g in grads]
        want = adamw_float64(np.asarray(start[path]), gs, steps, rule, betas, eps)
        np.testing.assert_allclose(flat[path], want, atol=2e-6, rtol=1e-6, err_msg=path)


def test_clip_each_network_by_its_own_norm():
    grads = {
        "backbone": {"a": jnp.array([3.0, 0.0]), "b": {"c": jnp.array([[4.0]])}},
        "dino_head": {"a": jnp.array([0.3, 0.4])},
        "ibot_head": {},
    }
    clipped, norms = optim.clip_by_network(grads, max_norm=2.0)
    assert {k: float(v) for k, v in norms.items()} == pytest.approx(
        {"backbone": 5.0, "dino_head": 0.5, "ibot_head": 0.0}
    )
    np.testing.assert_allclose(clipped["backbone"]["a"], [1.2, 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["backbone"]["b"]["c"], [[1.6]], rtol=1e-6)
    np.testing.assert_array_equal(clipped["dino_head"]["a"], grads["dino_head"]["a"])


def test_select_discards_a_non_finite_step():
    new = {"a": jnp.array([jnp.nan, 1.0]), "n": jnp.array(3)}
    old = {"a": jnp.array([0.5, 0.25]), "n": jnp.array(2)}
    kept = optim.select(jnp.array(False), new, old)
    np.testing.assert_array_equal(kept["a"], old["a"])
    assert int(kept["n"]) == 2
    assert int(optim.select(jnp.array(True), new, old)["n"]) == 3


def test_a_parameter_without_a_rule_is_an_error(params):
    rules = optim.parameter_rules(params)
    del rules["backbone/cls_token"]
    scalars = dict(lr=0.1, last_layer_lr=0.1, weight_decay=0.1)
    with pytest.raises(KeyError, match="backbone/cls_token"):
        optim.update(params, params, optim.init(params), scalars, rules)


def test_stacked_blocks_must_agree():
    bad = {"backbone": {"blocks": {"a": np.zeros((2, 3)), "b": np.zeros((3, 3))}}}
    with pytest.raises(ValueError, match="disagree"):
        optim.parameter_rules(bad)
