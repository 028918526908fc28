"""Vision transformer (spec 1): patch and prefix tokens, one scan over the blocks, output norms."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from dinojax.layers import attention, linear, rope
from dinojax.layers.block import Block, draw_kept, kept_count
from dinojax.layers.ffn import ALIGNMENT
from dinojax.layers.norm import EPSILON, make_norm
from dinojax.layers.patch_embed import PatchEmbed, fit
from dinojax.models import variants
from dinojax.models.functional import Features, Network, functional, stack

# Consumers of a group's key.
ATTENTION, FFN, ROPE = range(3)

SAVED_DOTS = (linear.SAVED, *attention.SAVED)
# What the backward pass of a block keeps instead of computing it again: everything; nothing but the
# block's input; results of products; results of products with weights.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(*SAVED_DOTS),
    "dots_no_batch": jax.checkpoint_policies.save_only_these_names(linear.SAVED),
}


CHOICES = {
    "norm": tuple(EPSILON),
    "ffn": ("mlp", *ALIGNMENT),
    "rope_normalize": ("separate", "max", "min"),
    "size_policy": ("floor", "resize", "pad"),
    "dtype": ("float32", "bfloat16"),
    "remat": tuple(REMAT),
    "attention": attention.IMPLEMENTATIONS,
}


class Place(NamedTuple):
    """The tokens of one crop size: patch grid, prefix tokens, and which are real (None: all)."""

    height: int
    width: int
    prefix: int
    valid: np.ndarray | None


@dataclass(frozen=True)
class ViTConfig:
    """The `model` section of a config. None in the first five: what the variant says."""

    variant: str = "large"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    ffn: str | None = None
    ffn_ratio: float | None = None
    patch_size: int = 16
    in_channels: int = 3
    storage_tokens: int = 0
    norm: str = "layernorm"
    qkv_bias: bool = True
    proj_bias: bool = True
    ffn_bias: bool = True
    mask_k_bias: bool = False
    layerscale: float | None = 1e-5
    drop_path: float = 0.3
    untie_cls_and_patch_norms: bool = False
    untie_global_and_local_cls_norm: bool = False
    rope_base: float | None = 100.0
    rope_min_period: float | None = None
    rope_max_period: float | None = None
    rope_normalize: str = "separate"
    rope_shift: float | None = None
    rope_jitter: float | None = None
    rope_rescale: float | None = None
    rope_bf16_periods: bool = False
    size_policy: str = "floor"
    dtype: str = "float32"
    scan: bool = True
    remat: str = "none"
    attention: str = "auto"


def resolve(config: Mapping[str, Any]) -> ViTConfig:
    """A complete ViTConfig: the variant's sizes unless given, everything checked."""
    variants.check_keys("model", config, (field.name for field in fields(ViTConfig)))
    result = ViTConfig(**config)
    sizes = variants.lookup(variants.VIT, result.variant)
    result = replace(result, **{k: v for k, v in sizes.items() if getattr(result, k) is None})
    if result.width % (4 * result.heads):
        raise ValueError(
            f"width {result.width} is not a multiple of 4 x {result.heads} heads, as RoPE needs"
        )
    for name, choices in CHOICES.items():
        if getattr(result, name) not in choices:
            found = getattr(result, name)
            raise ValueError(f"{name} is {found!r}; expected one of {', '.join(choices)}")
    jax.eval_shape(lambda: periods(result))  # raises unless exactly one of their forms is given
    if not 0 <= result.drop_path < 1:
        raise ValueError(f"drop_path is {result.drop_path}; expected 0 <= drop_path < 1")
    return result


def periods(config: ViTConfig) -> Float[Array, " q"]:
    """RoPE periods of one head (spec 1.4)."""
    ends = (config.rope_base or None, config.rope_min_period, config.rope_max_period)
    return rope.make_periods(config.width // config.heads, *ends, bf16=config.rope_bf16_periods)


def build(config: Mapping[str, Any]) -> Network:
    """The network of a config's `model` section (without `name`)."""
    resolved = resolve(config)
    return functional(lambda rngs: ViT(resolved, rngs=rngs))


class ViT(nnx.Module):
    """Token order: [CLS, storage, patches row-major]."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        c, d = config, config.width
        # CLS and storage are drawn N(0, 0.02²), the mask token starts at zero (spec 1.5).
        self.cls_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, d)))
        if c.storage_tokens:
            storage = 0.02 * jax.random.normal(rngs.params(), (c.storage_tokens, d))
            self.storage_tokens = nnx.Param(storage)
        self.mask_token = nnx.Param(jnp.zeros((1, d)))
        self.patch_embed = PatchEmbed(c.patch_size, c.in_channels, d, rngs=rngs)
        names = "ffn ffn_ratio norm qkv_bias proj_bias ffn_bias mask_k_bias layerscale attention"
        options = {name: getattr(c, name) for name in names.split()}
        self.blocks = stack(lambda r: Block(d, c.heads, **options, rngs=r), c.depth, rngs)
        self.norm = make_norm(c.norm, d)
        self.cls_norm = make_norm(c.norm, d) if c.untie_cls_and_patch_norms else None
        self.local_cls_norm = make_norm(c.norm, d) if c.untie_global_and_local_cls_norm else None

    def __call__(
        self,
        crops: tuple[Float[Array, "_ _ _ c"], ...],
        masks: tuple[Bool[Array, "_ _"] | None, ...] | None = None,
        groups: UInt[Array, " g"] | Int[Array, " g"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Features, ...]:
        """Features of each entry of crops; a mask replaces patches by the mask token.

        A key means training: stochastic depth, RoPE augmentation, and `local_cls_norm` on entry 1.
        Rows of every entry are then g equal runs, one for each of `groups`, the groups' numbers in
        the whole batch (None: all rows are group 0). Draws depend on (key, block, entry, group
        number) alone, so neither on devices nor on micro-batches.
        """
        masks = masks or (None,) * len(crops)
        embedded = [self._embed(*pair) for pair in zip(crops, masks, strict=True)]
        tokens, places = zip(*embedded, strict=True)
        if key is not None and groups is None:
            groups = jnp.zeros(1, jnp.int32)
        if key is not None and any(len(x) % len(groups) for x in tokens):
            rows = [len(x) for x in tokens]
            raise ValueError(f"{rows} rows of the crops do not divide into {len(groups)} groups")
        tokens = self._blocks(tokens, places, range(self.config.depth), groups, key)
        return tuple(
            self._features(x, place, local=key is not None and i == 1)
            for i, (x, place) in enumerate(zip(tokens, places, strict=True))
        )

    def intermediate(
        self, images: Float[Array, "n i j c"], layers: int | tuple[int, ...] = 1, norm: bool = True
    ) -> tuple[Features, ...]:
        """Outputs of the listed blocks (an int: the last so many), final norm applied if asked."""
        depth = self.config.depth
        layers = tuple(range(depth - layers, depth)) if isinstance(layers, int) else layers
        x, place = self._embed(images, None)
        features, done = {}, 0
        for layer in sorted(i % depth for i in layers):
            (x,) = self._blocks((x,), (place,), range(done, layer + 1), None, None)
            features[layer], done = self._features(x, place, norm=norm), layer + 1
        return tuple(features[i % depth] for i in layers)

    def _embed(self, images: Array, mask: Array | None) -> tuple[Array, Place]:
        """[n, i, j, c] -> [n, 1+r+p, d] in the compute dtype, and where its tokens lie."""
        c = self.config
        if images.shape[-1] != c.in_channels:
            raise ValueError(f"images have {images.shape[-1]} channels; expected {c.in_channels}")
        x = fit(images, c.patch_size, c.size_policy)
        prefix = 1 + c.storage_tokens
        valid = None
        if c.size_policy == "pad":
            real = real_patches(*images.shape[1:3], c.patch_size)
            valid = np.concatenate([np.ones(prefix, bool), real])
        place = Place(x.shape[1] // c.patch_size, x.shape[2] // c.patch_size, prefix, valid)
        x = self.patch_embed(x.astype(c.dtype))
        if mask is not None:
            x = jnp.where(mask[:, :, None], self.mask_token[...].astype(x.dtype)[None], x)
        tokens = self.cls_token[...]
        if c.storage_tokens:
            tokens = jnp.concatenate([tokens, self.storage_tokens[...]])
        tokens = jnp.broadcast_to(tokens.astype(x.dtype)[None], (len(x), *tokens.shape))
        return jnp.concatenate([tokens, x], 1), place

    def _rope(self, place: Place, keys: Array | None) -> rope.Tables:
        """Tables for all tokens of an entry: one per group if augmented, else one for all rows."""
        c = self.config
        coords = rope.coordinates(place.height, place.width, c.rope_normalize)
        if keys is None:
            coords = coords[None]
        else:
            ranges = (c.rope_shift, c.rope_jitter, c.rope_rescale)
            draw = jax.vmap(lambda k: rope.draw(*ranges, key=jax.random.fold_in(k, ROPE)))
            coords = rope.augment(coords, draw(keys))
        return rope.with_prefix(rope.tables(coords, periods(c)), place.prefix)

    def _kept(self, rows: int, keys: Array) -> tuple[Array, Array] | None:
        """Rows [g, k] that keep the attention and the feed-forward branch; None: all."""
        rows_of_group = rows // len(keys)
        count = kept_count(rows_of_group, self.config.drop_path)
        if self.config.drop_path == 0 or count == rows_of_group:
            return None
        keys = [jax.vmap(partial(jax.random.fold_in, data=use))(keys) for use in (ATTENTION, FFN)]
        return draw_kept(keys[0], rows_of_group, count), draw_kept(keys[1], rows_of_group, count)

    def _blocks(
        self,
        tokens: tuple[Array, ...],
        places: tuple[Place, ...],
        layers: range,
        groups: Array | None,
        key: Array | None,
    ) -> tuple[Array, ...]:
        """Some consecutive blocks over all entries at once.

        On CPU, ViT-S/16, 2x224 + 8x96, batch 4, forward and backward: in float32 the scan takes 2.8
        CPU seconds and 0.8 GiB where the unrolled blocks take 2.65 and 1.0, and compiles five times
        faster. In bfloat16 a scan that stores residuals takes 2.75, one with remat="full" 2.1 and
        0.14 GiB, unrolled blocks 1.9: XLA on CPU rewrites a whole stack of bfloat16 residuals in
        float32 for each layer it adds.
        """
        c = self.config
        augmented = any((c.rope_shift, c.rope_jitter, c.rope_rescale))
        tables = [self._rope(place, None) for place in places]  # the same in every block
        graphdef, state = nnx.split(self.blocks)

        def body(tokens: tuple[Array, ...], layer: tuple[Any, Array]) -> tuple[Any, None]:
            block, out = nnx.merge(graphdef, layer[0]), []
            for i, (x, place) in enumerate(zip(tokens, places, strict=True)):
                turn, kept = tables[i], None
                if key is not None:
                    keys = group_keys(key, layer[1], i, groups)
                    turn = self._rope(place, keys) if augmented else turn
                    kept = self._kept(len(x), keys)
                valid = None if place.valid is None else jnp.asarray(place.valid)[None]
                out.append(block(x, turn, valid, kept))
            return tuple(out), None

        if c.remat != "none":
            # Nothing can be merged across the iterations of a scan: no barrier needed there.
            body = jax.checkpoint(body, policy=REMAT[c.remat], prevent_cse=not c.scan)
        stacked = (state, jnp.arange(c.depth))
        if len(layers) < c.depth:
            stacked = jax.tree.map(lambda a: a[layers.start : layers.stop], stacked)
        if c.scan:
            return jax.lax.scan(body, tokens, stacked)[0]
        # Splits, whose derivative is one concatenation: twelve slices would each pad and add.
        parts, tree = jax.tree.flatten(stacked)
        parts = [jnp.split(a, len(layers)) for a in parts]
        for i in range(len(layers)):
            tokens, _ = body(tokens, jax.tree.unflatten(tree, [a[i][0] for a in parts]))
        return tokens

    def _features(
        self, x: Array, place: Place, *, norm: bool = True, local: bool = False
    ) -> Features:
        """Output norms (spec 1.3). Patches that are mostly padding are returned as zeros."""
        prefix, patches = x[:, : place.prefix], x[:, place.prefix :]
        if norm:
            use = self.norm
            if self.cls_norm is not None:
                use = self.cls_norm
            if local and self.local_cls_norm is not None:
                use = self.local_cls_norm
            prefix, patches = use(prefix), self.norm(patches)
        if place.valid is not None:
            patches = jnp.where(place.valid[None, place.prefix :, None], patches, 0)
        return Features(prefix[:, 0], prefix[:, 1:], patches, x)


def real_patches(height: int, width: int, patch: int) -> np.ndarray:
    """Patches of the padded grid that hold the image over half their height and width: bool [p].

    The first row and the first column always count. RoPE sees the whole padded grid.
    """
    sides = []
    for pixels in (height, width):
        starts = np.arange(0, pixels, patch)
        sides.append((starts + patch / 2 <= pixels) | (starts == 0))
    return (sides[0][:, None] & sides[1][None]).reshape(-1)


def group_keys(key: Key[Array, ""], block: Array, entry: int, groups: Array) -> Key[Array, " g"]:
    """One key for each group of an entry in a block."""
    key = jax.random.fold_in(jax.random.fold_in(key, block), entry)
    return jax.vmap(partial(jax.random.fold_in, key))(groups)
