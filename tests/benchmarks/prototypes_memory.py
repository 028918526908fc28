"""Temporary memory and time of the iBOT loss and its gradients, chunked against plain.

    python tests/benchmarks/prototypes_memory.py

512 masked patches, bottleneck width 256, float32, at 65,536 and 262,144 prototypes. The gradient of
the prototypes themselves (64 and 256 MiB) is an output, not counted. The lines `sinkhorn` make the
targets of 16,384 rows, whose tables would take 4 and 16 GiB.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dinojax.kernels.prototypes import Potentials, Targets
from dinojax.losses.ibot import ibot_loss
from dinojax.losses.sinkhorn import sinkhorn_potentials

ROWS, WIDTH, SINKHORN_ROWS = 512, 256, 16_384


def unit_rows(key: jax.Array, rows: int) -> jax.Array:
    x = jax.random.normal(key, (rows, WIDTH))
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def loss(student, prototypes, targets: Targets, chunk: int | None) -> jax.Array:
    weights = jnp.full(student.shape[0], 1 / 32)
    return ibot_loss(student, targets, weights, prototypes, crops=32, chunk=chunk)


def report(name: str, K: int, function: Callable, *args) -> None:
    compiled = jax.jit(function).lower(*args).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
    jax.block_until_ready(compiled(*args))
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    seconds = time.perf_counter() - start
    print(
        f"{name:>10}  K {K:>7,}  temporaries {temporaries:8.1f} MiB  {seconds:7.3f} s", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prototypes", type=int, nargs="+", default=[65_536, 262_144])
    parser.add_argument("--chunk", type=int, help="prototypes per chunk (default: the library's)")
    args = parser.parse_args()
    for K in args.prototypes:
        keys = jax.random.split(jax.random.key(0), 4)
        student, teacher = unit_rows(keys[0], ROWS), unit_rows(keys[1], ROWS)
        prototypes, anchors = unit_rows(keys[2], K), unit_rows(keys[3], K)
        potentials = Potentials(jnp.zeros(K), jnp.full(ROWS, -jnp.log(K)))
        targets = Targets(teacher, anchors, potentials, 0.07)
        for name, chunk in (("chunked", args.chunk), ("plain", K)):
            one = functools.partial(loss, chunk=chunk)
            both = jax.value_and_grad(one, argnums=(0, 1))
            report(name, K, both, student, prototypes, targets)
        many = unit_rows(keys[1], SINKHORN_ROWS)
        sinkhorn = functools.partial(sinkhorn_potentials, temp=0.07, chunk=args.chunk)
        report("sinkhorn", K, sinkhorn, many, anchors)


if __name__ == "__main__":
    main()
