"""How fast an experiment runs on this machine: `python launch/bench.py --config experiments/X.py`.

Prints the median seconds of a training step with its spread, images/s, model-FLOPs utilisation,
compile time and memory. Values are changed as in `launch/run.py`: `--config.batch_size=4`.

    --shares                 which part of the step takes what share of its time
    --trace DIR              the same, and the profile stays in DIR (for TensorBoard or Perfetto)
    --features               the backbone's forward pass instead of the step
    --data                   the input path instead, stage by stage, with its bottleneck
    --json FILE              writes the figures
    --compare A.json B.json  two such files beside each other
"""

import json
import sys
from typing import Any

import bench_figures
from absl import app, flags
from ml_collections import config_flags

from dinojax import startup

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file.", lock_config=True)
PHASE = flags.DEFINE_integer("phase", 0, "Which phase of the config.")
STEPS = flags.DEFINE_integer("steps", 10, "Timed steps, after two that are not.", lower_bound=1)
SHARES = flags.DEFINE_boolean("shares", False, "Also say where the step's time goes.")
TRACE = flags.DEFINE_string("trace", None, "Folder for a profile of two steps.")
FEATURES = flags.DEFINE_boolean("features", False, "Time the forward pass, not the step.")
BATCH = flags.DEFINE_integer("batch", 8, "Images of --features.", lower_bound=1)
DATA = flags.DEFINE_boolean("data", False, "Time reading, cropping and colour, not the step.")
SECONDS = flags.DEFINE_float("seconds", 3.0, "Of each stage of --data.")
JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")
COMPARE = flags.DEFINE_string("compare", None, "Two files of --json: --compare A.json B.json.")


def measure() -> dict[str, Any]:
    if DATA.value:
        import bench_data

        figures = bench_data.measure(CONFIG.value, PHASE.value, SECONDS.value)
        print("\n".join(bench_data.lines(figures)))
        return figures
    import bench_step

    if FEATURES.value:
        figures = bench_step.measure_features(CONFIG.value, PHASE.value, STEPS.value, BATCH.value)
    else:
        figures = bench_step.measure_step(
            CONFIG.value, PHASE.value, STEPS.value, SHARES.value, TRACE.value
        )
    print("\n".join(bench_figures.lines(figures)))
    return figures


def main(arguments: list[str]) -> int:
    try:
        if COMPARE.value is not None:
            if len(arguments) != 2:
                raise ValueError("--compare takes two files: --compare A.json B.json.")
            print(
                "\n".join(
                    bench_figures.compare(*map(bench_figures.read, (COMPARE.value, arguments[1])))
                )
            )
            return 0
        if CONFIG.value is None:
            raise ValueError("--config is missing, such as --config experiments/demo.py.")
        figures = measure()
    except ValueError as error:  # said before anything is compiled
        print(f"error: {error}", file=sys.stderr)
        return 2
    if JSON.value:
        with open(JSON.value, "w") as file:
            json.dump(figures, file, indent=1)
    return 0


if __name__ == "__main__":
    startup.restart_with_huge_pages()
    app.run(main)
