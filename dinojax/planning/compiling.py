"""The training step compiled: by XLA for devices of this machine, by libtpu for TPUs elsewhere.

For a TPU that is done in a process of its own, from which the compiler's dumps are read: the
optimised program and the memory it assigned. Code generation comes after that and takes most of the
time (7B Gram step for 256 v5p chips, on shared cores: 1 minute before it, 13 with it), so the
process is ended there unless asked otherwise. Called by `figures`.
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
import time

import jax
from ml_collections import ConfigDict

from dinojax import sharding
from dinojax.planning import inputs, network, program
from dinojax.planning.program import Found
from dinojax.planning.topology import Topology

# Without these libtpu looks for a TPU and its pod before it compiles for another, and lets no other
# process compile meanwhile.
ALONE = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CHILD = "import sys; from dinojax.planning import compiling; compiling.child(sys.argv[1])"
# Ends of the names of what the compiler leaves: the program, its memory, the last before code.
PROGRAM, MEMORY, LAST = "", "-buffer-assignment", "_after_buffer_assignment"


def compile_here(
    config: ConfigDict, index: int, crops: tuple[int, int, int], topology: Topology
) -> Found:
    """Compiled for devices of this machine."""
    began = time.perf_counter()
    mesh = sharding.make_mesh(
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor, jax.devices()[: topology.count]
    )
    compiled = inputs.lower(config, index, crops, mesh).compile()
    return Found(
        f"compiled for the {jax.default_backend().upper()} here",
        program.read(compiled.as_text()),
        **analysis(compiled),
        places=network.grid(topology),
        seconds=time.perf_counter() - began,
    )


def compile_for_tpu(
    config: ConfigDict,
    index: int,
    crops: tuple[int, int, int],
    topology: Topology,
    code: bool = False,
) -> Found:
    """Compiled by libtpu in another process, up to code generation or, with `code`, through it.

    Raises:
      ValueError: libtpu is not installed, or it refused.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology {topology.spec} needs libtpu, which compiles for TPUs without one: "
            "pip install 'dinojax[plan]'"
        )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dinojax-plan-") as name:
        folder = pathlib.Path(name)
        (folder / "job").write_bytes(pickle.dumps((config, index, crops, topology)))
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", CHILD, name],
                env={**os.environ, **ALONE},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                while process.poll() is None and (code or not dumped(folder, LAST)):
                    time.sleep(0.1)
            finally:
                process.kill()
                process.wait()
        if not dumped(folder, PROGRAM):
            raise ValueError(f"libtpu cannot compile for {topology.spec}: {reason(folder)}")
        return read_dump(folder, time.perf_counter() - began)


def child(name: str) -> None:
    """The other process: compile and leave the compiler's dumps and what it says in `name`."""
    folder = pathlib.Path(name)
    from jax.experimental import topologies

    config, index, crops, topology = pickle.loads((folder / "job").read_bytes())
    # v4 chips hold two cores that work as one device; other chips are one device anyway.
    options = {"chip_config_name": "megacore"} if topology.device.kind == "TPU v4" else {}
    described = topologies.get_topology_desc(topology.spec, "tpu", **options)
    mesh = sharding.make_mesh(
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor, described.devices
    )
    places = [[int(c) for c in device.coords] for device in mesh.devices.flat]
    (folder / "places").write_text(json.dumps(places))
    lowered = inputs.lower(config, index, crops, mesh)
    compiled = lowered.compile({"xla_dump_to": str(folder / "dump"), "xla_dump_hlo_as_text": True})
    (folder / "analysis").write_text(json.dumps(analysis(compiled)))


def analysis(compiled: jax.stages.Compiled) -> dict[str, float]:
    """The compiler's own account of a device's bytes."""
    memory = compiled.memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "arguments": float(memory.argument_size_in_bytes),
        "temporaries": float(memory.temp_size_in_bytes + kept),
        "code": float(memory.generated_code_size_in_bytes),
    }


def dumped(folder: pathlib.Path, what: str) -> list[pathlib.Path]:
    """The compiler's dumps of the optimised step whose names end so."""
    return list((folder / "dump").glob(f"*.after_optimizations{what}.txt"))


def reason(folder: pathlib.Path) -> str:
    """The last line of what the other process said."""
    lines = [line for line in (folder / "log").read_text(errors="replace").splitlines() if line]
    return re.sub(r"^[\w.]+(Error|Exception): ", "", lines[-1]) if lines else "it said nothing"


def read_dump(folder: pathlib.Path, seconds: float) -> Found:
    """Program and memory out of the compiler's dumps, which are there even if it does not fit."""
    text = dumped(folder, PROGRAM)[0].read_text()
    allocations = dumped(folder, MEMORY)[0].read_text()
    arguments = total = 0.0
    # "allocation 3: size 32, page 0, parameter 7, ..."; what is not in main memory has a "color".
    for size, rest in re.findall(r"^allocation \d+: size (\d+), page (.*)$", allocations, re.M):
        total += float(size) * ("thread-local" not in rest)
        arguments += float(size) * ("parameter" in rest)
    memory = {"arguments": arguments, "temporaries": total - arguments, "code": None}
    how = f"compiled by libtpu {importlib.metadata.version('libtpu')}, code not generated"
    if (folder / "analysis").exists():
        memory = json.loads((folder / "analysis").read_text())
        how = how.removesuffix(", code not generated")
    places = json.loads((folder / "places").read_text())
    return Found(how, program.read(text), **memory, places=places, seconds=seconds)
