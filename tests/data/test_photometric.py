"""Photometrics: every operation as PIL or torchvision define it, every probability as drawn."""

import colorsys
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageOps

from dinojax.data import photometric
from dinojax.data.photometric import Draws, Photometric

POLICY = Photometric()
MEAN, STD = np.array(POLICY.mean), np.array(POLICY.std)
LUMA = np.array([0.299, 0.587, 0.114])


def neutral(**changes):
    given = {
        "flip": False,
        "order": (0, 1, 2, 3),
        "brightness": 1.0,
        "contrast": 1.0,
        "saturation": 1.0,
        "hue": 0.0,
        "grayscale": False,
        "sigma": 0.0,
        "solarize": False,
    } | changes
    types = {"flip": bool, "grayscale": bool, "solarize": bool, "order": np.int32}
    return Draws(**{k: np.asarray(v, types.get(k, np.float32)) for k, v in given.items()})


@pytest.fixture(scope="module")
def picture():
    """Every colour, dark to light: smooth ramps with noise, 24 x 20."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:24, :20]
    ramps = np.stack([9 * y + 2 * x, 220 - 8 * x, 60 + 5 * x + 3 * y], -1)
    return np.clip(ramps + rng.integers(-40, 41, ramps.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def apply():
    """`apply` with the second global view's steps (all of them), compiled once."""
    compiled = jax.jit(lambda image, draws: photometric.apply(image, draws, POLICY, 1))
    return lambda image, **changes: np.asarray(compiled(image, neutral(**changes)))


# --- one operation at a time ---------------------------------------------------------------------


def test_neutral_draws_change_nothing(apply, picture):
    np.testing.assert_allclose(apply(picture), picture, atol=1e-3)


@pytest.mark.parametrize("factor", [0.6, 0.87, 1.0, 1.25, 1.4])
@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_blends_are_pils_within_a_level(apply, picture, name, enhance, factor):
    """PIL cuts off fractions (and rounds the grey image and its mean), hence the level."""
    expected = np.asarray(enhance(Image.fromarray(picture)).enhance(factor), np.float64)
    found = apply(picture, **{name: factor})
    assert np.abs(found - expected).max() <= 1.3
    assert np.abs(found - expected).mean() < 0.7


@pytest.mark.parametrize("steps", [-25, -8, 13, 25])
def test_hue_turns_hsv(apply, picture, steps):
    found = apply(picture, hue=steps / 255)
    np.testing.assert_allclose(found, _turn_hue(picture, steps / 255), atol=0.01)
    # torchvision's way, in PIL's 8-bit HSV, where one step of hue is up to 6 levels of a band.
    hue, *rest = Image.fromarray(picture).convert("HSV").split()
    moved = (np.asarray(hue, np.int32) + steps).astype(np.uint8)
    pil = Image.merge("HSV", (Image.fromarray(moved), *rest)).convert("RGB")
    difference = np.abs(found - np.asarray(pil, np.float64))
    assert difference.mean() < 1.0
    assert difference.max() < 6.0


def test_hue_of_greys_stays(apply):
    grey = np.repeat(np.arange(24 * 20, dtype=np.uint8).reshape(24, 20, 1), 3, -1)
    np.testing.assert_allclose(apply(grey, hue=0.1), grey, atol=1e-3)


def test_grayscale(apply, picture):
    expected = np.asarray(Image.fromarray(picture).convert("L"), np.float64)[..., None]
    found = apply(picture, grayscale=True)
    assert np.abs(found - expected).max() <= 0.51
    np.testing.assert_array_equal(found, found[..., :1].repeat(3, -1))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.2, 2.0])
def test_blur(apply, picture, sigma):
    np.testing.assert_allclose(apply(picture, sigma=sigma), _blur(picture, sigma), atol=1e-3)


def test_solarize(apply, picture):
    expected = ImageOps.solarize(Image.fromarray(picture), threshold=128)
    np.testing.assert_allclose(apply(picture, solarize=True), np.asarray(expected), atol=1e-3)


def test_flip_is_horizontal(apply, picture):
    np.testing.assert_allclose(apply(picture, flip=True), picture[:, ::-1], atol=1e-3)


def test_all_orders_of_the_jitter(apply, picture):
    """Factors that clip, so that no two operations commute by chance."""
    strengths = {"brightness": 1.4, "contrast": 1.35, "saturation": 1.2, "hue": 0.09}
    steps = (
        lambda x: np.clip(1.4 * x, 0, 255),
        lambda x: np.clip(1.35 * x - 0.35 * (x @ LUMA).mean(), 0, 255),
        lambda x: np.clip(1.2 * x - 0.2 * (x @ LUMA)[..., None], 0, 255),
        lambda x: _turn_hue(x, 0.09),
    )
    results = []
    for order in permutations(range(4)):
        expected = picture.astype(np.float64)
        for step in order:
            expected = steps[step](expected)
        found = apply(picture, order=order, **strengths)
        np.testing.assert_allclose(found, expected, atol=0.01)
        results.append(found)
    assert len(np.unique(np.round(results, 1), axis=0)) == 24


def test_steps_follow_one_another(apply, picture):
    """Jitter, then grayscale, then blur, then solarize."""
    found = apply(picture, brightness=1.3, grayscale=True, sigma=1.0, solarize=True, flip=True)
    expected = np.clip(1.3 * picture[:, ::-1].astype(np.float64), 0, 255)
    expected = _blur((expected @ LUMA)[..., None].repeat(3, -1), 1.0)
    expected = np.where(expected >= 127.5, 255 - expected, expected)
    close = np.abs(found - expected) < 0.01
    assert close.mean() > 0.995  # a value within rounding error of the threshold may go either way


# --- draws ---------------------------------------------------------------------------------------

COUNT = 20_000


@pytest.fixture(scope="module")
def drawn():
    """Draws of 20,000 seeds for views 0, 1, 2 and 5: each field [4, count]."""
    seeds = np.arange(COUNT, dtype=np.uint32) * np.uint32(214_013) + np.uint32(7)

    def one(seed, view):
        return photometric.draw(photometric.crop_key(seed, view), POLICY, view)

    over_seeds = jax.vmap(one, in_axes=(0, None))
    views = jnp.array([0, 1, 2, 5])
    drawn = jax.jit(jax.vmap(over_seeds, in_axes=(None, 0)))(seeds, views)
    return jax.tree.map(np.asarray, drawn)


def test_probabilities(drawn):
    """Effective probabilities per view, within five standard errors."""
    expected = {
        "flip": (drawn.flip, (0.5, 0.5, 0.5, 0.5)),
        "jitter": (drawn.brightness != 1.0, (0.8, 0.8, 0.8, 0.8)),
        "grayscale": (drawn.grayscale, (0.2, 0.2, 0.2, 0.2)),
        "blur": (drawn.sigma > 0, (0.0, 0.9, 0.5, 0.5)),
        "solarize": (drawn.solarize, (0.0, 0.2, 0.0, 0.0)),
    }
    for name, (happened, probabilities) in expected.items():
        for view, probability in enumerate(probabilities):
            error = np.sqrt(probability * (1 - probability) / COUNT)
            assert abs(happened[view].mean() - probability) <= 5 * error, (name, view)


def test_strengths_are_uniform(drawn):
    jittered = drawn.brightness[2] != 1.0
    ranges = {
        "brightness": (0.6, 1.4),
        "contrast": (0.6, 1.4),
        "saturation": (0.8, 1.2),
        "hue": (-0.1, 0.1),
    }
    columns = {name: (getattr(drawn, name)[2][jittered], ends) for name, ends in ranges.items()}
    columns["sigma"] = (drawn.sigma[1][drawn.sigma[1] > 0], (0.1, 2.0))
    for name, (values, (low, high)) in columns.items():
        assert low <= values.min() + 1e-6 and values.max() <= high + 1e-6, name
        counts, _ = np.histogram(values, 10, (low, high))
        assert np.abs(counts / len(values) - 0.1).max() < 0.015, name


def test_orders_are_equally_likely(drawn):
    codes = drawn.order[0] @ np.array([64, 16, 4, 1])
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == 24
    assert np.abs(counts / COUNT * 24 - 1).max() < 0.2
    np.testing.assert_array_equal(np.sort(drawn.order[0], -1)[:5], [[0, 1, 2, 3]] * 5)


def test_draws_are_independent(drawn):
    """Neither views of an example nor the fields of a crop go together."""
    assert abs(np.corrcoef(drawn.flip[0], drawn.flip[1])[0, 1]) < 0.03
    assert abs(np.corrcoef(drawn.brightness[0], drawn.brightness[1])[0, 1]) < 0.03
    fields = [drawn.flip[1], drawn.contrast[1], drawn.hue[1], drawn.grayscale[1], drawn.sigma[1]]
    table = np.corrcoef(np.stack([*fields, drawn.solarize[1], drawn.order[1][:, 0]]))
    assert np.abs(table - np.eye(7)).max() < 0.03


# --- batches -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    seeds = rng.integers(2**32, size=8, dtype=np.uint32)
    crops = {
        name: jnp.asarray(rng.integers(256, size=(8, count, 24, 20, 3), dtype=np.uint8))
        for name, count in (("global_crops", 2), ("local_crops", 3))
    }
    return crops | {"seeds": jnp.asarray(seeds)}


@pytest.fixture(scope="module")
def views():
    return jax.jit(lambda batch: photometric.views(batch, POLICY))


def test_views_are_the_single_crops_normalised(batch, views, apply):
    found = views(batch)
    draw = jax.jit(lambda seed, v: photometric.draw(photometric.crop_key(seed, v), POLICY, v))
    for name, first in (("global", 0), ("local", 2)):
        crops = batch[f"{name}_crops"]
        assert found[name].shape == crops.shape and found[name].dtype == jnp.float32
        for row, view in ((0, 0), (3, 1)):
            draws = draw(batch["seeds"][row], first + view)
            levels = apply(np.asarray(crops[row, view]), **draws._asdict())
            expected = (levels / 255.0 - MEAN) / STD
            close = np.abs(found[name][row, view] - expected) < 1e-4
            assert close.mean() > 0.98  # solarize at the threshold


def test_rows_do_not_matter(batch, views):
    order = np.array([5, 0, 7, 1, 6, 2, 4, 3])
    found, moved = views(batch), views({name: x[order] for name, x in batch.items()})
    for name in found:
        np.testing.assert_array_equal(found[name][order], moved[name])


def test_shards_keep_to_themselves(batch, views):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    whole, sharded = views(batch), views(split)
    for name in whole:
        np.testing.assert_allclose(whole[name], sharded[name], atol=1e-4)
        assert sharded[name].sharding.spec[0] == "data"
    program = views.lower(split).compile().as_text()
    assert not [x for x in ("all-gather", "all-to-all", "all-reduce", "permute(") if x in program]


def test_undistorted_gram_crops_share_the_flip(batch):
    """One picture as global and as Gram crop: the same side up, and nothing else done to it."""
    only_flip = Photometric(jitter=0, grayscale=0, blur=(0, 0, 0), solarize=(0, 0, 0))
    given = batch | {"gram_crops": batch["global_crops"]}
    found = jax.jit(lambda batch: photometric.views(batch, only_flip))(given)
    np.testing.assert_array_equal(found["gram"], found["global"])
    again = jax.jit(lambda *args: photometric.plain(*args, POLICY))(
        batch["global_crops"], batch["seeds"]
    )
    np.testing.assert_array_equal(again, found["gram"])
    pixels, sent = np.asarray(found["gram"]) * STD + MEAN, np.asarray(batch["global_crops"])
    as_sent = np.abs(pixels * 255 - sent).max((2, 3, 4)) < 0.01
    turned = np.abs(pixels * 255 - sent[:, :, :, ::-1]).max((2, 3, 4)) < 0.01
    assert (as_sent ^ turned).all() and as_sent.any() and turned.any()


def test_global_crops_made_of_distorted_gram_crops(batch):
    """The global crop is the distorted Gram crop, resized as PIL does, within a level."""
    given = {"local_crops": batch["local_crops"], "seeds": batch["seeds"]}
    rng = np.random.default_rng(2)
    smooth = np.cumsum(rng.integers(-20, 21, (8, 2, 24, 24, 3)), axis=3) + 128
    given["gram_crops"] = jnp.asarray(np.clip(smooth, 0, 255).astype(np.uint8))
    strong = Photometric(grayscale=0.5)
    found = jax.jit(lambda batch: photometric.views(batch, strong, False, 16))(given)
    assert found["gram"].shape == (8, 2, 24, 24, 3) and found["global"].shape == (8, 2, 16, 16, 3)
    levels = [255 * (np.asarray(found[name]) * STD + MEAN) for name in ("gram", "global")]
    for row, view in np.ndindex(8, 2):
        large = Image.fromarray(np.rint(levels[0][row, view]).astype(np.uint8))
        small = np.asarray(large.resize((16, 16), Image.Resampling.BICUBIC), np.float64)
        assert np.abs(levels[1][row, view] - small).max() <= 1.5
    with pytest.raises(ValueError, match="global_size"):
        jax.eval_shape(lambda batch: photometric.views(batch, strong, False), given)


# --- other bands, sizes and policies -------------------------------------------------------------


@pytest.mark.parametrize("bands", [1, 5])
def test_other_bands(bands):
    """Contrast pulls each band towards its own mean; saturation, hue and grey do nothing."""
    image = np.random.default_rng(3).integers(256, size=(8, 8, bands), dtype=np.uint8)
    draws = neutral(
        brightness=0.9,
        contrast=0.7,
        saturation=0.8,
        hue=0.1,
        grayscale=True,
        solarize=True,
        sigma=0.8,
    )
    found = photometric.apply(jnp.asarray(image), jax.tree.map(jnp.asarray, draws), POLICY, 1)
    bright = 0.9 * image.astype(np.float64)
    np.testing.assert_allclose(
        found, _blur(0.7 * bright + 0.3 * bright.mean((0, 1)), 0.8), atol=1e-2
    )


@pytest.mark.parametrize("side", [2, 3, 5])
def test_crops_smaller_than_the_kernel(side):
    image = np.random.default_rng(4).integers(256, size=(side, side, 3)).astype(np.float32)
    draws = jax.tree.map(jnp.asarray, neutral(sigma=1.5))
    weights = photometric.coefficients(draws, 3).taps
    found = photometric.blur(jnp.moveaxis(jnp.asarray(image), -1, 0), weights)
    np.testing.assert_allclose(jnp.moveaxis(found, 0, -1), _blur(image, 1.5), atol=1e-3)


def test_a_policy_without_anything_only_normalises(batch):
    nothing = Photometric(flip=0, jitter=0, grayscale=0, blur=(0, 0, 0), solarize=(0, 0, 0))
    augment = jax.jit(lambda *args: photometric.augment(*args, nothing, 2))
    found = augment(batch["local_crops"], batch["seeds"])
    expected = (np.asarray(batch["local_crops"]) / 255.0 - MEAN) / STD
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"blur": (0.0, 1.5, 0.5)}, "blur"),
        ({"flip": -0.1}, "flip"),
        ({"hue": 0.7}, "hue"),
        ({"contrast": -1.0}, "contrast"),
        ({"blur_sigma": (0.0, 2.0)}, "blur_sigma"),
        ({"mean": (0.5,)}, "mean"),
    ],
)
def test_impossible_policies_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        Photometric(**wrong)


def test_bands_without_statistics_are_named(batch):
    with pytest.raises(ValueError, match="5 bands"):
        crops = jnp.zeros((8, 1, 4, 4, 5), jnp.uint8)
        jax.eval_shape(lambda *x: photometric.augment(*x, POLICY, 2), crops, batch["seeds"])


# --- the same in numpy, float64 ------------------------------------------------------------------


def _blur(image, sigma):
    """torchvision's definition: nine taps, normalised, reflected borders."""
    taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    taps /= taps.sum()
    out = np.asarray(image, np.float64)
    for axis in (0, 1):
        wide = np.pad(out, [(4, 4) if a == axis else (0, 0) for a in range(3)], mode="reflect")
        out = sum(taps[t] * np.take(wide, range(t, t + out.shape[axis]), axis) for t in range(9))
    return out


def _turn_hue(image, turns):
    out = np.empty(image.shape)
    for place in np.ndindex(image.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(image[place] / 255.0).tolist())
        out[place] = colorsys.hsv_to_rgb((h + turns) % 1.0, s, v)
    return 255 * out
