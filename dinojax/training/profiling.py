"""What a step costs and how fast it runs: FLOPs per image, utilisation, waiting, energy.

FLOPs are counted from the shapes of the parameters alone: a kernel multiplies every token it sees,
so a pass costs 2 x entries x tokens, plus attention's two products. *Nominal* work is forward and
backward of the student (3 x forward), forward of teacher and Gram teacher, each once: nothing
recomputed, no chunking, all rows. *Executed* leaves out the rows that stochastic depth really
skips. Element-wise work (norms, softmax, Sinkhorn, the optimizer) is counted in neither.
"""

import contextlib
import functools
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Dense bf16 peak per device (FLOP/s) and board power (W; None: not published) by a part of the
# device kind, from the vendors' data sheets. Utilisation refers to the bf16 peak whatever the run's
# dtype.
DEVICES: dict[str, tuple[float, float | None]] = {
    "TPU v4": (275e12, 192.0),
    "TPU v5 lite": (197e12, None),
    "TPU v5e": (197e12, None),
    "TPU v5": (459e12, None),
    "TPU v5p": (459e12, None),
    "TPU v6 lite": (918e12, None),
    "TPU v6e": (918e12, None),
    "A100": (312e12, 400.0),
    "H100": (989e12, 700.0),
    "H100 PCIe": (756e12, 350.0),
    "H200": (989e12, 700.0),
    "B200": (2250e12, 1000.0),
    "L4": (121e12, 72.0),
    "L40S": (362e12, 350.0),
    "A10G": (70e12, 300.0),
    "A6000": (155e12, 300.0),
    "RTX 4090": (165e12, 450.0),
    "RTX 3090": (71e12, 350.0),
}
# Of data-centre energy: overhead of the building, and kg CO2-equivalent of a kWh, as in the carbon
# estimates of the DINOv2 and DINOv3 papers (US average).
BUILDING_OVERHEAD, KG_PER_KWH = 1.1, 0.385


class Work(NamedTuple):
    """FLOPs of one image in one training step."""

    nominal: float
    executed: float


class Speed(NamedTuple):
    """What a timer saw since the last look."""

    images_per_second: float
    mfu: float | None  # nominal FLOP/s over the peak; None where the peak is unknown
    executed_mfu: float | None
    data_wait: float  # fraction of the time spent waiting for a batch
    step_seconds: float
    eta_seconds: float
    goodput: float  # time the steps need at the best speed seen / time since the start
    peak_bytes: int | None


def forward_flops(backbone: Mapping[str, Any], side: int) -> tuple[float, float]:
    """(blocks, rest) of one forward pass of one square image of `side` pixels.

    `backbone`: parameters or their abstract shapes; a ViT (`blocks`) or a ConvNeXt (`stages0`...).
    """
    if "blocks" in backbone:
        patch = backbone["patch_embed"]["kernel"].shape[0]
        patches = (side // patch) ** 2
        tokens = 1 + patches
        if "storage_tokens" in backbone:
            tokens += backbone["storage_tokens"].shape[0]
        depth, width, _ = backbone["blocks"]["attn"]["qkv"]["kernel"].shape
        linear = 2.0 * tokens * _entries(backbone["blocks"])
        attention = 2.0 * 2 * depth * tokens**2 * width  # q k' and its product with v
        return linear + attention, 2.0 * patches * _entries(backbone["patch_embed"])
    blocks = rest = 0.0
    grid = side // 4
    for stage in range(4):
        between = backbone[f"downsample{stage}" if stage else "stem"]
        grid = grid // 2 if stage else grid
        rest += 2.0 * grid**2 * _entries(between)
        blocks += 2.0 * grid**2 * _entries(backbone[f"stages{stage}"])
    return blocks, rest


def head_flops(head: Mapping[str, Any]) -> float:
    """One forward pass of one row through a head, prototypes included."""
    return 2.0 * _entries(head)


def work_per_image(
    params: Mapping[str, Any],
    sizes: tuple[int, int, int],
    local_crops: int,
    masked: float,
    group: int,
    drop_path: float = 0.0,
    teacher: Mapping[str, Any] | None = None,
) -> Work:
    """FLOPs of one image in one training step.

    Args:
        params: `backbone` and, where their loss is on, `dino_head` and `ibot_head`.
        sizes: pixels of (global, local, Gram) crops; Gram 0: none.
        local_crops: their number; global crops are two.
        masked: mean number of masked patches of an image, over both its global crops.
        group, drop_path: stochastic depth keeps max(1, int(rows (1 - rate))) of a group's rows.
        teacher: the teacher's parameters where it is another network (distillation).
    """
    teacher = params if teacher is None else teacher
    large, small, anchor = sizes
    nominal = executed = 0.0
    for crops, side in ((2, large), (local_crops, small)):
        if crops:
            blocks, rest = forward_flops(params["backbone"], side)
            rows = group * crops
            kept = max(1, int(rows * (1 - drop_path))) / rows
            nominal += 3 * crops * (blocks + rest)
            executed += 3 * crops * (blocks * kept + rest)
    once = 2 * sum(forward_flops(teacher["backbone"], large))
    if anchor:
        once += 2 * sum(forward_flops(params["backbone"], anchor))
    if "dino_head" in params:
        once += 3 * (2 + local_crops) * head_flops(params["dino_head"])
        once += 2 * head_flops(teacher["dino_head"])
    if "ibot_head" in params:
        once += 3 * masked * head_flops(params["ibot_head"])
        once += masked * head_flops(teacher["ibot_head"])
    return Work(nominal + once, executed + once)


def _entries(tree: Mapping[str, Any]) -> float:
    """Entries of all matrices below: kernels and prototypes, stacked ones included."""
    total = 0.0
    for name, child in tree.items():
        if isinstance(child, Mapping):
            total += _entries(child)
        elif name in ("kernel", "prototypes"):
            total += math.prod(child.shape)
    return total


def device_table(kind: str) -> tuple[float, float | None] | None:
    """(bf16 FLOP/s, watts) of a device kind; the longest name contained in it counts."""
    found = [name for name in DEVICES if name.lower() in kind.lower()]
    return DEVICES[max(found, key=len)] if found else None


def peak_flops(dtype: str = "bfloat16") -> float | None:
    """FLOP/s that all devices of the run could do at best; None where that is unknown.

    Accelerators: from the table. CPUs: measured once with a product in `dtype`, accumulated in
    float32; the devices of a process share its cores and count as one.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured_cpu_peak(dtype) * jax.process_count()
    known = device_table(device.device_kind)
    return known[0] * jax.device_count() if known else None


@functools.cache
def _measured_cpu_peak(dtype: str, side: int = 1536, repeats: int = 5) -> float:
    device = jax.local_devices()[0]
    x = jax.device_put(np.ones((side, side), np.float32), device).astype(dtype)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    product(x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * side**3 / min(seconds)


class StepTimer:
    """Accumulates step and waiting times between two looks (`lap`).

    The step that compiles is left out of the first lap's speed, not out of goodput.
    """

    def __init__(self, batch_size: int, peak: float | None):
        self.batch_size, self.peak = batch_size, peak
        self.began = self.lap_began = time.perf_counter()
        self.steps = self.all_steps = 0
        self.waited = 0.0
        self.compiled = False
        self.best = math.inf
        self.speed: Speed | None = None

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the line that fetches the next batch."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def step(self) -> None:
        """After each dispatched step."""
        self.all_steps += 1
        if self.compiled:
            self.steps += 1
        else:
            self.compiled, self.waited = True, 0.0
            self.lap_began = time.perf_counter()

    def lap(self, step: int, last: int, work: Work) -> Speed:
        """The speed since the last lap; `step` of `last` are done. Starts a new lap.

        Without a step since then (a save asks for its row too) it is the last lap's.
        """
        if not self.steps and self.speed:
            left = max(last - step, 0) * self.speed.step_seconds
            return self.speed._replace(eta_seconds=left)
        now = time.perf_counter()
        elapsed = max(now - self.lap_began, 1e-9)
        seconds = elapsed / max(self.steps, 1)
        if self.steps:
            self.best = min(self.best, seconds)
        rate = self.steps * self.batch_size / elapsed
        self.speed = Speed(
            images_per_second=rate,
            mfu=rate * work.nominal / self.peak if self.peak else None,
            executed_mfu=rate * work.executed / self.peak if self.peak else None,
            data_wait=min(self.waited / elapsed, 1.0),
            step_seconds=seconds,
            eta_seconds=max(last - step, 0) * seconds,
            goodput=min(self.all_steps * self.best / max(now - self.began, 1e-9), 1.0),
            peak_bytes=peak_memory(),
        )
        self.steps, self.waited, self.lap_began = 0, 0.0, now
        return self.speed


def peak_memory() -> int | None:
    """Most bytes held so far: of the first device, or of the process where devices do not tell."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) * (1 if sys.platform == "darwin" else 1024)  # Linux counts in KiB


def energy(seconds: float) -> str | None:
    """A sentence on the energy and carbon of `seconds` on all devices; None where power is unknown.

    An upper estimate: full board power throughout, hosts left out.
    """
    known = device_table(jax.devices()[0].device_kind)
    if known is None or known[1] is None:
        return None
    count, watts = jax.device_count(), known[1]
    kwh = count * watts * seconds / 3.6e6
    return (
        f"about {kwh:.3g} kWh ({count} x {watts:.0f} W for {seconds / 3600:.2f} h), "
        f"{kwh * BUILDING_OVERHEAD * KG_PER_KWH:.3g} kg CO2e at an assumed building overhead of "
        f"{BUILDING_OVERHEAD} and {KG_PER_KWH} kg/kWh"
    )
