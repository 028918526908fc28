"""Against torch and transformers: the backbone, and what the benchmark computes."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax import backbone
from dinojax.losses import gram, koleo, sinkhorn

pytestmark = pytest.mark.oracle

MLP = {"ffn": "mlp", "ffn_ratio": 4.0}
GATED = {"ffn": "swiglu", "ffn_ratio": 6.0}


def from_transformers(state, depth):
    """A DINOv3ViTModel's state dict as our backbone's parameters (training spec 8.4)."""
    state = {name: value.numpy() for name, value in state.items()}

    def stacked(name, change=lambda a: a):
        return np.stack([change(state[f"model.layer.{i}.{name}"]) for i in range(depth)])

    def linear(name):
        kernel = stacked(f"{name}.weight", np.transpose)
        return {"kernel": kernel, "bias": stacked(f"{name}.bias")}

    def norm(name):
        return {"scale": stacked(f"{name}.weight"), "bias": stacked(f"{name}.bias")}

    q, k, v = (stacked(f"attention.{x}_proj.weight", np.transpose) for x in "qkv")
    q_bias, v_bias = (stacked(f"attention.{x}_proj.bias") for x in "qv")
    names = {"fc1": "up_proj", "fc2": "down_proj"}
    if "model.layer.0.mlp.gate_proj.weight" in state:
        names = {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"}
    return {
        "cls_token": state["embeddings.cls_token"][0],
        "storage_tokens": state["embeddings.register_tokens"][0],
        "mask_token": state["embeddings.mask_token"][0],
        "patch_embed": {
            "kernel": state["embeddings.patch_embeddings.weight"].transpose(2, 3, 1, 0),
            "bias": state["embeddings.patch_embeddings.bias"],
        },
        "blocks": {
            "norm1": norm("norm1"),
            "norm2": norm("norm2"),
            "attn": {
                "qkv": {
                    "kernel": np.concatenate([q, k, v], axis=-1),
                    "bias": np.concatenate([q_bias, 0 * q_bias, v_bias], axis=-1),
                },
                "proj": linear("attention.o_proj"),
            },
            "ls1": {"gamma": stacked("layer_scale1.lambda1")},
            "ls2": {"gamma": stacked("layer_scale2.lambda1")},
            "ffn": {ours: linear(f"mlp.{theirs}") for ours, theirs in names.items()},
        },
        "norm": {"scale": state["norm.weight"], "bias": state["norm.bias"]},
    }


@pytest.mark.parametrize("ffn, act", [(MLP, "gelu"), (GATED, "silu")], ids=["mlp", "swiglu"])
def test_backbone_equals_transformers(ffn, act):
    import torch
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_register_tokens=4,
        use_gated_mlp=act == "silu",
        hidden_act=act,
        patch_size=8,
    )
    theirs = DINOv3ViTModel(config).eval()
    with torch.no_grad():  # nothing stays at its initial value
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    masks = np.random.default_rng(1).random((2, 24)) < 0.4
    model = {
        **{"name": "vit", "variant": "tiny", "width": 64, "depth": 3, "heads": 4, **ffn},
        **{"patch_size": 8, "storage_tokens": 4, "norm": "layernormbf16", "mask_k_bias": True},
    }
    apply = jax.jit(backbone.build(model).apply)
    params = from_transformers(theirs.state_dict(), depth=3)
    for mask in (None, masks):
        found = apply(
            params, (jnp.asarray(images),), (None if mask is None else jnp.asarray(mask),)
        )
        with torch.no_grad():
            expected = theirs(
                torch.from_numpy(images.transpose(0, 3, 1, 2)),
                bool_masked_pos=None if mask is None else torch.from_numpy(mask),
            ).last_hidden_state.numpy()
        mine = np.concatenate([found[0].cls[:, None], found[0].storage, found[0].patches], axis=1)
        np.testing.assert_allclose(mine, expected, atol=1e-4, rtol=1e-4)


def test_the_benchmark_computes_the_same_losses():
    """tests/benchmarks/torch_step.py is only a fair opponent if it does the same work."""
    import torch

    path = Path(__file__).parent / "benchmarks" / "torch_step.py"
    spec = importlib.util.spec_from_file_location("torch_step", path)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 24)).astype(np.float32)
    expected = theirs.sinkhorn(torch.from_numpy(0.1 * logits)).numpy()
    found = sinkhorn.sinkhorn(jnp.asarray(0.1 * logits), 0.05)
    np.testing.assert_allclose(found, expected, atol=1e-5)

    cls = rng.normal(size=(6, 16)).astype(np.float32)
    expected = theirs.koleo(torch.from_numpy(cls)).item()
    found = koleo.koleo_loss(jnp.asarray(cls)[:, None])
    np.testing.assert_allclose(found, expected, rtol=1e-5)

    student, teacher = (rng.normal(size=(2, p, 8)).astype(np.float32) for p in (16, 64))
    expected = theirs.gram_loss(torch.from_numpy(student), torch.from_numpy(teacher), 4).item()
    resized = gram.resize_features(jnp.asarray(teacher), (8, 8), (4, 4))
    found = gram.gram_loss(jnp.asarray(student), resized)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
