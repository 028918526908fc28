"""ConvNeXt (spec 1.6) behind the interface of the ViT: four stages of depthwise convolutions."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from dinojax.layers.ffn import gelu
from dinojax.layers.linear import Linear, along_last, dot
from dinojax.layers.norm import LayerNorm
from dinojax.models import variants
from dinojax.models.functional import Features, Network, functional, stack

EPSILON = 1e-6


@dataclass(frozen=True)
class ConvNeXtConfig:
    """The `model` section of a config. None in `depths` and `dims`: what the variant says."""

    variant: str = "tiny"
    depths: tuple[int, ...] | None = None
    dims: tuple[int, ...] | None = None
    in_channels: int = 3
    patch_size: int | None = None  # grid that `intermediate` resizes its maps to; None: as they are
    layerscale: float = 1e-6
    drop_path: float = 0.0  # of the last block; rises linearly from 0
    dtype: str = "float32"
    scan: bool = True
    remat: str = "none"  # none | full


def resolve(config: Mapping[str, Any]) -> ConvNeXtConfig:
    """A complete ConvNeXtConfig: the variant's sizes unless given, everything checked."""
    variants.check_keys("model", config, (field.name for field in fields(ConvNeXtConfig)))
    sizes = variants.lookup(variants.CONVNEXT, config.get("variant", "tiny"))
    given = {name: tuple(config.get(name) or sizes[name]) for name in sizes}
    if len(given["depths"]) != 4 or len(given["dims"]) != 4:
        raise ValueError(f"ConvNeXt has four stages, got depths and dims {given}")
    result = ConvNeXtConfig(**{**config, **given})
    if result.remat not in ("none", "full"):
        raise ValueError(f"remat is {result.remat!r}; expected none or full")
    return result


def build(config: Mapping[str, Any]) -> Network:
    """The network of a config's `model` section (without `name`)."""
    resolved = resolve(config)
    return functional(lambda rngs: ConvNeXt(resolved, rngs=rngs))


class PatchConv(nnx.Module):
    """Convolution with stride = kernel as one matrix product; what is left over is cut off."""

    def __init__(self, patch: int, in_dim: int, out_dim: int, *, rngs: nnx.Rngs) -> None:
        shape = (patch, patch, in_dim, out_dim)
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(out_dim))

    def __call__(self, x: Float[Array, "n i j c"]) -> Float[Array, "n y x d"]:
        p, _, c, d = self.kernel.shape
        n, i, j, _ = x.shape
        x = x[:, : i // p * p, : j // p * p].reshape(n, i // p, p, j // p, p, c)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, i // p, j // p, p * p * c)
        return dot(x, self.kernel[...].reshape(-1, d), self.bias[...])


class DepthwiseConv(nnx.Module):
    """7x7 over each channel alone, padded to keep the size. Kernel [7, 7, 1, d]."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), (7, 7, 1, dim)))
        self.bias = nnx.Param(jnp.zeros(dim))

    def __call__(self, x: Float[Array, "n y x d"]) -> Float[Array, "n y x d"]:
        kernel = self.kernel[...].astype(x.dtype)
        y = jax.lax.platform_dependent(x, kernel, cpu=shifted_sum, default=grouped_convolution)
        return (y + along_last(self.bias[...], y.ndim)).astype(x.dtype)


def grouped_convolution(
    x: Float[Array, "n y x d"], kernel: Float[Array, "k k 1 d"]
) -> Float[Array, "n y x d"]:
    """Each channel convolved with its own kernel, size kept."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@jax.custom_vjp
def shifted_sum(
    x: Float[Array, "n y x d"], kernel: Float[Array, "k k 1 d"]
) -> Float[Array, "n y x d"]:
    """The same for CPU: a sum over the kernel's positions, one row of it at a time.

    [4, 56, 56, 96] float32: 24 ms of CPU where XLA's grouped convolution takes 82, and that one's
    gradient did not end within minutes for a ConvNeXt-T. A loop, since a plain sum lets XLA fuse
    what precedes it into each of the 49 terms: its gradient did not compile within minutes.
    """
    k, width = len(kernel), x.shape[2]
    padded = _pad(x, k)

    def row(total: Array, i: Array) -> tuple[Array, None]:
        strip = jax.lax.dynamic_slice_in_dim(padded, i, x.shape[1], axis=1)
        for j in range(k):
            total = total + strip[:, :, j : j + width] * kernel[i, j][None, None]
        return total, None

    return jax.lax.scan(row, jnp.zeros_like(x), jnp.arange(k))[0]


def _pad(x: Array, k: int) -> Array:
    return jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))


def _shifted_sum_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return shifted_sum(x, kernel), (x, kernel)


def _shifted_sum_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    k = len(kernel)
    padded = _pad(x, k)

    def one(position: Array) -> Array:
        """Gradient of the kernel at one of its k² positions, [d]."""
        at = (0, position // k, position % k, 0)
        return jnp.sum(jax.lax.dynamic_slice(padded, at, x.shape) * g, (0, 1, 2), jnp.float32)

    dkernel = jax.lax.map(one, jnp.arange(k * k)).reshape(kernel.shape)
    return shifted_sum(g, kernel[::-1, ::-1]), dkernel.astype(kernel.dtype)


shifted_sum.defvjp(_shifted_sum_forward, _shifted_sum_backward)


class Block(nnx.Module):
    """x + γ pwconv2(gelu(pwconv1(norm(dwconv x)))), the branch kept for some rows only."""

    def __init__(self, dim: int, layerscale: float, *, rngs: nnx.Rngs) -> None:
        self.dwconv = DepthwiseConv(dim, rngs=rngs)
        self.norm = LayerNorm(dim, epsilon=EPSILON)
        self.pwconv1 = Linear(dim, 4 * dim, rngs=rngs)
        self.pwconv2 = Linear(4 * dim, dim, rngs=rngs)
        self.gamma = nnx.Param(jnp.full(dim, layerscale, jnp.float32))

    def __call__(
        self, x: Float[Array, "n y x d"], keep: Float[Array, " n"] | None = None
    ) -> Float[Array, "n y x d"]:
        """`keep` = the factor of each row's branch: 0 or 1 / (1 - rate); None: 1."""
        y = self.pwconv2(gelu(self.pwconv1(self.norm(self.dwconv(x)))))
        y = y.astype(jnp.float32) * along_last(self.gamma[...], y.ndim)
        if keep is not None:
            y = y * keep[:, None, None, None]
        return (x + y).astype(x.dtype)


class Downsample(nnx.Module):
    """Stem: conv, norm. Between stages: norm, conv."""

    def __init__(self, patch: int, in_dim: int, out_dim: int, *, rngs: nnx.Rngs) -> None:
        self.conv = PatchConv(patch, in_dim, out_dim, rngs=rngs)
        self.norm = LayerNorm(out_dim if patch == 4 else in_dim, epsilon=EPSILON)
        self.is_stem = patch == 4

    def __call__(self, x: Float[Array, "n i j c"]) -> Float[Array, "n y x d"]:
        return self.norm(self.conv(x)) if self.is_stem else self.conv(self.norm(x))


class ConvNeXt(nnx.Module):
    """CLS = mean of the last map; no storage tokens; patches = the last map, one per 32 pixels."""

    def __init__(self, config: ConvNeXtConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        depths, dims, scale = config.depths, config.dims, config.layerscale
        self.stem = Downsample(4, config.in_channels, dims[0], rngs=rngs)
        self.downsample1 = Downsample(2, dims[0], dims[1], rngs=rngs)
        self.downsample2 = Downsample(2, dims[1], dims[2], rngs=rngs)
        self.downsample3 = Downsample(2, dims[2], dims[3], rngs=rngs)
        self.stages0 = stack(lambda r: Block(dims[0], scale, rngs=r), depths[0], rngs)
        self.stages1 = stack(lambda r: Block(dims[1], scale, rngs=r), depths[1], rngs)
        self.stages2 = stack(lambda r: Block(dims[2], scale, rngs=r), depths[2], rngs)
        self.stages3 = stack(lambda r: Block(dims[3], scale, rngs=r), depths[3], rngs)
        self.norm = LayerNorm(dims[3], epsilon=EPSILON)

    def __call__(
        self,
        crops: tuple[Float[Array, "_ _ _ c"], ...],
        masks: tuple[Bool[Array, "_ _"] | None, ...] | None = None,
        groups: UInt[Array, " g"] | Int[Array, " g"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Features, ...]:
        """Features of each entry of crops; masks are ignored. A key turns stochastic depth on."""
        if key is not None and groups is None:
            groups = jnp.zeros(1, jnp.int32)
        maps = tuple(self._input(images) for images in crops)
        for stage in range(4):
            maps = self._stage(maps, stage, groups, key)
        return tuple(self._features(x, norm=True) for x in maps)

    def intermediate(
        self, images: Float[Array, "n i j c"], layers: int | tuple[int, ...] = 1, norm: bool = True
    ) -> tuple[Features, ...]:
        """Outputs of the listed stages (an int: the last so many); only stage 3 has a norm.

        With a `patch_size` the maps are resized (bilinear, antialiased) to i // patch by j // patch
        before the norm; CLS comes from the map as it was.
        """
        layers = tuple(range(4 - layers, 4)) if isinstance(layers, int) else layers
        layers = tuple(i % 4 for i in layers)
        x, patch, features = self._input(images), self.config.patch_size, {}
        for stage in range(max(layers) + 1):
            (x,) = self._stage((x,), stage, None, None)
            size = None if patch is None else (images.shape[1] // patch, images.shape[2] // patch)
            features[stage] = self._features(x, norm=norm and stage == 3, size=size)
        return tuple(features[i] for i in layers)

    def _input(self, images: Array) -> Array:
        if images.shape[-1] != self.config.in_channels:
            expected = self.config.in_channels
            raise ValueError(f"images have {images.shape[-1]} channels; expected {expected}")
        return images.astype(self.config.dtype)

    def _stage(
        self, maps: tuple[Array, ...], stage: int, groups: Array | None, key: Array | None
    ) -> tuple[Array, ...]:
        """Downsampling and the blocks of one stage over all entries: one scan."""
        c = self.config
        down = (self.stem, self.downsample1, self.downsample2, self.downsample3)[stage]
        blocks = (self.stages0, self.stages1, self.stages2, self.stages3)[stage]
        first, depth, total = sum(c.depths[:stage]), c.depths[stage], sum(c.depths)
        graphdef, state = nnx.split(blocks)

        def body(maps: tuple[Array, ...], layer: tuple[Any, Array]) -> tuple[Any, None]:
            block = nnx.merge(graphdef, layer[0])
            keep = [None] * len(maps)
            if key is not None and c.drop_path > 0:
                rate = c.drop_path * layer[1] / max(total - 1, 1)
                draw = jax.random.fold_in(key, layer[1])
                keep = [kept(draw, i, rate, groups, len(x)) for i, x in enumerate(maps)]
            return tuple(block(x, k) for x, k in zip(maps, keep, strict=True)), None

        if c.remat == "full":
            body = jax.checkpoint(body, prevent_cse=not c.scan)
        maps = tuple(down(x) for x in maps)
        layers = (state, jnp.arange(first, first + depth))
        if c.scan:
            return jax.lax.scan(body, maps, layers)[0]
        for i in range(depth):
            maps, _ = body(maps, jax.tree.map(lambda a: a[i], layers))  # noqa: B023
        return maps

    def _features(self, x: Array, *, norm: bool, size: tuple[int, int] | None = None) -> Features:
        """[n, y, x, d] -> mean and flattened map, through the norm if asked."""
        n, *grid, d = x.shape
        cls = x.astype(jnp.float32).mean((1, 2)).astype(x.dtype)
        if size is not None and size != tuple(grid):
            x = jax.image.resize(x, (n, *size, d), "linear")
        raw = x.reshape(n, -1, d)  # [n, y, x, d] -> [n, p, d]
        patches = self.norm(raw) if norm else raw
        cls = self.norm(cls) if norm else cls
        return Features(cls, jnp.zeros((n, 0, d), x.dtype), patches, raw)


def kept(
    key: Key[Array, ""], entry: int, rate: Array, groups: Array, rows: int
) -> Float[Array, " n"]:
    """Factors of the rows' branches: 0 with probability `rate`, else 1 / (1 - rate)."""
    key = jax.random.fold_in(key, entry)
    keys = jax.vmap(partial(jax.random.fold_in, key))(groups)
    draw = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate, (rows // len(groups),)))
    return draw(keys).reshape(rows) / (1 - rate)
