"""Our training step against PyTorch's, in turn on the same machine: A B A B.

    python tests/benchmarks/compare_step.py --torch-python /path/to/python [--reference CHECKOUT] \
        [--what step|gram|forward] [--libraries transformers,timm] [--rounds 3] [--steps 10]
        [--json FILE] [-- MORE FLAGS OF OURS]

Cores are often shared, so the result is the ratio of neighbouring runs (theirs / ours: above 1 ours
is faster, or smaller); the load average before each run is recorded. Ours is `launch/bench.py` on
the ViT-L recipes brought down to ViT-S/16, batch 4, K = 4,096, float32, without stochastic depth
and with the photometric probabilities at 0, which leaves their kernels out; theirs is
`torch_step.py`, and with `--reference` the public reference implementation too. The forward pass
(8 images) also has `--libraries`: what those two give, as they are and compiled.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SMALL = {
    "model.variant": "small",
    "model.dtype": "float32",
    "model.drop_path": 0.0,
    "model.remat": "dots_no_batch",
    "model.storage_tokens": 0,
    "batch_size": 4,
    "group": 4,
    "microbatches": 1,
    "dino_head.prototypes": 4096,
    "ibot_head.prototypes": 4096,
    "augment.flip": 0.0,
    "augment.jitter": 0.0,
    "augment.grayscale": 0.0,
    "augment.blur": "(0.0,0.0,0.0)",
    "augment.solarize": "(0.0,0.0,0.0)",
}
# The Gram case: the second phase of the three-phase recipe, its teacher at twice the resolution.
GRAM = {
    "phases[1].crops.sizes": "((224,96,448),)",
    "phases[1].crops.probabilities": "(1.0,)",
    "phases[2].group": 4,  # not run, but the whole config must be valid
    "phases[2].losses.koleo_group": 4,
}


def our_command(what: str, steps: int, more: list[str]) -> list[str]:
    experiment = "gram_vitl.py" if what == "gram" else "pretrain_vitl.py"
    changes = {**SMALL, **(GRAM if what == "gram" else {})}
    return [
        *(sys.executable, "launch/bench.py", f"--config=experiments/{experiment}"),
        *(f"--config.{key}={value}" for key, value in changes.items()),
        *(f"--phase={int(what == 'gram')}", f"--steps={steps}"),
        *(["--features"] if what == "forward" else []),
        *more,
    ]


def run(command: list[str]) -> dict[str, Any]:
    """Runs a benchmark that writes `--json FILE`; its figures, with the load before it."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        done = subprocess.run(
            [*command, f"--json={file}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        return {"load": load, **json.loads(file.read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", required=True, help="a python that has torch")
    parser.add_argument("--reference", help="a checkout of the public reference implementation")
    parser.add_argument("--what", choices=("step", "gram", "forward"), default="step")
    parser.add_argument("--libraries", default="", help="of the forward pass: transformers,timm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json")
    parser.add_argument("more", nargs="*", help="further flags of ours, after --")
    options = parser.parse_args()
    shared = [f"--what={options.what}", f"--steps={options.steps}"]
    commands = {
        "ours": our_command(options.what, options.steps, options.more),
        "torch": [options.torch_python, str(HERE / "torch_step.py"), *shared],
    }
    if options.reference:
        script = [options.torch_python, str(HERE / "reference_step.py"), *shared]
        commands["reference"] = [*script, f"--reference={options.reference}"]
    for library in filter(None, options.libraries.split(",")):
        script = [options.torch_python, str(HERE / "torch_features.py"), f"--library={library}"]
        commands[library] = [*script, f"--steps={options.steps}"]
        commands[f"{library} compiled"] = [*commands[library], "--compile"]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    print(f"{'run':21} {'load':>6} {'median s':>9} {'min s':>8} {'max s':>8} {'peak GB':>8}")
    for _ in range(options.rounds):
        for name, command in commands.items():
            figures = run(command)
            runs[name].append(figures)
            times = (figures[key] for key in ("seconds_per_step", "seconds_min", "seconds_max"))
            shown = "  ".join(f"{value:7.3f}" for value in times)
            peak = figures["peak_memory_bytes"] / 1e9
            print(f"{name:21} {figures['load']:6.2f}   {shown}  {peak:7.2f}", flush=True)
    result: dict[str, Any] = {"what": options.what, "runs": runs}
    for peer in list(commands)[1:]:
        for label, key in (
            ("time", "seconds_per_step"),
            ("best time", "seconds_min"),
            ("memory", "peak_memory_bytes"),
        ):
            ratios = [b[key] / a[key] for a, b in zip(runs["ours"], runs[peer])]
            result[f"{label}_ratio_{peer}"] = statistics.median(ratios)
            listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{label}, {peer} / ours: {statistics.median(ratios):.2f}  ({listed})")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
