"""`launch/run.py --preflight`: can these hosts do this run together? Minutes before hours.

Every host makes the same checks and tells the others, so all print the same faults and end with the
same code. That config and code are the same everywhere has been seen before (`hosts.Team.agree`),
as at every start of a run.
"""

import hashlib
import json
import secrets
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dinojax import config as configs
from dinojax import hosts, sharding, train

CLOCK_SECONDS = 10.0  # more between two hosts mixes up logs; cloud tokens fail at some minutes


class Check(NamedTuple):
    """One line of the report; `fault` is "" where all is well."""

    name: str
    seen: str
    fault: str = ""


def check(run: train.Run, team: hosts.Team) -> int:
    """Make all checks and print them; 0: the run can start, 1: it cannot."""
    config = hashlib.sha256(json.dumps(configs.flatten(run.config)).encode()).hexdigest()[:12]
    done = [Check("config and code", f"{config}, dinojax {hosts.code_version()}")]
    steps: tuple[Callable[[train.Run, hosts.Team], Check], ...]
    steps = (add_up, share_data, write, compare_clocks)
    done += [step(run, team) for step in steps]
    for name, seen, fault in done:
        if team.index == 0:
            print(f"{'no' if fault else 'ok':3} {name}: {fault or seen}", flush=True)
    faults = [f"{one.name}: {one.fault}" for one in done if one.fault]
    for fault in faults:
        print(f"error: preflight: {fault}", file=sys.stderr)
    return 1 if faults else 0


def add_up(run: train.Run, team: hosts.Team) -> Check:
    """An all-reduce: every device gives its place in the mesh, all get the same sum."""
    count = run.mesh.size
    split = jax.sharding.NamedSharding(run.mesh, jax.sharding.PartitionSpec(sharding.AXES))
    ranks = np.arange(count, dtype=np.int32)
    placed = jax.make_array_from_callback((count,), split, lambda index: ranks[index])
    total = jax.jit(jnp.sum, out_shardings=sharding.replicated(run.mesh))(placed)
    began = time.perf_counter()
    found, wanted = int(total), count * (count - 1) // 2
    took = time.perf_counter() - began
    seen = f"the ranks of {count} devices add up to {found}"
    fault = "" if found == wanted else f"{seen}, not to {wanted}"
    return Check("all-reduce", f"{seen} ({took:.2f} s)", fault)


def share_data(run: train.Run, team: hosts.Team) -> Check:
    """All hosts see the same data, and share out the rows of a batch without gap or overlap."""
    parts = [f"{len(part.source)} {part.source.name(0)}" for part in run.data.components]
    phase = run.config.phases[0]
    batches = train.phase_batches(run.config, run.data, 0, run.mesh)
    rows = run.data.rows(batches.seed, 0, phase.batch_size, 0, phase.batch_size)
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(column).tobytes() for column in rows))
    told = json.dumps([parts, digest.hexdigest(), sharding.local_runs(run.mesh)])
    everyone = [json.loads(text) for text in team.exchange("data", told)]
    for name, (those, order, _) in zip(team.names, everyone):
        if those != everyone[0][0]:
            return Check("data", "", f"{name} sees {those} and {team.names[0]} {everyone[0][0]}")
        if order != everyone[0][1]:
            return Check("data", "", f"{name} draws other images than {team.names[0]}")
    held = [tuple(runs) for _, _, (runs, _) in everyone]
    distinct = set(held)  # along the tensor axis, hosts may hold the same rows
    total = max(of for _, _, (_, of) in everyone)
    if sorted(run for runs in distinct for run in runs) != list(range(total)):
        return Check("data", "", f"the hosts hold the parts {held} of {total}, not each one once")
    images = sum(len(part.source) for part in run.data.components)
    return Check("data", f"{images:,} images, a batch shared out in {len(distinct)} parts")


def write(run: train.Run, team: hosts.Team) -> Check:
    """Every host can write into the run's directory, and it is the same directory."""
    home, name = run.home, ".preflight"
    fault = ""
    try:
        home.check_writable()
    except ValueError as error:
        fault = str(error)
    token = team.exchange("token", secrets.token_hex(8))[0]
    if team.index == 0 and not fault:
        home.write_text(name, token)
    team.exchange("token is written", "")
    if not fault and home.read_text(name) != token:
        fault = f"{home.where} is not the same directory as on {team.names[0]}"
    everyone = team.exchange("token is read", fault)
    if team.index == 0 and not fault:
        home.remove(name)
    faults = [f"{host}: {text}" for host, text in zip(team.names, everyone) if text]
    return Check("workdir", f"{home.where} can be written by every host", "; ".join(faults))


def compare_clocks(run: train.Run, team: hosts.Team) -> Check:
    """The hosts' clocks tell about the same time."""
    team.exchange("clocks", "")  # a meeting, so that all look at about the same moment
    times = [float(text) for text in team.exchange("time", repr(time.time()))]
    apart = max(times) - min(times)
    fault = ""
    if apart > CLOCK_SECONDS:
        late, early = team.names[int(np.argmin(times))], team.names[int(np.argmax(times))]
        fault = f"{late} is {apart:.0f} s behind {early}; set the clocks (NTP)"
    return Check("clocks", f"{apart:.2f} s apart", fault)
