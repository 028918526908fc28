"""The ViT's structure: sizes, scan, rematerialisation, groups, sizes of images, errors.

Its values are held to the reference in tests/conformance/test_vit.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dinojax.models import vit
from dinojax.sharding import batch_sharding, make_mesh

TINY = {"width": 16, "depth": 3, "heads": 2, "ffn": "mlp", "ffn_ratio": 2.0, "patch_size": 4}
TRAIN = TINY | {
    "storage_tokens": 1,
    "drop_path": 0.5,
    "rope_rescale": 2.0,
    "rope_shift": 0.2,
    "mask_k_bias": True,
    "layerscale": 0.5,
    "untie_global_and_local_cls_norm": True,
}

# Spec 1.1, with four storage tokens; large without for the ImageNet-1k recipe.
COUNTS = {
    "small": 21_601_152,
    "splus": 28_697_472,
    "base": 85_669_632,
    "large": 303_154_176,
    "lplus": 403_915_776,
    "so400m": 415_411_200,
    "huge2": 630_754_560,
    "hplus": 840_633_600,
    "7b": 6_716_043_264,
}


@functools.cache
def parameters():
    """Of TRAIN, everything far from its initial value."""
    params = vit.build(TRAIN).init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda a: a + 0.2 * jax.random.normal(next(keys), a.shape), params)


def batch(images=4):
    """Two 8-pixel crops of every image with masks, three of 4 pixels; image-major."""
    keys = jax.random.split(jax.random.key(2), 3)
    crops = (
        jax.random.normal(keys[0], (images * 2, 8, 8, 3)),
        jax.random.normal(keys[1], (images * 3, 4, 4, 3)),
    )
    return crops, (jax.random.bernoulli(keys[2], 0.4, (images * 2, 4)), None)


def gradients(config):
    """Loss and gradients of a training pass over two groups of two images."""
    network = vit.build(config)
    crops, masks = batch()

    def loss(params):
        features = network.apply(params, crops, masks, jnp.arange(2), jax.random.key(3))
        return sum(jnp.sin(f.cls).sum() + jnp.cos(f.patches).sum() for f in features)

    return jax.jit(jax.value_and_grad(loss))(parameters())


@functools.cache
def scanned():
    return gradients(TRAIN)


def assert_trees_close(actual, expected, rtol=1e-5):
    """Relative L2 per array."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        error = float(jnp.linalg.norm(a - b)) / max(float(jnp.linalg.norm(b)), 1e-6)
        assert error < rtol, f"{jax.tree_util.keystr(path)}: {error:.1e}"


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    config = {"variant": name, "storage_tokens": 4}
    if name == "7b":
        config |= {"qkv_bias": False, "untie_global_and_local_cls_norm": True}
    shapes = jax.eval_shape(vit.build(config).init, jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(shapes)) == COUNTS[name]
    assert {a.dtype for a in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_parameter_paths():
    """An interface: rules, masks, converters and checkpoints match on them."""
    config = TRAIN | {"ffn": "swiglu", "untie_cls_and_patch_norms": True}
    shapes = jax.eval_shape(vit.build(config).init, jax.random.key(0))
    found = {
        "/".join(k.key for k in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    norms = ("norm", "cls_norm", "local_cls_norm")
    assert found == {
        "cls_token": (1, 16),
        "storage_tokens": (1, 16),
        "mask_token": (1, 16),
        "patch_embed/kernel": (4, 4, 3, 16),
        "patch_embed/bias": (16,),
        "blocks/attn/qkv/kernel": (3, 16, 48),
        "blocks/attn/qkv/bias": (3, 48),
        "blocks/attn/proj/kernel": (3, 16, 16),
        "blocks/attn/proj/bias": (3, 16),
        **{f"blocks/ffn/{w}/kernel": (3, 16, 24) for w in ("w1", "w2")},
        **{f"blocks/ffn/{w}/bias": (3, 24) for w in ("w1", "w2")},
        "blocks/ffn/w3/kernel": (3, 24, 16),
        "blocks/ffn/w3/bias": (3, 16),
        **{f"blocks/{ls}/gamma": (3, 16) for ls in ("ls1", "ls2")},
        **{f"blocks/{n}/{p}": (3, 16) for n in ("norm1", "norm2") for p in ("scale", "bias")},
        **{f"{n}/{p}": (16,) for n in norms for p in ("scale", "bias")},
    }


def test_layers_start_different():
    kernel = vit.build(TINY).init(jax.random.key(0))["blocks"]["attn"]["qkv"]["kernel"]
    assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0.01


@pytest.mark.parametrize(
    "change",
    [{"scan": False}, {"remat": "full"}, {"remat": "dots"}, {"remat": "dots_no_batch"}],
    ids=str,
)
def test_same_gradients_however_computed(change):
    loss, grads = gradients(TRAIN | change)
    np.testing.assert_allclose(loss, scanned()[0], rtol=1e-5)
    assert_trees_close(grads, scanned()[1])


def test_every_parameter_is_trained_except_the_k_bias():
    grads = scanned()[1]
    bias = np.asarray(grads["blocks"]["attn"]["qkv"]["bias"]).reshape(3, 3, 16)
    assert not bias[:, 1].any() and bias[:, 0].any() and bias[:, 2].any()
    assert all(np.abs(np.asarray(g)).max() > 1e-4 for g in jax.tree.leaves(grads))


def test_groups_are_independent_of_their_company():
    """A micro-batch of one group gives what the group gives within the whole batch."""
    apply = jax.jit(vit.build(TRAIN).apply)
    crops, masks = batch()
    key = jax.random.key(3)
    whole = apply(parameters(), crops, masks, jnp.array([7, 4]), key)
    half = tuple(x[len(x) // 2 :] for x in crops), (masks[0][4:], None)
    alone = apply(parameters(), *half, jnp.array([4]), key)
    other = apply(parameters(), *half, jnp.array([5]), key)
    for a, b, c in zip(alone, whole, other, strict=True):
        np.testing.assert_allclose(a.prenorm, b.prenorm[len(b.cls) // 2 :], atol=1e-5)
        assert float(jnp.abs(a.prenorm - c.prenorm).max()) > 1e-2


def test_draws_differ_between_blocks_entries_and_keys():
    """Same pixels in both entries, one block: its draw differs by entry and by key."""
    config = TRAIN | {"untie_global_and_local_cls_norm": False}
    params = {k: v for k, v in parameters().items() if k != "local_cls_norm"}
    crops = (batch()[0][0],) * 2
    apply = jax.jit(vit.build(config).apply)
    first, second = apply(params, crops, key=jax.random.key(0))
    again = apply(params, crops, key=jax.random.key(0))[0]
    other = apply(params, crops, key=jax.random.key(1))[0]
    still = apply(params, crops)
    np.testing.assert_array_equal(first.cls, again.cls)
    np.testing.assert_allclose(still[0].cls, still[1].cls, atol=1e-6)
    for features in (second, other, still[0]):
        assert float(jnp.abs(first.cls - features.cls).max()) > 1e-2


def test_one_and_eight_devices():
    """Groups on eight devices with FSDP-sharded parameters: same features."""
    network, mesh = vit.build(TRAIN), make_mesh(data=4, fsdp=2)
    crops, masks = batch(images=8)
    args = (crops, masks, jnp.arange(8), jax.random.key(3))
    expected = jax.jit(network.apply)(parameters(), *args)

    def place(a):
        axis = a.ndim - 1 if a.shape[-1] % 2 == 0 else None
        spec = [None] * a.ndim
        if axis is not None:
            spec[axis] = "fsdp"
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))

    rows = jax.device_put(args[:3], batch_sharding(mesh))
    found = jax.jit(network.apply)(jax.tree.map(place, parameters()), *rows, args[3])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_bfloat16_stays_close():
    """Relative L2 of the features, measured 7e-3."""
    crops, masks = batch()
    exact = jax.jit(vit.build(TRAIN).apply)(parameters(), crops, masks)
    half = jax.jit(vit.build(TRAIN | {"dtype": "bfloat16"}).apply)(parameters(), crops, masks)
    for a, b in zip(half, exact, strict=True):
        assert a.cls.dtype == a.prenorm.dtype == jnp.bfloat16
        error = jnp.linalg.norm(a.patches - b.patches) / jnp.linalg.norm(b.patches)
        assert error < 2e-2


def test_masked_pixels_do_not_matter():
    network = vit.build(TRAIN)
    (images, _), _ = batch()
    masks = jnp.zeros((8, 4), bool).at[:, 1].set(True)  # top right patch
    changed = images.at[:, :4, 4:].add(1.0)
    (a,), (b,) = (network.apply(parameters(), (x,), (masks,)) for x in (images, changed))
    np.testing.assert_array_equal(a.prenorm, b.prenorm)


def test_local_norm_is_used_for_training_crops_of_entry_1_only():
    network = vit.build(TRAIN | {"drop_path": 0.0, "rope_rescale": None, "rope_shift": None})
    other = parameters() | {"local_cls_norm": jax.tree.map(lambda a: a + 1, parameters()["norm"])}
    crops, _ = batch()
    apply = jax.jit(network.apply)
    for key, changes in ((None, (False, False)), (jax.random.key(0), (False, True))):
        pair = [apply(p, crops, key=key) for p in (parameters(), other)]
        for a, b, differs in zip(*pair, changes, strict=True):
            assert bool(jnp.abs(a.cls - b.cls).max() > 0.1) == differs
            assert bool(jnp.abs(a.storage - b.storage).max() > 0.1) == differs
            np.testing.assert_array_equal(a.patches, b.patches)


def test_intermediate_layers_agree_with_the_forward_pass():
    network = vit.build(TRAIN)
    (images, _), _ = batch()
    (full,) = network.apply(parameters(), (images,))
    apply = functools.partial(network.apply, parameters(), images, method="intermediate")
    first, last = apply(layers=(0, 2))
    np.testing.assert_allclose(last.patches, full.patches, atol=1e-5)
    np.testing.assert_allclose(apply(layers=3)[0].cls, first.cls, atol=1e-5)
    (raw,) = apply(layers=(-1,), norm=False)
    np.testing.assert_allclose(raw.storage, full.prenorm[:, 1:2], atol=1e-5)


def test_image_sizes():
    """Any sides; a padded image's features ignore what lies in patches that are mostly padding."""
    image = jax.random.normal(jax.random.key(0), (1, 13, 10, 3))

    def features(policy, x):
        return vit.build(TRAIN | {"size_policy": policy}).apply(parameters(), (x,))[0]

    floor, resize, pad = (features(p, image) for p in ("floor", "resize", "pad"))
    np.testing.assert_allclose(floor.cls, features("floor", image[:, :12, :8]).cls, atol=1e-5)
    assert floor.patches.shape[1] == 3 * 2 and resize.patches.shape[1] == 3 * 2
    assert pad.patches.shape[1] == 4 * 3
    # Row 3 holds one real pixel row of 4, column 2 two of 4: the row is padding, the column real.
    real = np.repeat([True, False], [9, 3])
    assert (np.asarray(jnp.abs(pad.patches[0]).max(-1) > 0) == real).all()
    changed = features("pad", image.at[:, 12:].add(1.0))
    np.testing.assert_allclose(changed.cls, pad.cls, atol=1e-5)
    assert float(jnp.abs(features("pad", image.at[:, :, 9:].add(1.0)).cls - pad.cls).max()) > 1e-3


def test_other_channels():
    network = vit.build(TINY | {"in_channels": 5})
    params = network.init(jax.random.key(0))
    assert network.apply(params, (jnp.ones((2, 8, 8, 5)),))[0].cls.shape == (2, 16)
    with pytest.raises(ValueError, match="3 channels; expected 5"):
        network.apply(params, (jnp.ones((2, 8, 8, 3)),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "huge"}, "'huge'; expected one of tiny, small"),
        ({"with": 3}, "'with' is unknown; the nearest is 'width'"),
        ({"width": 30}, "30 is not a multiple of 4 x 2 heads"),
        ({"remat": "some"}, "remat is 'some'; expected one of none, full"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected one of float32, bfloat16"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"rope_base": 0.0}, "either rope_base or both"),
    ],
    ids=str,
)
def test_errors_are_sentences(change, message):
    with pytest.raises(ValueError, match=message):
        vit.build(TINY | change)


def test_rows_must_divide_into_groups():
    with pytest.raises(
        ValueError, match=r"\[8, 12\] rows of the crops do not divide into 3 groups"
    ):
        crops, masks = batch()
        vit.build(TRAIN).apply(parameters(), crops, masks, jnp.arange(3), jax.random.key(0))
