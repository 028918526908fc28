"""The least time that a collective takes on a torus of chips or on nodes of cards.

Called by `figures`.
"""

import itertools
from collections.abc import Sequence

from dinojax.planning.program import Collective
from dinojax.planning.topology import Device, Topology

HOP_SECONDS = 1e-6  # for a message to reach the next chip (scaling-book)


def grid(topology: Topology) -> list[tuple[int, ...]]:
    """Places in row-major order, for where the devices' own coordinates are not at hand."""
    return list(itertools.product(*(range(n) for n in topology.shape)))


def collective_seconds(
    collective: Collective, topology: Topology, places: Sequence[Sequence[int]]
) -> float:
    """Least time of a collective in one step: its bytes over the links that its group can use.

    `places` are the coordinates of the mesh's devices in the mesh's order.
    """
    if topology.platform == "cpu" or topology.count == 1:
        return 0.0
    group = [places[i] for i in collective.members] or list(places)
    if len(group) < 2:
        return 0.0
    extents = [len({place[axis] for place in group}) for axis in range(len(group[0]))]
    if topology.platform == "gpu":
        return _gpu_seconds(collective, topology.device, len(group), extents[0])
    return _torus_seconds(collective, topology, extents)


def _torus_seconds(collective: Collective, topology: Topology, extents: list[int]) -> float:
    device, received = topology.device, collective.received(topology.count)
    links, hops = [], 0
    for extent, length in zip(extents, topology.shape, strict=False):
        ring = device.wraps and length % device.wraps == 0 and extent == length
        links.append(0 if extent == 1 else 2 if ring else 1)
        hops += extent // 2 if ring else extent - 1
    latency = collective.runs * hops * HOP_SECONDS
    if collective.kind == "collective-permute":
        # Around a ring in both directions at once; a pair may lie several hops apart.
        return received / (2 * device.link) + collective.runs * HOP_SECONDS
    if collective.kind in ("all-to-all", "ragged-all-to-all"):
        # Half of everything crosses the middle of the longest axis.
        cuts = [n / (4 * used) for n, used in zip(extents, links, strict=False) if used]
        sent = collective.runs * collective.operand_bytes
        return sent * max(cuts) / device.link + latency
    return received / (sum(links) * device.link) + latency


def _gpu_seconds(collective: Collective, device: Device, group: int, nodes: int) -> float:
    received = collective.received(group)
    inside = received / device.link
    if nodes == 1:
        return inside
    # What comes from other nodes comes once and is passed on inside, except in an all-to-all.
    cards = 1 if "to-all" in collective.kind else group // nodes
    return max(inside, received * (nodes - 1) / nodes / (cards * device.network))
