"""Draws the two toy sets of data curation before and after, and prints the figures.

    python tests/benchmarks/curation_toys.py [--seeds 3] [--out docs]

Five rings, two of them rare, sampled uniformly, from one k-means, and from the hierarchy with
resampling; nine thousand points of unequal Gaussians and how the top centroids of five hierarchies
spread (KL divergence from uniform). Figures of the public reference stand beside ours. The pictures
are of the first seed.
"""

import argparse
import pathlib
import sys
import time

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "conformance")]
import toy_sets  # noqa: E402

from data_curation.balance import kl_from_uniform  # noqa: E402
from data_curation.sample import flat_sample, hierarchical_sample  # noqa: E402

VECTORS = TESTS / "conformance" / "vectors" / "curation"
COLORS = np.array(["#4477aa", "#ee6677", "#228833", "#aa7700", "#aa3377"])


def scatter(axes, points: np.ndarray, title: str, color="#4477aa", size: float = 4) -> None:
    axes.scatter(*points.T, s=size, c=color, linewidths=0)
    axes.set_title(title, fontsize=9)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])


def rings(case: dict, seeds: int, file: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    rows = {"uniform": rng.choice(len(case["X"]), 1000, replace=False)}
    for seed in range(seeds):
        start = time.perf_counter()
        flat, tree = (toy_sets.ring_tree(case, seed, flat) for flat in (True, False))
        found = {"one k-means": flat_sample(flat, 1, 1000)}
        found["hierarchy"] = hierarchical_sample(tree, 1000)
        for name, of_name in found.items():
            print(f"rings, seed {seed}: {name:12} {toy_sets.per_ring(case, of_name)}")
        print(f"rings, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        rows |= found if seed == 0 else {}
    for name in ("uniform_1000", "flat300_sampled_1000", "sampled_r_1000"):
        print(f"rings, reference: {name:22} {case[f'{name}_per_ring'].tolist()}")
    _, axes = pyplot.subplots(2, 2, figsize=(9, 5), sharex=True, sharey=True, layout="constrained")
    everyone = np.arange(len(case["X"]))
    titles = {
        "all": f"{len(everyone):,} points",
        "uniform": "1,000 of them at random",
        "one k-means": "1,000 from 300 clusters of one k-means",
        "hierarchy": "1,000 from 1,000 clusters in 300, resampled",
    }
    for panel, (name, title) in zip(axes.flat, titles.items()):
        shown = rows.get(name, everyone)
        counts = " / ".join(map(str, toy_sets.per_ring(case, shown)))
        size = 1 if name == "all" else 4
        colors = COLORS[case["ring"][shown]]
        scatter(panel, case["X"][shown], f"{title}\non each ring: {counts}", colors, size)
    pyplot.savefig(file, dpi=110)


def gauss(case: dict, seeds: int, file: pathlib.Path) -> None:
    stored = dict(zip(case["kl_names"].tolist(), case["kl_values"].tolist()))
    titles = {
        "1level": "one k-means, 300",
        "2level": "1500 - 300",
        "3level": "3000 - 1000 - 300",
        "3level_resampling_closest": "resampled, closest",
        "3level_resampling_random": "resampled, random",
    }
    _, axes = pyplot.subplots(2, 3, figsize=(9, 6.2), layout="constrained")
    divergence = kl_from_uniform(case["X"])
    print(f"gauss, data: {divergence:.3f} (reference {stored['data']:.3f})")
    scatter(axes.flat[0], case["X"], f"{len(case['X']):,} points\nKL {divergence:.3f}", size=1)
    for panel, (name, title) in zip(axes.flat[1:], titles.items()):
        start = time.perf_counter()
        centroids = [toy_sets.gauss_centroids(case, name, seed) for seed in range(seeds)]
        found = [kl_from_uniform(points) for points in centroids]
        values = " ".join(f"{value:.3f}" for value in found)
        seconds = (time.perf_counter() - start) / seeds
        print(
            f"gauss, {name}: {values} (reference {stored[name]:.3f}), {seconds:.0f} s", flush=True
        )
        scatter(panel, centroids[0], f"{title}\nKL {found[0]:.3f}", "#ee6677")
    for panel in axes.flat:
        panel.set_xlim(-3, 3)
        panel.set_ylim(-3, 3)
    pyplot.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=TESTS.parent / "docs")
    args = parser.parse_args()
    for draw, file in ((rings, "ring2d"), (gauss, "gauss2d")):
        with np.load(VECTORS / f"{file}.npz") as z:
            name = {"ring2d": "curation_rings.png", "gauss2d": "curation_gauss.png"}[file]
            draw(dict(z), args.seeds, args.out / name)


if __name__ == "__main__":
    main()
