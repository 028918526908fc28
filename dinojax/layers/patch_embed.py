"""Patch embedding (spec 1.1): a convolution with stride = kernel, written as one matrix product."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dinojax.layers.linear import dot


class PatchEmbed(nnx.Module):
    """Images whose sides are multiples of the patch -> tokens, row-major. Kernel [ph, pw, c, d].

    Kernel and bias ~ U(-a, a), a = 1/sqrt(c·ph·pw) (spec 1.5): 0.0361 for 3 channels and 16 pixels.
    """

    def __init__(self, patch: int, channels: int, dim: int, *, rngs: nnx.Rngs) -> None:
        bound = (channels * patch * patch) ** -0.5
        shape = (patch, patch, channels, dim)
        self.kernel = nnx.Param(
            jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        )
        self.bias = nnx.Param(
            jax.random.uniform(rngs.params(), (dim,), minval=-bound, maxval=bound)
        )

    def __call__(self, images: Float[Array, "n i j c"]) -> Float[Array, "n p d"]:
        ph, pw, c, d = self.kernel.shape
        n, i, j, _ = images.shape
        y, x = i // ph, j // pw
        pixels = images.reshape(n, y, ph, x, pw, c).transpose(0, 1, 3, 2, 4, 5)
        pixels = pixels.reshape(n, y * x, ph * pw * c)  # [n, y, x, ph, pw, c] -> [n, p, ph·pw·c]
        return dot(pixels, self.kernel[...].reshape(-1, d), self.bias[...])


def fit(images: Float[Array, "n i j c"], patch: int, policy: str) -> Float[Array, "n y x c"]:
    """Sides made multiples of the patch.

    `floor` cuts right and bottom, `resize` goes to the nearest multiple (bilinear, antialiased),
    `pad` adds zeros right and bottom.
    """
    n, i, j, c = images.shape
    if policy == "floor":
        y, x = i // patch * patch, j // patch * patch
        if y == 0 or x == 0:
            raise ValueError(f"images of {i}x{j} pixels are smaller than one patch of {patch}")
        return images[:, :y, :x]
    if policy == "pad":
        return jnp.pad(images, ((0, 0), (0, -i % patch), (0, -j % patch), (0, 0)))
    if policy == "resize":
        y, x = (max(1, round(side / patch)) * patch for side in (i, j))
        if (y, x) == (i, j):
            return images
        return jax.image.resize(images, (n, y, x, c), "linear")
    raise ValueError(f"size_policy is {policy!r}; expected floor, resize or pad")
