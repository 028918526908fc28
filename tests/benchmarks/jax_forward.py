"""Our ViT-S/16 forward pass alone, 8 images of 224 pixels, float32: the pair of `torch_step.py
--what forward`. Prints the same figures.

    python tests/benchmarks/jax_forward.py [--steps 10] [--no-scan] [--json FILE]
"""

import argparse
import json
import resource
import statistics
import time

import jax
import numpy as np

from dinojax import backbone, startup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--no-scan", action="store_true", help="blocks one by one")
    parser.add_argument("--json")
    options = parser.parse_args()
    model = {"name": "vit", "variant": "small", "dtype": "float32", "scan": not options.no_scan}
    network = backbone.build(model)
    params = jax.jit(network.init)(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (8, 224, 224, 3), np.float32)
    forward = jax.jit(lambda params, images: network.apply(params, (images,))[0].cls)
    seconds = []
    for index in range(options.steps + 2):
        started = time.perf_counter()
        jax.block_until_ready(forward(params, images))
        if index > 1:  # two for compiling and warming up
            seconds.append(time.perf_counter() - started)
    figures = {
        "seconds_per_step": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "jax": jax.__version__,
    }
    print(json.dumps(figures))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    startup.restart_with_huge_pages()
    main()
