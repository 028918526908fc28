"""Colour, blur, flip and normalisation of crops, on the device (spec 5).

The host sends crops as uint8; inside the compiled step `views` turns a batch into normalised
float32 crops for `objectives/`. Everything is pure and without branches on data, and each crop's
draws depend on its example's seed and its view's number alone, so neither its row, nor its device,
nor the other crops matter. This is the one file of `data/` that uses jax.

Every operation equals PIL's or torchvision's for the same parameters, except that values stay
float32 between operations where PIL rounds to whole levels after each (clipping is the same).
Images with other than three bands get flip, brightness, contrast (about each band's mean), blur and
normalisation; saturation, hue, grayscale and solarize are defined for RGB and left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8, UInt32
from ml_collections import ConfigDict

Number = int | float
PerKind = tuple[Number, Number, Number]  # first global crop, second global crop, local crops

FLIP, COLOUR = 1, 2  # folded into a crop's key; the flip has its own, for undistorted Gram crops
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
RADIUS = 4  # of the blur: 9 taps whatever the image's size, as in the reference
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, PIL's "L"


@dataclass(frozen=True)
class Photometric:
    """Probabilities and strengths. Defaults are the reference's effective ones (spec 5 and 9.1)."""

    flip: Number = 0.5
    jitter: Number = 0.8
    brightness: Number = 0.4  # factors are uniform in [1 - x, 1 + x]
    contrast: Number = 0.4
    saturation: Number = 0.2
    hue: Number = 0.1  # shift uniform in [-x, x], in turns
    grayscale: Number = 0.2
    blur: PerKind = (0.0, 0.9, 0.5)
    blur_sigma: tuple[Number, Number] = (0.1, 2.0)  # pixels
    solarize: PerKind = (0.0, 0.2, 0.0)
    solarize_threshold: Number = 128
    mean: tuple[Number, ...] = (0.485, 0.456, 0.406)
    std: tuple[Number, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            value = getattr(self, name)
            if any(not 0 <= p <= 1 for p in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"augment.{name}={value}: probabilities lie between 0 and 1.")
        for name in ("brightness", "contrast", "saturation", "hue"):
            if getattr(self, name) < 0:
                raise ValueError(f"augment.{name}={getattr(self, name)} should be at least 0.")
        if self.hue > 0.5:
            raise ValueError(f"augment.hue={self.hue}: a shift is at most 0.5, half a turn.")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(
                f"augment.blur_sigma={self.blur_sigma} should be (low, high), low > 0."
            )
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(f"mean={self.mean} and std={self.std}: one of each per band, std > 0.")


def policy(augment: ConfigDict, data: ConfigDict | None = None) -> Photometric:
    """The policy of a config's sections `augment` and `data` (mean and std); flags make lists."""
    values = {**augment, **({"mean": data.mean, "std": data.std} if data is not None else {})}
    plain = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in values.items()}
    return Photometric(**plain)


class Draws(NamedTuple):
    """What one crop undergoes; all scalars but `order`. The neutral values leave it as it is."""

    flip: Bool[Array, ""]
    order: Int[Array, "4"]  # which of BRIGHTNESS, CONTRAST, SATURATION, HUE comes first, ...
    brightness: Float[Array, ""]  # neutral: 1
    contrast: Float[Array, ""]
    saturation: Float[Array, ""]
    hue: Float[Array, ""]  # in turns; neutral: 0
    grayscale: Bool[Array, ""]
    sigma: Float[Array, ""]  # 0: no blur
    solarize: Bool[Array, ""]


# ---- draws ---------------------------------------------------------------------------------------


def crop_key(seed: UInt32[Array, ""], view: Int[Array, ""] | int) -> PRNGKeyArray:
    """Key of a crop. The generator is named: results must not change with a global jax setting."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), view)


def draw_flip(key: PRNGKeyArray, policy: Photometric) -> Bool[Array, ""]:
    return jax.random.uniform(jax.random.fold_in(key, FLIP)) < policy.flip


def draw(key: PRNGKeyArray, policy: Photometric, view: Int[Array, ""] | int) -> Draws:
    """Everything that happens to the crop of this key; `view` 0 and 1 are the global crops."""
    u = jax.random.uniform(jax.random.fold_in(key, COLOUR), (13,))
    kind = jnp.minimum(view, 2)

    def factor(uniform: Array, strength: Number) -> Array:
        low, high = max(0.0, 1 - strength), 1 + strength
        return jnp.where(u[4] < policy.jitter, low + (high - low) * uniform, 1.0)

    low, high = policy.blur_sigma
    blurred = u[10] < jnp.asarray(policy.blur, jnp.float32)[kind]
    return Draws(
        flip=draw_flip(key, policy),
        order=jnp.argsort(u[:4]),
        brightness=factor(u[5], policy.brightness),
        contrast=factor(u[6], policy.contrast),
        saturation=factor(u[7], policy.saturation),
        hue=jnp.where(u[4] < policy.jitter, policy.hue * (2 * u[8] - 1), 0.0),
        grayscale=u[9] < policy.grayscale,
        sigma=jnp.where(blurred, low + (high - low) * u[11], 0.0),
        solarize=u[12] < jnp.asarray(policy.solarize, jnp.float32)[kind],
    )


# ---- from draws to coefficients ------------------------------------------------------------------


class Coefficients(NamedTuple):
    """Draws as the numbers that multiply pixels; see `jitter` for the six blends."""

    keep: Float[Array, "6"]
    to_grey: Float[Array, "6"]
    to_mean: Float[Array, "6"]
    hue: Float[Array, ""]
    grayscale: Bool[Array, ""]
    taps: Float[Array, "9"]
    solarize: Bool[Array, ""]


def coefficients(draws: Draws, bands: int) -> Coefficients:
    """The coefficients of one crop."""
    saturation = draws.saturation if bands == 3 else jnp.ones(())
    factors = jnp.stack([draws.brightness, draws.contrast, saturation, jnp.ones(())])
    places = jnp.array([0, 1, 2, 1, 2, 3])
    operation = draws.order[places]
    hue_place = jnp.argmax(draws.order == HUE)
    active = jnp.concatenate([places[:3] < hue_place, places[3:] > hue_place])
    keep = jnp.where(active, factors[operation], 1.0)

    taps = jnp.arange(-RADIUS, RADIUS + 1)
    bell = jnp.exp(-0.5 * (taps / jnp.where(draws.sigma > 0, draws.sigma, 1.0)) ** 2)
    sharp = (taps == 0).astype(jnp.float32)
    return Coefficients(
        keep=keep,
        to_grey=jnp.where(operation == SATURATION, 1 - keep, 0.0),
        to_mean=jnp.where(operation == CONTRAST, 1 - keep, 0.0),
        hue=draws.hue,
        grayscale=draws.grayscale,
        taps=jnp.where(draws.sigma > 0, bell / jnp.sum(bell), sharp),
        solarize=draws.solarize,
    )


# ---- operations on one crop, bands first, float32 levels 0..255 ----------------------------------


def luma(planes: Float[Array, "3 i j"]) -> Float[Array, "1 i j"]:
    return sum(weight * planes[n : n + 1] for n, weight in enumerate(LUMA))


def jitter(planes: Float[Array, "c i j"], given: Coefficients) -> Float[Array, "c i j"]:
    """The four colour operations in the drawn order.

    Brightness, contrast and saturation are blends, clip(f x + (1 - f) other), with black, the mean
    of the grey image or the grey image itself for `other`; two scalars choose which. So instead of
    all four operations at all four places, three blends before the hue shift and three after it
    stand ready, of which three are the identity. (On CPU a half to a sixth of the time of
    three blends with a hue shift before, between and behind them.)
    """

    def blend(planes: Array, slot: int) -> Array:
        other = given.to_mean[slot]
        if planes.shape[0] == 3:
            grey = luma(planes)
            other = other * jnp.mean(grey) + given.to_grey[slot] * grey
        else:
            other = other * jnp.mean(planes, axis=(1, 2), keepdims=True)
        return jnp.clip(given.keep[slot] * planes + other, 0.0, 255.0)

    for slot in range(3):
        planes = blend(planes, slot)
    if planes.shape[0] == 3:
        planes = shift_hue(planes, given.hue)
    for slot in range(3, 6):
        planes = blend(planes, slot)
    return planes


def shift_hue(planes: Float[Array, "3 i j"], turns: Float[Array, ""]) -> Float[Array, "3 i j"]:
    """Turn the hue of HSV, keeping saturation and value.

    With value v = max, chroma d = max - min and hue h in sixths of a turn, the band that peaks at
    h = 1 + n is v - d clip(min(k, 4 - k), 0, 1), k = (n + h) mod 6: no table, no six-way branch.
    """
    red, green, blue = planes[0:1], planes[1:2], planes[2:3]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    inverse = 1 / jnp.where(chroma > 0, chroma, 1.0)
    from_green = jnp.where(value == green, 2 + (blue - red) * inverse, 4 + (red - green) * inverse)
    hue = jnp.where(value == red, (green - blue) * inverse, from_green) + 6 * turns
    # Stacking three results instead would keep XLA from vectorising: 7.5 ms where this takes 1.8.
    k = jnp.array([5.0, 3.0, 1.0])[:, None, None] + hue
    k -= 6 * jnp.floor(k / 6)
    return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)


def blur(planes: Float[Array, "c i j"], weights: Float[Array, "9"]) -> Float[Array, "c i j"]:
    """Nine taps along each axis, with reflected borders (also of sides below five pixels)."""
    for axis in (1, 2):
        side = planes.shape[axis]
        borders = [(RADIUS, RADIUS) if n == axis else (0, 0) for n in range(3)]
        # The barrier keeps the padding out of the loop over taps: 3.5 ms instead of 7.8 on CPU.
        wide = jax.lax.optimization_barrier(jnp.pad(planes, borders, mode="reflect"))
        # Shifted copies rather than a convolution: those with a kernel per image are slow on CPU.
        planes = sum(
            weights[tap] * jax.lax.slice_in_dim(wide, tap, tap + side, axis=axis)
            for tap in range(2 * RADIUS + 1)
        )
    return planes


def solarize(
    planes: Float[Array, "3 i j"], chosen: Bool[Array, ""], threshold: Number
) -> Float[Array, "3 i j"]:
    """Invert values that would round to the threshold or more."""
    return jnp.where(chosen & (planes >= threshold - 0.5), 255.0 - planes, planes)


def apply(
    image: UInt8[Array, "i j c"], draws: Draws, policy: Photometric, view: int
) -> Float[Array, "i j c"]:
    """One crop with given draws, as levels 0..255."""
    given = coefficients(draws, image.shape[-1])
    planes = _colour(_planes(image, draws.flip), given, policy)
    return jnp.moveaxis(_soften(planes, given, policy, view), 0, -1)


def _planes(image: UInt8[Array, "i j c"], flip: Bool[Array, ""]) -> Float[Array, "c i j"]:
    return jnp.moveaxis(jnp.where(flip, image[:, ::-1], image), -1, 0).astype(jnp.float32)


def _colour(
    planes: Float[Array, "c i j"], given: Coefficients, policy: Photometric
) -> Float[Array, "c i j"]:
    """Jitter and grayscale, the same for views of every kind; what never happens is left out."""
    if policy.jitter > 0:
        planes = jitter(planes, given)
    if policy.grayscale > 0 and planes.shape[0] == 3:
        planes = jnp.where(given.grayscale, luma(planes), planes)
    return planes


def _soften(
    planes: Float[Array, "c i j"], given: Coefficients, policy: Photometric, view: int
) -> Float[Array, "c i j"]:
    """Blur and solarize, whose probabilities depend on the view."""
    if policy.blur[min(view, 2)] > 0:
        planes = blur(planes, given.taps)
    if policy.solarize[min(view, 2)] > 0 and planes.shape[0] == 3:
        planes = solarize(planes, given.solarize, policy.solarize_threshold)
    return planes


# ---- crops of a batch ----------------------------------------------------------------------------


def distort(
    crops: UInt8[Array, "b v i j c"], seeds: UInt32[Array, " b"], policy: Photometric, first: int
) -> Float[Array, "b v c i j"]:
    """Levels 0..255 of the crops, bands first. `first` is the number of the first view: 0 or 2."""
    numbers = jnp.arange(first, first + crops.shape[1])

    def prepare(seed: Array, view: Array) -> tuple[Array, Coefficients]:
        draws = draw(crop_key(seed, view), policy, view)
        return draws.flip, coefficients(draws, crops.shape[-1])

    drawn = jax.vmap(jax.vmap(prepare, in_axes=(None, 0)), in_axes=(0, None))(seeds, numbers)
    # The barrier keeps XLA from computing the draws anew for every pixel.
    flip, given = jax.lax.optimization_barrier(drawn)

    def colour(image: Array, flip: Array, given: Coefficients) -> Array:
        return _colour(_planes(image, flip), given, policy)

    planes = jax.vmap(jax.vmap(colour))(crops, flip, given)
    # Each global view has its own last steps, and the first one usually none; locals share theirs.
    last = first + crops.shape[1]
    starts = [first, *(view for view in (1, 2) if first < view < last)]
    parts = []
    for start, end in zip(starts, [*starts[1:], last], strict=True):
        part = jax.tree.map(lambda x, a=start - first, z=end - first: x[:, a:z], (planes, given))
        soften = jax.vmap(jax.vmap(lambda x, g, view=start: _soften(x, g, policy, view)))
        parts.append(soften(*part))
    return jnp.concatenate(parts, axis=1)


def normalise(planes: Float[Array, "b v c i j"], policy: Photometric) -> Float[Array, "b v i j c"]:
    """Levels 0..255, bands first -> (level / 255 - mean) / std, bands last."""
    if planes.shape[2] != len(policy.mean):
        raise ValueError(
            f"the images have {planes.shape[2]} bands, data.mean and data.std {len(policy.mean)}."
        )
    mean, std = (jnp.asarray(x, jnp.float32)[:, None, None] for x in (policy.mean, policy.std))
    mean, std = mean[None, None], std[None, None]
    return jnp.moveaxis(planes * (1 / (255 * std)) - mean / std, 2, -1)


def augment(
    crops: UInt8[Array, "b v i j c"], seeds: UInt32[Array, " b"], policy: Photometric, first: int
) -> Float[Array, "b v i j c"]:
    """Distorted, normalised crops; `first` is 0 for global crops and 2 for local ones."""
    return normalise(distort(crops, seeds, policy, first), policy)


def plain(
    crops: UInt8[Array, "b v i j c"], seeds: UInt32[Array, " b"], policy: Photometric
) -> Float[Array, "b v i j c"]:
    """Crops only flipped, exactly as the global crops of the same numbers, and normalised."""
    numbers = jnp.arange(crops.shape[1])

    def flipped(image: Array, seed: Array, view: Array) -> Array:
        return _planes(image, draw_flip(crop_key(seed, view), policy))

    over_views = jax.vmap(flipped, in_axes=(0, None, 0))
    return normalise(jax.vmap(over_views, in_axes=(0, 0, None))(crops, seeds, numbers), policy)


def shrink(planes: Float[Array, "b v c i j"], side: int) -> Float[Array, "b v c _ _"]:
    """Levels resized to side x side as PIL's bicubic does (a = -0.5, antialiased, clipped)."""
    shape = (*planes.shape[:3], side, side)
    return jnp.clip(jax.image.resize(planes, shape, "cubic", antialias=True), 0.0, 255.0)


def views(
    batch: Mapping[str, Array],
    policy: Photometric,
    gram_undistorted: bool = True,
    global_size: int = 0,
) -> dict[str, Float[Array, "b v _ _ c"]]:
    """What the networks see: "global", "local" and, where the batch has Gram crops, "gram".

    Gram crops are plain (only flipped) or, with `gram_undistorted` off, distorted; then the batch
    holds no global crops and they are made of the Gram crops, after colour, at `global_size`.
    """
    seeds = batch["seeds"]
    local = augment(batch["local_crops"], seeds, policy, first=2)
    if "gram_crops" not in batch:
        return {"global": augment(batch["global_crops"], seeds, policy, first=0), "local": local}
    if gram_undistorted:
        large = augment(batch["global_crops"], seeds, policy, first=0)
        return {"global": large, "local": local, "gram": plain(batch["gram_crops"], seeds, policy)}
    if global_size < 1:
        raise ValueError("distorted Gram crops: `global_size` is needed to make the global crops.")
    levels = distort(batch["gram_crops"], seeds, policy, first=0)
    large = normalise(shrink(levels, global_size), policy)
    return {"global": large, "local": local, "gram": normalise(levels, policy)}
