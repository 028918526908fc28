"""The training step in plain PyTorch, to time ours against: no part of the project, no test.

ViT-S/16, batch 4, two 224-pixel and eight 96-pixel crops, K = 4,096 prototypes in both heads,
float32, without stochastic depth and augmentation. Teacher and student forward passes, Sinkhorn,
DINO, iBOT and KoLeo losses, optionally a Gram teacher at 448 pixels; backward, clipping by network,
AdamW, EMA (training spec 1 to 6). Written for speed where PyTorch has a faster way: fused attention
and AdamW, multi-tensor EMA, teacher without autograd.

    python tests/benchmarks/torch_step.py [--what step|gram|forward] [--steps 10] [--json FILE]
"""

import argparse
import copy
import json
import math
import resource
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, DEPTH, HEADS, PATCH = 384, 12, 6, 16
BATCH, LOCALS, PROTOTYPES, BOTTLENECK, HIDDEN = 4, 8, 4096, 256, 2048


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((WIDTH,), 1e-5)) for _ in range(2))

    def forward(self, x, sin, cos):
        n, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, sin, cos), rotate(k, sin, cos)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.gamma1 * self.proj(attended)
        return x + self.gamma2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


def rotate(x, sin, cos):
    """RoPE on all tokens but the first (CLS)."""
    patches = x[:, :, 1:]
    a, b = patches.chunk(2, dim=-1)
    patches = patches * cos + torch.cat([-b, a], dim=-1) * sin
    return torch.cat([x[:, :, :1], patches], dim=2)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.mask_token = nn.Parameter(torch.zeros(1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        frequencies = WIDTH // HEADS // 4
        self.register_buffer("periods", 100.0 ** (torch.arange(frequencies) / frequencies))

    def forward(self, images, mask=None):
        """CLS [n, d] and patches [n, p, d] after the norm."""
        x = self.patch_embed(images)
        rows, cols = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token[None], x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        sin, cos = self.rope(rows, cols)
        for block in self.blocks:
            x = block(x, sin, cos)
        x = self.norm(x)
        return x[:, 0], x[:, 1:]

    def rope(self, rows, cols):
        y, x = (2 * (torch.arange(n) + 0.5) / n - 1 for n in (rows, cols))
        place = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2, 1)
        angles = (2 * math.pi * place / self.periods).reshape(rows * cols, -1).tile(2)
        return angles.sin(), angles.cos()


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(HIDDEN, BOTTLENECK))
        self.last_layer = nn.Linear(BOTTLENECK, PROTOTYPES, bias=False)

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.dino_head, self.ibot_head = Backbone(), Head(), Head()


def sinkhorn(logits, temperature=0.05, iterations=3):
    q = (logits / temperature - (logits / temperature).max()).exp()
    for _ in range(iterations):
        q = q / q.sum(dim=0, keepdim=True)
        q = q / q.sum(dim=1, keepdim=True)
    return q


def cross_entropy(teacher, student):
    """[t, b, k] targets and [s, b, k] logits -> [s, t] sums over the images."""
    return -torch.einsum("tbk,sbk->st", teacher, F.log_softmax(student / 0.1, dim=-1))


def koleo(x):
    x = F.normalize(x, eps=1e-8)
    with torch.no_grad():
        dots = (x @ x.T).fill_diagonal_(-1)
        nearest = dots.argmax(dim=1)
    return -(((x - x[nearest] + 1e-8).norm(dim=1)) + 1e-8).log().mean()


def gram_loss(student, teacher, grid):
    """Teacher patches of a twice finer grid, resized to the student's."""
    n, p, d = teacher.shape
    fine = math.isqrt(p)
    teacher = teacher.transpose(1, 2).reshape(n, d, fine, fine)
    teacher = F.interpolate(teacher, (grid, grid), mode="bicubic", align_corners=False)
    teacher = F.normalize(teacher.flatten(2).transpose(1, 2), dim=-1)
    student = F.normalize(student, dim=-1)
    return (student @ student.transpose(1, 2) - teacher @ teacher.transpose(1, 2)).square().mean()


def make_masks():
    """Half of the 2B crops masked, with exactly the recipe's counts."""
    patches = (224 // PATCH) ** 2
    masks = torch.zeros(2 * BATCH, patches, dtype=torch.bool)
    for row, ratio in enumerate(torch.linspace(0.1, 0.5, BATCH + 1)[1:]):
        masks[2 * row, torch.randperm(patches)[: int(patches * ratio)]] = True
    return masks


def losses(student, teacher, gram, images, masks):
    """The total loss; crops are crop-major, as the reference has them."""
    large, small, anchor = images
    where = masks.flatten().nonzero()[:, 0]
    weights = (1 / masks.sum(dim=1).clamp(min=1))[:, None].expand_as(masks).flatten()[where]
    with torch.no_grad():
        cls, patches = teacher.backbone(large)
        targets = sinkhorn(teacher.dino_head(cls)).view(2, BATCH, -1)
        masked_targets = sinkhorn(teacher.ibot_head(patches.flatten(0, 1)[where]))
    cls, patches = student.backbone(large, masks)
    local_cls, _ = student.backbone(small)
    logits = student.dino_head(torch.cat([cls, local_cls]))
    of_global = cross_entropy(targets, logits[: 2 * BATCH].view(2, BATCH, -1))
    of_local = cross_entropy(targets, logits[2 * BATCH :].view(LOCALS, BATCH, -1))
    total = 16 / 18 * of_local.mean() / BATCH
    total = total + 2 / 18 * (of_global.sum() - of_global.trace()) / (2 * BATCH)
    total = total + 0.1 * sum(koleo(one) for one in cls.chunk(2))
    masked = F.log_softmax(student.ibot_head(patches.flatten(0, 1)[where]) / 0.1, dim=-1)
    total = total - ((masked_targets * masked).sum(dim=-1) * weights).sum() / (2 * BATCH)
    if gram is not None:
        with torch.no_grad():
            anchored = gram(anchor)[1]
        total = total + gram_loss(patches, anchored, 224 // PATCH)
    return total


def make_step(with_gram):
    """A function that makes one whole training step on fixed data and returns the loss."""
    student = Student()
    teacher = copy.deepcopy(student).requires_grad_(False)
    gram = copy.deepcopy(teacher.backbone) if with_gram else None
    decayed = [p for p in student.parameters() if p.ndim > 1]
    plain = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.04}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.999), fused=True)
    sizes = [(2, 224), (LOCALS, 96), (2, 448 if with_gram else 16)]
    images = [torch.randn(views * BATCH, 3, size, size) for views, size in sizes]
    masks = make_masks()

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = losses(student, teacher, gram, images, masks)
        loss.backward()
        for network in (student.backbone, student.dino_head, student.ibot_head):
            nn.utils.clip_grad_norm_(network.parameters(), 3.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - 0.992)
        return loss.item()

    return step


def make_forward():
    """The backbone's forward pass alone on 8 images of 224 pixels."""
    backbone, images = Backbone().eval(), torch.randn(8, 3, 224, 224)

    def forward():
        with torch.inference_mode():
            return backbone(images)[0].sum().item()

    return forward


def measure(run, steps):
    """Times `run` after two calls for warming up; the figures `compare_step.py` reads."""
    seconds, values = [], []
    for index in range(steps + 2):
        started = time.perf_counter()
        values.append(run())
        if index > 1:
            seconds.append(time.perf_counter() - started)
    return {
        "seconds_per_step": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "first_and_last": [values[0], values[-1]],
    }


def command_line(doc):
    """The flags all PyTorch peers take."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--what", choices=("step", "gram", "forward"), default="step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json")
    return parser


def report(figures, file):
    print(json.dumps(figures))
    if file:
        with open(file, "w") as out:
            json.dump(figures, out, indent=1)


def main():
    options = command_line(__doc__).parse_args()
    torch.manual_seed(0)
    run = make_forward() if options.what == "forward" else make_step(options.what == "gram")
    report(measure(run, options.steps), options.json)


if __name__ == "__main__":
    main()
