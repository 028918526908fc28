"""What a training step takes and moves, from shapes alone, where nothing can be compiled.

The state is exact; what lives only within a step (activations, temporaries) is counted from what
each rematerialisation policy keeps. Against compiled programs: `docs/scaling.md`. Called by
`figures`, for GPUs that are not here and to choose what is worth compiling.
"""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dinojax import config as configs
from dinojax import train
from dinojax.planning import inputs, network
from dinojax.planning.program import Collective, Found, Program
from dinojax.planning.topology import Topology
from dinojax.training import profiling
from dinojax.training import state as states

Tree = Mapping[str, Any]
# What compilers hold beyond what is counted here: without it all memory together came out at 0.79
# to 1.01 of what libtpu assigned, in 16 steps of ViT-L and 7B on 16 to 512 chips.
SLACK = 1.25


class Case(NamedTuple):
    """One step: its networks by shapes, its crops, and how it is cut up."""

    params: Tree  # backbone, dino_head, ibot_head of the student
    sizes: tuple[int, int, int]  # pixels of global, local and Gram crops
    locals: int
    images: int  # of the global batch
    pieces: int  # micro-batches
    mesh: tuple[int, int, int]  # data, fsdp, tensor
    remat: str
    drop_path: float
    heads: int  # of attention; 0 where there is none
    compute_bytes: int  # of an activation: 2 for bfloat16
    fused_attention: bool  # attention weights [t, t] never reach main memory
    work: profiling.Work  # of one image

    @property
    def images_here(self) -> float:
        """Images of one device in one micro-batch."""
        data, fsdp, _ = self.mesh
        return self.images / (data * fsdp * self.pieces)

    @property
    def entries(self) -> tuple[tuple[int, int], ...]:
        """(crops, side) of what the student sees of an image."""
        return ((2, self.sizes[0]), (self.locals, self.sizes[1]))


def parameters(tree: Tree) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def temporaries(case: Case) -> float:
    """Bytes that one device needs within a step beside state, batch and gradients."""
    tensor = case.mesh[2]
    kept = working = views = 0.0
    for crops, side in case.entries:
        rows = case.images_here * crops
        kept += rows * stack_entries(case, side) * case.compute_bytes
        working = max(working, rows * block_bytes(case, side) / tensor)
        views += rows * 3 * side**2 * 4.0
    views += case.images_here * 2 * 3 * case.sizes[2] ** 2 * 4.0
    return SLACK * (kept + max(working, gram_bytes(case)) + 2 * views + gathered_bytes(case))


def stack_entries(case: Case, side: int) -> float:
    """Numbers kept of one crop for the backward pass, over all blocks.

    In widths d, hidden widths f and attention weights [h, t, t] of a token; the block's input is
    whole on every device of the tensor axis, the rest is split.
    """
    backbone, tensor = case.params["backbone"], case.mesh[2]
    if "blocks" not in backbone:
        return convnext_entries(backbone, side, case.remat)
    depth, d, f, gated, tokens = sizes(backbone, side)
    weights = 0 if case.fused_attention else case.heads * tokens
    inner = {
        "full": 0.0,
        "dots_no_batch": 5 * d + gated * f,
        "dots": 6 * d + gated * f + weights,
        "none": 11 * d + (gated + 1) * f + weights,
    }[case.remat]
    return depth * tokens * (d + inner * (1 - case.drop_path) / tensor)


def block_bytes(case: Case, side: int) -> float:
    """What a block holds of one crop while it is computed (again) and differentiated."""
    backbone = case.params["backbone"]
    if "blocks" not in backbone:
        return convnext_entries(backbone, side, "none") / 18 * 4.0
    _, d, f, gated, tokens = sizes(backbone, side)
    scores = 0 if case.fused_attention else 2 * case.heads * tokens**2
    kept = 1 - case.drop_path
    return kept * (4.0 * scores + case.compute_bytes * tokens * (14 * d + 2 * (gated + 1) * f))


def sizes(backbone: Tree, side: int) -> tuple[int, int, int, int, int]:
    """depth, width, hidden width, matrices into it (2 if gated), tokens of a crop."""
    patch = backbone["patch_embed"]["kernel"].shape[0]
    tokens = 1 + (side // patch) ** 2
    if "storage_tokens" in backbone:
        tokens += backbone["storage_tokens"].shape[0]
    blocks = backbone["blocks"]
    depth, d, _ = blocks["attn"]["qkv"]["kernel"].shape
    gated = 2 if "w1" in blocks["ffn"] else 1
    f = blocks["ffn"]["w1" if gated == 2 else "fc1"]["kernel"].shape[-1]
    return depth, d, f, gated, tokens


def convnext_entries(backbone: Tree, side: int, remat: str) -> float:
    """As `stack_entries`, for a ConvNeXt: blocks of d, 4 d, d and norms on each stage's grid."""
    total, grid = 0.0, side // 4
    for stage in range(4):
        leaf = next(iter(jax.tree.leaves(backbone[f"stages{stage}"])))
        width = backbone[f"stages{stage}"]["dwconv"]["kernel"].shape[-1]
        total += leaf.shape[0] * grid**2 * width * (1 if remat == "full" else 12)
        grid //= 2
    return total


def gram_bytes(case: Case) -> float:
    """Features of both Gram sides and their similarities [p, p], float32, of all global crops."""
    backbone = case.params["backbone"]
    if not case.sizes[2] or "blocks" not in backbone:
        return 0.0
    _, d, *_, tokens = sizes(backbone, case.sizes[0])
    anchor = sizes(backbone, case.sizes[2])[-1]
    return case.images_here * 2 * 4.0 * (d * (anchor + 2 * tokens) + 3 * tokens**2)


def gathered_bytes(case: Case) -> float:
    """Whole weights that a device holds for a moment: two blocks and the largest prototypes."""
    if case.mesh[1] == 1:
        return 0.0
    backbone = case.params["backbone"]
    depth = backbone["blocks"]["attn"]["qkv"]["kernel"].shape[0] if "blocks" in backbone else 4
    heads = [case.params[name] for name in ("dino_head", "ibot_head") if name in case.params]
    prototypes = max((math.prod(h["last_layer"]["prototypes"].shape) for h in heads), default=0)
    return 2.0 * parameters(backbone) / depth * case.compute_bytes + 2.0 * prototypes * 2


def program(case: Case, gram: bool) -> Program:
    """FLOPs, traffic and collectives of one device in one step."""
    data, fsdp, tensor = case.mesh
    count, backbone = parameters(case.params), case.params["backbone"]
    again = sum(c * profiling.forward_flops(backbone, side)[0] for c, side in case.entries)
    again *= (1 - case.drop_path) if case.remat == "full" else 0.0
    flops = (case.work.executed + again) * case.images / (data * fsdp * tensor)
    passes = case.pieces * (3 + gram)  # student forward and backward, teacher, Gram teacher
    here = count / (fsdp * tensor)
    traffic = 40.0 * here  # gradient, weights, two moments and the teacher, read and written
    traffic += passes * count / tensor * case.compute_bytes
    for crops, side in case.entries:
        rows = case.images_here * case.pieces * crops
        traffic += 4 * rows * stack_entries(case._replace(remat="none"), side) * case.compute_bytes
    return Program(flops, flops, traffic, collectives(case, count, passes), (), 0)


def collectives(case: Case, count: int, passes: int) -> tuple[Collective, ...]:
    """Weights gathered for every pass, gradients scattered after each micro-batch."""
    data, fsdp, tensor = case.mesh
    along_fsdp = tuple(range(0, fsdp * tensor, tensor))
    found = []
    if fsdp > 1:
        weights = count * case.compute_bytes // (fsdp * tensor)
        found.append(Collective("all-gather", passes, weights, along_fsdp))
        found.append(Collective("reduce-scatter", case.pieces, 4 * count // tensor, along_fsdp))
    if data > 1:
        across = tuple(range(0, data * fsdp * tensor, fsdp * tensor))
        found.append(Collective("all-reduce", 1, 4 * count // (fsdp * tensor), across))
    if tensor > 1 and "blocks" in case.params["backbone"]:
        # Each branch of a block ends in a sum over the tensor axis, forward and backward.
        moved = 0.0
        for crops, side in case.entries:
            depth, d, *_, tokens = sizes(case.params["backbone"], side)
            moved += case.images_here * crops * tokens * d * case.compute_bytes
        runs = case.pieces * depth * (4 + 2 * (case.remat == "full"))
        found.append(Collective("all-reduce", runs, int(moved), tuple(range(tensor))))
    return tuple(found)


def estimated(
    config: ConfigDict,
    index: int,
    crops: tuple[int, int, int],
    topology: Topology,
    parts: Mapping[str, float],
) -> Found:
    """A step from shapes alone; `parts` is what `inputs.held` says."""
    began = time.perf_counter()
    case = case_of(config, index, crops, topology)
    return Found(
        "estimated from shapes",
        program(case, gram=bool(crops[2])),
        sum(parts.values()),
        temporaries(case) + parts["student"],  # and the gradients
        None,
        network.grid(topology),
        time.perf_counter() - began,
    )


def case_of(
    config: ConfigDict, index: int, crops: tuple[int, int, int], topology: Topology
) -> Case:
    """A step as the estimate sees it."""
    phase, model = config.phases[index], config.model
    networks = states.build_networks(config)
    params = jax.eval_shape(lambda key: states.init_params(networks, key), jax.random.key(0))
    only = phase.copy_and_resolve_references()
    only.crops.sizes, only.crops.probabilities = (crops,), (1.0,)
    long = min(crops[0], crops[2] or crops[0]) // configs.patch_stride(config) >= 23  # 512 tokens
    return Case(
        params,
        crops,
        phase.crops.locals,
        phase.batch_size,
        config.microbatches,
        inputs.mesh_shape(config, topology),
        model.remat,
        model.drop_path,
        inputs.attention_heads(config),
        np.dtype(jax.numpy.dtype(model.dtype)).itemsize,
        topology.platform == "gpu" or (topology.platform == "tpu" and long),
        train.work_per_image(config, networks, only),
    )
