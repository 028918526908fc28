"""Reference state dicts (names and layouts of the published PyTorch code) to our trees, and back.

`to_reference` also maps gradients: every layout below is a transposition or a reshape. A stacked
parameter becomes one array per block.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dinojax.models import convnext, heads, vit
from dinojax.models.functional import Network

Tree = dict[str, Any]
Layout = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]

# Each layout as (reference -> ours, ours -> reference).
SAME: Layout = (lambda a: a, lambda a: a)
TOKEN: Layout = (lambda a: a[0], lambda a: a[None])  # [1, r, d]
LINEAR: Layout = (lambda a: a.T, lambda a: a.T)  # [out, in]
CONV: Layout = (  # [out, in, kh, kw]
    lambda a: a.transpose(2, 3, 1, 0),
    lambda a: a.transpose(3, 2, 0, 1),
)

# Our path (a layer of a stack written as a number) -> reference name and layout; first match wins.
RULES: list[tuple[str, str, Layout]] = [
    (r"(cls_token|storage_tokens)", r"\1", TOKEN),
    (r"mask_token", r"mask_token", SAME),
    (r"patch_embed/kernel", r"patch_embed.proj.weight", CONV),
    (r"patch_embed/bias", r"patch_embed.proj.bias", SAME),
    (r"blocks/(\d+)/(norm\d)/scale", r"blocks.\1.\2.weight", SAME),
    (r"blocks/(\d+)/(norm\d)/bias", r"blocks.\1.\2.bias", SAME),
    (r"blocks/(\d+)/(ls\d)/gamma", r"blocks.\1.\2.gamma", SAME),
    (r"blocks/(\d+)/attn/(\w+)/kernel", r"blocks.\1.attn.\2.weight", LINEAR),
    (r"blocks/(\d+)/attn/(\w+)/bias", r"blocks.\1.attn.\2.bias", SAME),
    (r"blocks/(\d+)/ffn/(\w+)/kernel", r"blocks.\1.mlp.\2.weight", LINEAR),
    (r"blocks/(\d+)/ffn/(\w+)/bias", r"blocks.\1.mlp.\2.bias", SAME),
    (r"(norm|cls_norm|local_cls_norm)/scale", r"\1.weight", SAME),
    (r"(norm|cls_norm|local_cls_norm)/bias", r"\1.bias", SAME),
    (r"stem/conv/kernel", r"downsample_layers.0.0.weight", CONV),
    (r"stem/conv/bias", r"downsample_layers.0.0.bias", SAME),
    (r"stem/norm/scale", r"downsample_layers.0.1.weight", SAME),
    (r"stem/norm/bias", r"downsample_layers.0.1.bias", SAME),
    (r"downsample(\d)/norm/scale", r"downsample_layers.\1.0.weight", SAME),
    (r"downsample(\d)/norm/bias", r"downsample_layers.\1.0.bias", SAME),
    (r"downsample(\d)/conv/kernel", r"downsample_layers.\1.1.weight", CONV),
    (r"downsample(\d)/conv/bias", r"downsample_layers.\1.1.bias", SAME),
    (r"stages(\d)/(\d+)/gamma", r"stages.\1.\2.gamma", SAME),
    (r"stages(\d)/(\d+)/dwconv/kernel", r"stages.\1.\2.dwconv.weight", CONV),
    (r"stages(\d)/(\d+)/norm/scale", r"stages.\1.\2.norm.weight", SAME),
    (r"stages(\d)/(\d+)/pwconv(\d)/kernel", r"stages.\1.\2.pwconv\3.weight", LINEAR),
    (r"stages(\d)/(\d+)/(\w+)/bias", r"stages.\1.\2.\3.bias", SAME),
    (r"last_layer/prototypes", r"last_layer.weight", SAME),
]
# Constants and aliases of the reference, not parameters of ours.
BUFFERS = re.compile(r"rope_embed\.periods|.*\.bias_mask|norms\.3\..*")


def backbone_params(state: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Tree:
    """The tree of `build(config)` filled from a reference state dict; every name must be used."""
    config = dict(config)
    models = {"vit": vit, "convnext": convnext}
    model = models[config.pop("name", "convnext" if "dims" in config else "vit")]
    return _filled(jax.eval_shape(model.build(config).init, jax.random.key(0)), state)


def block_params(state: Mapping[str, np.ndarray], network: Network) -> Tree:
    """The tree of a single transformer block filled from a reference state dict."""
    block = jax.eval_shape(network.init, jax.random.key(0))
    stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape), a.dtype), block)
    filled = _filled({"blocks": stacked}, {f"blocks.0.{name}": a for name, a in state.items()})
    return jax.tree.map(lambda a: a[0], filled["blocks"])


def head_params(state: Mapping[str, np.ndarray]) -> Tree:
    """The tree of a head filled from a reference state dict."""
    config = head_config(state)
    in_dim = config.pop("in_dim")
    network = heads.build(config, in_dim, "float32")
    return _filled(jax.eval_shape(network.init, jax.random.key(0)), state)


def head_config(state: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Sizes of a head, read from its arrays: the keys of `heads.build`, and `in_dim`."""
    weights = [a for name, a in state.items() if re.fullmatch(r"mlp(\.\d+)?\.weight", name)]
    prototypes, bottleneck = state["last_layer.weight"].shape
    hidden = weights[0].shape[0]
    sizes = {"prototypes": prototypes, "bottleneck": bottleneck, "hidden": hidden}
    return sizes | {"layers": len(weights), "in_dim": weights[0].shape[1]}


def vit_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Our `model` section from the constructor settings of the reference's ViT.

    `img_size` only chooses a default there; compute dtypes of RoPE are ours (float32).
    """
    names = {
        "patch_size": "patch_size",
        "in_chans": "in_channels",
        "embed_dim": "width",
        "depth": "depth",
        "num_heads": "heads",
        "ffn_ratio": "ffn_ratio",
        "ffn_layer": "ffn",
        "qkv_bias": "qkv_bias",
        "proj_bias": "proj_bias",
        "ffn_bias": "ffn_bias",
        "mask_k_bias": "mask_k_bias",
        "layerscale_init": "layerscale",
        "drop_path_rate": "drop_path",
        "norm_layer": "norm",
        "n_storage_tokens": "storage_tokens",
        "untie_cls_and_patch_norms": "untie_cls_and_patch_norms",
        "untie_global_and_local_cls_norm": "untie_global_and_local_cls_norm",
        "pos_embed_rope_base": "rope_base",
        "pos_embed_rope_min_period": "rope_min_period",
        "pos_embed_rope_max_period": "rope_max_period",
        "pos_embed_rope_normalize_coords": "rope_normalize",
        "pos_embed_rope_shift_coords": "rope_shift",
        "pos_embed_rope_jitter_coords": "rope_jitter",
        "pos_embed_rope_rescale_coords": "rope_rescale",
    }
    ignored = {"img_size", "pos_embed_rope_dtype", "device"}
    missing = sorted(set(settings) - set(names) - ignored)
    if missing:
        raise ValueError(f"no counterpart for the reference's setting {missing[0]!r}")
    config = {"drop_path": 0.0, "ffn": "mlp", "ffn_ratio": 4.0, "layerscale": None}
    config |= {names[k]: v for k, v in settings.items() if k in names}
    for name in ("ffn_ratio", "drop_path", *(k for k in config if k.startswith("rope_"))):
        if type(config[name]) is int:
            config[name] = float(config[name])
    # The reference's default is bfloat16 tables; they start from rounded periods.
    return config | {"rope_bf16_periods": settings.get("pos_embed_rope_dtype", "bf16") == "bf16"}


def convnext_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Our `model` section from the constructor settings of the reference's ConvNeXt."""
    names = {
        "depths": "depths",
        "dims": "dims",
        "patch_size": "patch_size",
        "in_chans": "in_channels",
        "layer_scale_init_value": "layerscale",
        "drop_path_rate": "drop_path",
    }
    return {names[k]: v for k, v in settings.items()}


def to_reference(tree: Tree) -> dict[str, np.ndarray]:
    """{reference name: array in its layout} of one network's parameters or gradients."""
    nlayers = sum(key.startswith("fc") for key in tree)
    named = {}
    for path, leaf in _leaves(tree):
        stacked = re.match(r"(blocks|stages\d)/", path)
        for i, part in enumerate(leaf) if stacked else [(0, leaf)]:
            name, layout = _rule(path, i if stacked else None, nlayers)
            named[name] = layout[1](np.asarray(part))
    return named


def _filled(abstract: Tree, state: Mapping[str, np.ndarray]) -> Tree:
    """The tree with arrays in place of shapes."""
    nlayers = sum(key.startswith("fc") for key in abstract)
    tree, used = {}, set()
    for path, leaf in _leaves(abstract):
        depth = leaf.shape[0] if re.match(r"(blocks|stages\d)/", path) else None
        found = []
        for i in [None] if depth is None else range(depth):
            name, layout = _rule(path, i, nlayers)
            found.append(layout[0](np.asarray(state[name])))
            used.add(name)
        array = jnp.asarray(found[0] if depth is None else np.stack(found))
        if array.shape != leaf.shape:
            raise ValueError(f"{path} has shape {leaf.shape}, the reference's array {array.shape}")
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    left = [name for name in state if name not in used and not BUFFERS.fullmatch(name)]
    if left:
        raise ValueError(f"no place for the reference's parameter {left[0]!r}")
    return tree


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _rule(path: str, layer: int | None, nlayers: int) -> tuple[str, Layout]:
    """Reference name and layout of one of our paths (of one layer of a stacked one)."""
    head = re.fullmatch(r"fc(\d)/(kernel|bias)", path)
    if head:  # mlp.0, mlp.2, ... with GELUs between them; plain mlp where there is one layer
        at = f".{2 * int(head[1]) - 2}" if nlayers > 1 else ""
        weight = head[2] == "kernel"
        return f"mlp{at}.{'weight' if weight else 'bias'}", LINEAR if weight else SAME
    if layer is not None:
        path = path.replace("/", f"/{layer}/", 1)
    for pattern, name, layout in RULES:
        match = re.fullmatch(pattern, path)
        if match:
            return match.expand(name), layout
    raise ValueError(f"no reference name for {path}")
