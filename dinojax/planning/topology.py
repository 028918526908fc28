"""Devices by name and how they are wired: `v5p:4x8x8`, `gpu:h100x8`, `cpu`. Numbers, no backend.

Peak FLOP/s and power are `profiling.DEVICES`; here is what else a plan needs. Sources:

- memory of a TPU: what the compiler of libtpu 0.0.52 itself allows a program ("exceeds available
  HBM (15.75G)"); of a GPU: its data sheet, of which JAX takes three quarters unless
  XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise;
- bandwidths of TPUs: Google's system-architecture pages and "How to Scale Your Model"
  (jax-ml/scaling-book), whose links are one-way and a tenth below the nominal;
- bandwidths of GPUs: NVIDIA's data sheets; 400 Gbit/s of network for each GPU of the H100
  generation, 200 for the A100 (DGX systems).

Called by `launch/plan.py` and the rest of `planning`.
"""

import difflib
import math
import os
import re
from typing import NamedTuple

from dinojax.training import profiling

GIB = 2.0**30
JAX_GPU_SHARE = 0.75  # of a GPU's memory, by default


class Device(NamedTuple):
    """One chip or card."""

    kind: str  # the key of profiling.DEVICES
    memory: float  # bytes that a program may take
    bandwidth: float | None  # bytes/s of main memory; None: not known
    link: float  # bytes/s one way: of one link of a torus, or of a card to its node
    network: float = 0.0  # bytes/s one way out of the node, for each card
    axes: int = 1  # dimensions of the torus
    wraps: int = 0  # an axis closes to a ring where its length is a multiple of this; 0: never

    @property
    def flops(self) -> float | None:
        """bf16 peak; None where it must be measured."""
        known = profiling.DEVICES.get(self.kind)
        return known[0] if known else None


TPUS = {
    "v4": Device("TPU v4", 30.75 * GIB, 1.2e12, 4.5e10, axes=3, wraps=4),
    "v5e": Device("TPU v5e", 15.75 * GIB, 8.2e11, 4.5e10, axes=2, wraps=16),
    "v5p": Device("TPU v5p", 95.73 * GIB, 2.765e12, 9e10, axes=3, wraps=4),
    "v6e": Device("TPU v6e", 31.24 * GIB, 1.6e12, 9e10, axes=2, wraps=16),
}
GPUS = {
    "a100": Device("A100", 80e9, 2.04e12, 3e11, 2.5e10),
    "h100": Device("H100", 80e9, 3.35e12, 4.5e11, 5e10),
    "h200": Device("H200", 141e9, 4.8e12, 4.5e11, 5e10),
    "b200": Device("B200", 180e9, 8e12, 9e11, 5e10),
    "l4": Device("L4", 24e9, 3e11, 3.2e10, 1.25e10),
    "l40s": Device("L40S", 48e9, 8.64e11, 3.2e10, 1.25e10),
    "a10g": Device("A10G", 24e9, 6e11, 3.2e10, 1.25e10),
    "rtx4090": Device("RTX 4090", 24e9, 1.008e12, 3.2e10, 1.25e10),
}
GPUS_IN_NODE = 8
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # v5e, v6e
SMALL_SOLID = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")  # v4, v5p; beyond, multiples of 4
LARGEST_SOLID = 6144  # chips of one slice

# Google has published the power of TPUs up to v4 (192 W at most). v5e and v5p are taken at v4's
# watts for a FLOP/s, v6e at 1.67 times the FLOPs of v5e for a joule that its announcement claims.
ASSUMED_WATTS = {"TPU v5e": 138.0, "TPU v5p": 320.0, "TPU v6e": 384.0}


class Topology(NamedTuple):
    """Devices and the grid they form."""

    spec: str
    platform: str  # tpu | gpu | cpu
    device: Device
    shape: tuple[int, ...]  # chips along the axes of the torus; (nodes, cards of a node); (1,)

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def parse(spec: str, cpu_devices: int = 1) -> Topology:
    """The topology a string names.

    Raises:
      ValueError: no such topology, with the nearest that exists.
    """
    if spec == "cpu":
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return Topology(spec, "cpu", Device("cpu", memory, None, 0.0), (cpu_devices,))
    name, _, rest = spec.partition(":")
    if name == "gpu":
        return _parse_gpu(spec, rest)
    if name not in TPUS:
        close = difflib.get_close_matches(name, TPUS, 1, 0.5)
        near = [f"{n}:{_nearest_shape(rest, TPUS[n].axes)}" for n in close or TPUS]
        near += [] if close else ["gpu:h100x8", "cpu"]
        raise ValueError(f"--topology is {spec!r}; nearest: {', '.join(near)}")
    device = TPUS[name]
    if not _exists(_sides(rest), device.axes):
        raise ValueError(
            f"--topology is {spec!r}, which is no slice of {name} (such as "
            f"{', '.join(_shapes(device.axes)[2:6])}); nearest: "
            f"{name}:{_nearest_shape(rest, device.axes)}"
        )
    return Topology(spec, "tpu", device, _sides(rest))


def _parse_gpu(spec: str, rest: str) -> Topology:
    match = re.fullmatch(r"([a-z0-9]+?)(?:x(\d+))?", rest)
    name, count = (match[1], int(match[2] or 1)) if match else (rest, 1)
    if name not in GPUS:
        close = difflib.get_close_matches(name, GPUS, 1, 0.4)
        near = f"gpu:{close[0]}x{count}" if close else f"gpu:NAMExN with NAME {', '.join(GPUS)}"
        raise ValueError(f"--topology is {spec!r}; nearest: {near}")
    if count < 1 or (count > GPUS_IN_NODE and count % GPUS_IN_NODE):
        near = max(1, round(count / GPUS_IN_NODE) * GPUS_IN_NODE)
        raise ValueError(
            f"--topology is {spec!r}; expected 1 to {GPUS_IN_NODE} cards or whole nodes of "
            f"{GPUS_IN_NODE}; nearest: gpu:{name}x{near}"
        )
    nodes = max(1, count // GPUS_IN_NODE)
    return Topology(spec, "gpu", GPUS[name], (nodes, count // nodes))


def _sides(text: str) -> tuple[int, ...]:
    """(4, 8, 8) of "4x8x8"; () of anything else."""
    return tuple(map(int, text.split("x"))) if re.fullmatch(r"\d+(x\d+)*", text) else ()


def _nearest_shape(text: str, axes: int) -> str:
    """The shape whose number of chips is nearest in proportion; 16 chips where none can be read."""
    count = max(math.prod(_sides(text)), 1) if _sides(text) else 16
    return min(_shapes(axes), key=lambda shape: abs(math.log(_count(shape) / count)))


def _exists(shape: tuple[int, ...], axes: int) -> bool:
    if len(shape) != axes:
        return False
    if axes == 2:
        return "x".join(map(str, sorted(shape))) in FLAT
    small = {tuple(sorted(map(int, s.split("x")))) for s in SMALL_SOLID}
    whole = all(n and n % 4 == 0 for n in shape) and math.prod(shape) <= LARGEST_SOLID
    return whole or tuple(sorted(shape)) in small


def _shapes(axes: int) -> tuple[str, ...]:
    """Shapes to suggest, small ones first."""
    if axes == 2:
        return FLAT
    cubes = ("4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24")
    return (*SMALL_SOLID, *cubes)


def _count(text: str) -> int:
    return math.prod(_sides(text))


def larger(topology: Topology) -> list[str]:
    """Specs of the same device with more of them, nearest first."""
    if topology.platform == "tpu":
        name = topology.spec.partition(":")[0]
        shapes = _shapes(topology.device.axes)
        return [f"{name}:{s}" for s in shapes if _count(s) > topology.count]
    if topology.platform == "gpu":
        name = re.match(r"gpu:([a-z0-9]+?)(?:x\d+)?$", topology.spec)[1]
        return [f"gpu:{name}x{n}" for n in (2, 4, 8, 16, 32, 64, 128, 256) if n > topology.count]
    return []


def limit(topology: Topology) -> float:
    """Bytes that a program may take on one device."""
    share = JAX_GPU_SHARE if topology.platform == "gpu" else 1.0
    return topology.device.memory * share / (topology.count if topology.platform == "cpu" else 1)


def watts(topology: Topology) -> tuple[float, bool] | None:
    """(power of one device, whether it is published); None for a CPU."""
    known = profiling.DEVICES.get(topology.device.kind)
    if known is None:
        return None
    published = known[1] is not None
    return (known[1] if published else ASSUMED_WATTS[topology.device.kind]), published
