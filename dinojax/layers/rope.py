"""Axial rotary position embedding with box jittering (spec 1.4), as pure functions.

    coordinates -> augment(draw(key)) -> tables -> apply

Angles are float32: the reference trains with bfloat16 tables, whose cosine is off by up to 0.03.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key


class Augmentation(NamedTuple):
    """c -> (c + shift) * jitter * rescale; (height, width) entries and one rescale for both."""

    shift: Float[Array, "*g 2"]
    jitter: Float[Array, "*g 2"]
    rescale: Float[Array, "*g 1"]


class Tables(NamedTuple):
    """Sines and cosines of the tokens' angles; g = 1 where all rows share them."""

    sin: Float[Array, "g t e"]
    cos: Float[Array, "g t e"]


def periods_from_base(base: float, head_dim: int) -> Float[Array, " q"]:
    """T_j = base^(j/q), j = 0..q-1, q = head_dim / 4."""
    q = head_dim // 4
    return jnp.asarray(base, jnp.float32) ** (jnp.arange(q, dtype=jnp.float32) / q)


def periods_from_range(shortest: float, longest: float, head_dim: int) -> Float[Array, " q"]:
    """Geometric from `shortest` to `longest`, both included, q = head_dim / 4 of them."""
    exponent = jnp.linspace(0.0, 1.0, head_dim // 4, dtype=jnp.float32)
    return shortest * jnp.asarray(longest / shortest, jnp.float32) ** exponent


def make_periods(
    head_dim: int,
    base: float | None,
    shortest: float | None,
    longest: float | None,
    bf16: bool = False,
) -> Float[Array, " q"]:
    """The periods a config asks for: exactly one of `base` or (`shortest` and `longest`).

    `bf16` rounds them as they are stored in the published checkpoints.
    """
    if (base is None) == (shortest is None or longest is None) or (
        base is not None and (shortest is not None or longest is not None)
    ):
        raise ValueError(
            "RoPE needs either rope_base or both rope_min_period and rope_max_period, got "
            f"rope_base={base}, rope_min_period={shortest}, rope_max_period={longest}"
        )
    if base is not None:
        periods = periods_from_base(base, head_dim)
    else:
        periods = periods_from_range(shortest, longest, head_dim)
    return periods.astype(jnp.bfloat16).astype(jnp.float32) if bf16 else periods


def coordinates(
    height: int, width: int, normalize: str = "separate", dtype: DTypeLike = jnp.float32
) -> Float[Array, "p 2"]:
    """Patch centres as (h, w), row-major, in [-1, 1] times each side over its divisor.

    The divisor is the side itself ("separate"), the longer side ("max") or the shorter one ("min").
    """
    divisors = {
        "separate": (height, width),
        "max": (max(height, width),) * 2,
        "min": (min(height, width),) * 2,
    }
    if normalize not in divisors:
        raise ValueError(f"rope_normalize is {normalize!r}; expected separate, max or min")
    rows, columns = (
        2 * ((jnp.arange(size, dtype=dtype) + 0.5) / divisor) - 1
        for size, divisor in zip((height, width), divisors[normalize], strict=True)
    )
    return jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)


def draw(
    shift: float | None, jitter: float | None, rescale: float | None, *, key: Key[Array, ""]
) -> Augmentation:
    """Shift ~ U(-s, s) per axis; jitter per axis and one rescale, log-uniform in [1/m, m]."""
    keys = jax.random.split(key, 3)

    def uniform(key: Key[Array, ""], size: int, bound: float) -> Array:
        return jax.random.uniform(key, (size,), minval=-bound, maxval=bound)

    def log_uniform(key: Key[Array, ""], size: int, bound: float | None) -> Array:
        if bound is None:
            return jnp.ones(size)
        return jnp.exp(uniform(key, size, math.log(bound)))

    return Augmentation(
        jnp.zeros(2) if shift is None else uniform(keys[0], 2, shift),
        log_uniform(keys[1], 2, jitter),
        log_uniform(keys[2], 1, rescale),
    )


def augment(coords: Float[Array, "p 2"], by: Augmentation) -> Float[Array, "*g p 2"]:
    """(coords + shift) * jitter * rescale; leading axes of the draw lead the result."""
    coords = coords.reshape((1,) * (by.shift.ndim - 1) + coords.shape)
    shift, jitter, rescale = (value[..., None, :] for value in by)
    return (coords + shift) * jitter * rescale


def tables(coords: Float[Array, "g p 2"], periods: Float[Array, " q"]) -> Tables:
    """Angles 2π c / T, all of h then all of w, twice over: [g, p, 4q]. Dtype follows the inputs."""
    angles = 2 * jnp.pi * coords[..., None] / periods[None, None, None, :]
    angles = angles.reshape(*coords.shape[:2], -1)  # [g, p, 2, q] -> [g, p, 2q]
    angles = jnp.concatenate([angles, angles], -1)
    return Tables(jnp.sin(angles), jnp.cos(angles))


def with_prefix(rope: Tables, prefix: int) -> Tables:
    """Tables that leave `prefix` leading tokens as they are (cos 1, sin 0).

    So the rotation is one elementwise pass over all tokens, without a slice and a concatenation.
    """
    pad = ((0, 0), (prefix, 0), (0, 0))
    return Tables(jnp.pad(rope.sin, pad), jnp.pad(rope.cos, pad, constant_values=1.0))


def apply(x: Float[Array, "n t h e"], rope: Tables) -> Float[Array, "n t h e"]:
    """y = x cos + [-b, a] sin with [a, b] the halves of x, in the dtype of the tables.

    Only the last tokens turn, as many as the tables hold. Rows are g equal runs, one for each
    leading entry of the tables.
    """
    n, t, h, e = x.shape
    g, p, _ = rope.sin.shape
    if p < t:
        rope = with_prefix(rope, t - p)
    y = x.astype(rope.sin.dtype).reshape(g, n // g, t, h, e)
    a, b = jnp.split(y, 2, axis=-1)
    sin, cos = (table[:, None, :, None, :] for table in rope)
    y = y * cos + jnp.concatenate([-b, a], -1) * sin
    return y.reshape(n, t, h, e).astype(x.dtype)
