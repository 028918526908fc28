"""Plan a run on devices that are not here: `python launch/plan.py --config X --topology T`.

Takes the command line of a run with --topology added, compiles the training step of every phase and
crop size ahead of time for it, and says what the run would need: memory, time, energy, host cores.

    --topology v5e:4x4 | v5p:4x8x8 | v6e:16x16    a TPU slice; compiled by libtpu, no TPU needed
    --topology gpu:h100x8                         estimated from shapes, unless such GPUs are here
    --topology cpu                                compiled for this machine
    --phase gram,highres                          these phases only
    --json FILE                                   the same figures for programs

Step times are rooflines: each of arithmetic, main memory and network alone, the longest counts and
the others are hidden behind it. No run reaches that; --reach=0.6 plans with 60 % of it.

Exit codes: 0 it fits; 1 it does not (what to change is printed); 2 the command or config cannot
work.
"""

import importlib.util
import json
import math
import os
import sys
from typing import Any

# `run` brings --config, and its sentences for misspelt keys. In a plan --workdir has no meaning.
import run
from absl import app, flags

TOPOLOGY = flags.DEFINE_string("topology", None, "What to plan for, e.g. v5p:4x8x8.")
JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")
ONLY = flags.DEFINE_list("phase", [], "Names of the phases to plan; default all.")
REACH = flags.DEFINE_float("reach", 1.0, "Part of the roofline that the run reaches.")
WATTS = flags.DEFINE_float("watts", None, "Power of one device, instead of what is known.")
PER_CORE = flags.DEFINE_float("images_per_core", None, "Images/s that one host core prepares.")
CODE = flags.DEFINE_bool("codegen", False, "Let libtpu generate code too: minutes more.")


def main(argv: list[str]) -> int:
    """Check, measure every step shape, print."""
    if len(argv) > 1:
        return run.refuse(f"unexpected argument {argv[1]!r}; values are --config.KEY=VALUE")
    for flag, example in ((run.CONFIG, "experiments/vit7b.py"), (TOPOLOGY, "v5p:4x8x8")):
        if flag.value is None:
            return run.refuse(f"--{flag.name} is missing; for example --{flag.name} {example}")
    if not 0 < REACH.value <= 1:
        return run.refuse(f"--reach is {REACH.value}; expected more than 0, at most 1")
    if JSON.value and not os.path.isdir(os.path.dirname(JSON.value) or "."):
        return run.refuse(f"--json is {JSON.value}; there is no {os.path.dirname(JSON.value)}")
    # Whatever is in this machine stays untouched, but for GPUs that are asked for.
    gpus = TOPOLOGY.value.startswith("gpu") and importlib.util.find_spec("jax_cuda12_plugin")
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if gpus else "cpu")
    try:
        found = plan()
    except ValueError as error:
        return run.refuse(str(error))
    if JSON.value:
        write(JSON.value, json.dumps(found, indent=1) + "\n")
    return 0 if found["fits"] else 1


def plan() -> dict[str, Any]:
    """All figures, printed on the way."""
    import jax
    from rich.console import Console

    from dinojax import config as configs
    from dinojax.planning import advice, estimate, figures, inputs, topology
    from dinojax.training import phases
    from dinojax.training import state as states

    config = configs.resolve(run.CONFIG.value)
    configs.validate(config)
    wanted = [i for i, p in enumerate(config.phases) if not ONLY.value or p.name in ONLY.value]
    for name in ONLY.value:
        names = [phase.name for phase in config.phases]
        if name not in names:
            raise ValueError(f"--phase is {name!r}; {configs.nearest(name, names)}")
    cpus = jax.device_count() if TOPOLOGY.value == "cpu" else 1
    target = topology.parse(TOPOLOGY.value, cpus)
    inputs.check(config, target)

    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    networks = states.build_networks(config)
    shapes = jax.eval_shape(lambda key: states.init_params(networks, key), jax.random.key(0))
    numbers = {name: estimate.parameters(tree) for name, tree in shapes.items()}
    mesh = dict(zip(("data", "fsdp", "tensor"), inputs.mesh_shape(config, target)))
    console.print(heading(target, mesh))
    console.print("parameters: " + ", ".join(f"{k} {in_words(v)}" for k, v in numbers.items()))
    console.print(phases.describe(config) + "\n")

    steps = []
    for index in wanted:
        for crops in config.phases[index].crops.sizes:
            step = figures.measure(config, index, tuple(crops), target, CODE.value)
            steps.append(step)
            console.print(
                f"{step.phase} {crop_names(step.sizes)}: {step.how} in {step.compile_seconds:.0f} s"
                + "".join(f"; {note}" for note in step.notes)
            )
    per_phase = figures.summarise(config, steps, REACH.value)
    cores = PER_CORE.value or figures.IMAGES_PER_CORE
    total = figures.total(per_phase, target, WATTS.value, cores)
    tables(console, steps, per_phase)
    for line in closing(total, target, per_phase, cores):
        console.print(line)
    worst = max(steps, key=lambda step: step.memory.total)
    found = None
    if not worst.fits:
        console.print(
            f"[bold]does not fit:[/bold] {worst.phase} {crop_names(worst.sizes)} needs "
            f"{gib(worst.memory.total)} of {gib(worst.memory.limit)} a device"
        )
        found = advice.advise(config, worst, target)
        console.print(recommend(found))
    return {
        "topology": target.spec,
        "devices": target.count,
        "device": target.device.kind,
        "mesh": mesh,
        "jax": jax.__version__,
        "parameters": numbers,
        "steps": [record(step) for step in steps],
        "phases": [phase._asdict() for phase in per_phase],
        "reach": REACH.value,
        "total": total._asdict(),
        "fits": worst.fits,
        "advice": found and {"change": found.change, "step": record(found.step)},
    }


def write(path: str, text: str) -> None:
    """The whole file or none of it."""
    with open(f"{path}.part", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.part", path)


# ---- words --------------------------------------------------------------------------------------


def heading(topology: Any, mesh: dict[str, int]) -> str:
    axes = " ".join(f"{name}={size}" for name, size in mesh.items())
    return f"{topology.spec}: {topology.count} x {topology.device.kind}, mesh {axes}"


def closing(total: Any, topology: Any, per_phase: Any, cores: float) -> list[str]:
    """The whole run in sentences."""
    reached = "at the roofline" if REACH.value == 1 else f"at {REACH.value:.0%} of the roofline"
    lines = [f"{', '.join(phase.name for phase in per_phase)} {reached}: {hours(total.hours)}"]
    if topology.count > 1:
        lines[0] += f", {total.device_hours:,.0f} device hours"
    if total.kwh is not None:
        known = "" if total.power_published else ", assumed: --watts" * (WATTS.value is None)
        lines.append(
            f"energy: {total.kwh:,.3g} kWh ({topology.count} x {total.watts:.0f} W{known}, hosts "
            f"left out), {total.kg_co2e:,.3g} kg CO2e"
        )
    lines.append(
        f"input: {math.ceil(total.host_cores):,} host cores, at {cores:.0f} images/s a core "
        "(--images_per_core)"
    )
    return lines


def recommend(advice: Any) -> str:
    """What to change, in one sentence."""
    if advice is None:
        return "nothing cheaper was found that fits: a smaller model, or fewer or smaller crops"
    step = advice.step
    verb = "use" if advice.change.startswith("--topology") else "add"
    return (
        f"{verb} {advice.change} ({gib(step.memory.total)} of {gib(step.memory.limit)} a device, "
        f"{step.step_seconds:.3g} s a step; {step.how})"
    )


def tables(console: Any, steps: list[Any], per_phase: Any) -> None:
    """Times and work by step shape, memory and collectives by the largest shape of each phase."""
    from rich.table import Table

    def table(title: str, *columns: str) -> Any:
        made = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for i, name in enumerate(columns):
            made.add_column(name, justify="right" if i else "left", no_wrap=True)
        return made

    times = table(
        "\nA step: each term alone, in seconds",
        *("phase, crops", "compute", "memory", "network", "bound by", "images/s"),
    )
    for step in steps:
        terms = [f"{step.seconds[k]:.3g}" if k in step.seconds else "-" for k in TERMS]
        rate = f"{step.batch / step.step_seconds:,.0f}"
        times.add_row(f"{step.phase} {crop_names(step.sizes)}", *terms, step.bound, rate)
    console.print(times)

    work = table(
        "\nFLOPs of an image (nominal: as papers count; executed: without skipped rows)",
        *("phase", "nominal", "executed", "as compiled", "s a step", "hours"),
    )
    for phase in per_phase:
        flops = (phase.nominal_per_image, phase.executed_per_image, phase.compiled_per_image)
        time = (f"{phase.step_seconds:.3g}", f"{phase.hours:,.1f}")
        work.add_row(phase.name, *(f"{value:.3g}" for value in flops), *time)
    console.print(work)

    largest = {s.phase: s for s in sorted(steps, key=lambda s: s.memory.total)}
    chosen = [largest[phase.name] for phase in per_phase]
    columns = [f"{step.phase} {crop_names(step.sizes)}" for step in chosen]
    memory = table("\nMemory of one device, GiB", "", *columns)
    for part in dict.fromkeys(name for step in chosen for name in step.memory.parts):
        cells = [step.memory.parts.get(part, 0.0) for step in chosen]
        if max(cells) > 0:
            memory.add_row(part, *(f"{cell / 2**30:.2f}" for cell in cells))
    memory.add_row("all", *(f"{step.memory.total / 2**30:.2f}" for step in chosen))
    memory.add_row("of", *(f"{step.memory.limit / 2**30:.2f}" for step in chosen))
    console.print(memory)

    if any(step.collectives for step in chosen):
        moved = table("\nCollectives of a step: runs, GB into a device", "", *columns)
        for kind in sorted({kind for step in chosen for kind in step.collectives}):
            cells = [step.collectives.get(kind) for step in chosen]
            moved.add_row(kind, *(f"{c[0]:,}, {c[1] / 1e9:.3g}" if c else "-" for c in cells))
        console.print(moved)
    console.print()


TERMS = ("compute", "memory", "network")


def record(step: Any) -> dict[str, Any]:
    """A step for JSON."""
    return {
        **step._asdict(),
        "memory": step.memory._asdict(),
        "bound": step.bound,
        "step_seconds": step.step_seconds,
        "fits": step.fits,
    }


def crop_names(sizes: tuple[int, int, int]) -> str:
    return "+".join(str(size) for size in sizes if size)


def gib(number: float) -> str:
    return f"{number / 2**30:.2f} GiB"


def hours(number: float) -> str:
    return f"{number:,.1f} hours" + (f" ({number / 24:,.1f} days)" if number > 48 else "")


def in_words(number: float) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,}"


def parse(argv: list[str]) -> list[str]:
    """As a run's, with this file's help."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        sys.exit(0)
    return run.parse(argv)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
