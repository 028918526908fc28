"""Scaled dot-product attention without dropout: XLA everywhere, cuDNN on NVIDIA, splash on TPU.

Called by `layers/attention.py`. All three take and give [n, t, h, e], compute the softmax in
float32 and have their own backward pass.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

CHOICES = ("auto", "xla", "cudnn", "splash")
# Names that rematerialisation policies know (models/vit.py: REMAT).
WEIGHTS, MIXED = "attention_weights", "attention"
# A key that is not valid; finite, so that a row without any valid key gives no NaN.
MASKED = -1e30
SPLASH_BLOCK = 128


def attention(
    q: Float[Array, "n t h e"],
    k: Float[Array, "n t h e"],
    v: Float[Array, "n t h e"],
    *,
    valid: Bool[Array, "#n t"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "n t h e"]:
    """softmax(q kᵀ / sqrt(e)) v over the valid keys, in the dtype of `v`."""
    if implementation not in CHOICES:
        raise ValueError(f"attention is {implementation!r}; expected one of {', '.join(CHOICES)}")
    if implementation == "auto":
        implementation = choose(q.shape, q.dtype, valid is not None)
    if implementation == "cudnn":
        mask = None if valid is None else valid[:, None, None, :]
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    elif implementation == "splash":
        y = _splash(q, k, v, valid)
    else:
        # Heads before tokens: on CPU products over [n, h, t, e] took 31 ms where einsums over
        # [n, t, h, e] took 47 and jax.nn.dot_product_attention 48 ([8, 197, 6, 64], float32).
        y = _xla(*(x.swapaxes(1, 2) for x in (q, k, v)), valid).swapaxes(1, 2)
    return checkpoint_name(y, MIXED)


def choose(shape: tuple[int, ...], dtype: jnp.dtype, masked: bool) -> str:
    """What "auto" means for [n, t, h, e] on the platform at hand. (cuDNN and splash unmeasured.)"""
    _, t, _, e = shape
    backend = platform()
    if backend == "tpu" and t >= 512:  # shorter ones lose to the padding to blocks of 128
        return "splash"
    if backend == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and not masked:
        device = jax.devices()[0]
        ampere = "nvidia" in device.device_kind.lower() and float(device.compute_capability) >= 8
        if ampere and e % 8 == 0 and e <= 128 and t >= 128:
            return "cudnn"
    return "xla"


def platform() -> str:
    """Where the program will run: on the mesh's devices, else on the default backend.

    A plan compiles for devices that are not here (`launch/plan.py`), so the mesh comes first.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


@jax.custom_vjp
def _xla(
    q: Float[Array, "n h t e"],
    k: Float[Array, "n h t e"],
    v: Float[Array, "n h t e"],
    valid: Bool[Array, "#n t"] | None,
) -> Float[Array, "n h t e"]:
    """Weights stay unnormalised; the result is divided by their sum, t / e times fewer divisions.

    On CPU, [8, 197, 6, 64] float32: 25 ms instead of 31, with gradient 36 instead of 73.
    """
    return _xla_forward(q, k, v, valid)[0]


def _dot(spec: str, a: Array, b: Array) -> Array:
    """Compute-dtype inputs, float32 result (why: see layers/linear.py)."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _xla_forward(q: Array, k: Array, v: Array, valid: Array | None) -> tuple[Array, tuple]:
    scores = _dot("nhqe,nhke->nhqk", q, k) * q.shape[-1] ** -0.5
    if valid is not None:
        scores = jnp.where(valid[:, None, None, :], scores, MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    weights = checkpoint_name(weights.astype(v.dtype), WEIGHTS)
    y = (_dot("nhqk,nhke->nhqe", weights, v) / total).astype(v.dtype)
    return y, (q, k, v, weights, total, y)


def _xla_backward(saved: tuple, g: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, weights, total, y = saved
    g = g.astype(jnp.float32) / total
    # Σ_k p_qk ∂p_qk = <g_q, y_q>, so the softmax needs no second reduction over keys.
    inner = (g * y.astype(jnp.float32)).sum(-1, keepdims=True)
    g = g.astype(v.dtype)
    dv = _dot("nhqk,nhqe->nhke", weights, g)
    dp = _dot("nhqe,nhke->nhqk", g, v)
    ds = (weights.astype(jnp.float32) * (dp - inner) * q.shape[-1] ** -0.5).astype(q.dtype)
    dq, dk = _dot("nhqk,nhke->nhqe", ds, k), _dot("nhqk,nhqe->nhke", ds, q)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_xla.defvjp(_xla_forward, _xla_backward)


def _splash(q: Array, k: Array, v: Array, valid: Array | None) -> Array:
    """Pallas kernel per row, interpreted off TPU; rows and heads split as the mesh splits them."""
    n, t, h, _ = q.shape
    keys = jnp.ones((n, t), bool) if valid is None else jnp.broadcast_to(valid, (n, t))
    mesh = jax.sharding.get_abstract_mesh()
    kernel = functools.partial(_splash_rows, interpret=platform() != "tpu")
    if mesh.empty:
        return kernel(q, k, v, keys)
    # A kernel is opaque to the partitioner: each device runs it on its own rows and heads.
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = ("data", "fsdp") if n % shards == 0 else None
    heads = "tensor" if h % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(rows, None, heads)
    mapped = jax.shard_map(
        kernel,
        in_specs=(spec, spec, spec, PartitionSpec(rows)),
        out_specs=spec,
        check_vma=False,
    )
    return mapped(q, k, v, keys)


def _splash_rows(q: Array, k: Array, v: Array, keys: Array, *, interpret: bool) -> Array:
    _, t, h, e = q.shape
    padded = -(-t // SPLASH_BLOCK) * SPLASH_BLOCK
    # Whole sequences to a few blocks: 512 keys at a time where that divides.
    block = math.gcd(padded, 512)
    sizes = splash.BlockSizes(
        *(block,) * 3, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.FullMask((padded, padded))] * h),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    pad = functools.partial(jnp.pad, pad_width=((0, 0), (0, 0), (0, padded - t), (0, 0)))
    q, k, v = (pad(x.swapaxes(1, 2)) for x in (q * e**-0.5, k, v))
    # Real queries see segment 1: the valid keys. Padding sees padding and is cut off.
    widen = functools.partial(jnp.pad, pad_width=((0, 0), (0, padded - t)))
    segments = splash.SegmentIds(
        q=widen(jnp.ones(keys.shape, jnp.int32)), kv=widen(keys.astype(jnp.int32))
    )
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)[:, :t].astype(v.dtype)
