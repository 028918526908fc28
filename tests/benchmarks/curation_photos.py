"""Curates a pool of photographs in which the truth is known, and trains on the result.

    python tests/benchmarks/curation_photos.py --data ../shared/data/images_small --workdir DIR
    ... --stage curate              a stage alone: pool, embed, curate or train
    ... --weights runs/a            another embedder than the small one that is trained here
    ... --quick                     everything tiny, to see whether it works

The pool (`photo_pool.py`) has a long tail of classes, planted near-duplicates and leaked evaluation
images. An embedder is trained on it as it is; `dinojax features` and `python -m data_curation run`
do what they would do for a user. Measured: which planted rows went, the entropy of labels before
and after, and k-NN of small backbones trained on the curated sample, on as many images of the raw
pool at random, and on a sample by a pretended embedder that knows the classes. DIR/results.json
holds it all. Killed or stopped, the same command goes on.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np
import photo_pool
import pyarrow as pa
import pyarrow.parquet as pq

import dinojax
from data_curation import Level, hierarchical_kmeans, hierarchical_sample, knn, open_embeddings
from data_curation.files import read_json, write_json, write_table
from dinojax.eval.knn import Evaluator

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ("pool", "embed", "curate", "train")
STRANGERS = 0.98  # share of images strange to the pool that must stay below the threshold
KNOWING = {"known": 0.2, "half known": 0.3}  # noise of pretended embedders
NEIGHBOURS = 10  # of the k-NN: the bank holds nine images of a class of Caltech-101


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much of everything. The defaults take about 20 minutes on two quiet cores."""

    pool: photo_pool.Sizes = photo_pool.Sizes()
    embed_steps: int = 1300
    train_steps: int = 300
    seeds: int = 3
    levels: tuple[tuple[int, int, int], ...] = ((500, 10, 10), (100, 3, 10))
    target: int = 2000
    model: tuple[str, ...] = ()  # settings of experiments/cifar10_vitt.py


# What the embedder is trained with besides: to tell images apart, not to describe their patches.
EMBEDDER = (
    "phases[0].losses.ibot=0.0",
    "phases[0].losses.koleo=0.2",
    "augment.brightness=0.4",
    "augment.contrast=0.3",
)
TINY = photo_pool.Sizes(head=200, bank=20, queries=10, rare=8, copied=60, leaked=20)
NARROW = ("model.width=32", "model.depth=1", "model.heads=2", "batch_size=16", "group=16")
QUICK = Plan(TINY, 20, 4, 1, ((80, 5, 2), (16, 3, 2)), 120, NARROW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=pathlib.Path, default=ROOT.parent / "shared/data/images_small")
    add("--workdir", type=pathlib.Path, required=True)
    add("--stage", choices=STAGES, action="append", help="only these (default: all)")
    add("--weights", default="", help="the embedder (default: one that is trained on the pool)")
    add("--threshold", type=float, default=0.0, help="of cosines (default: see `threshold`)")
    add("--quick", action="store_true")
    args = parser.parse_args()
    plan, work = QUICK if args.quick else Plan(), args.workdir.resolve()
    if not (args.data.is_dir() or (work / "pool.parquet").exists()):
        files = ", ".join(photo_pool.FILES.values())
        parser.error(f"--data {args.data} is no folder; expected one that holds {files}")
    work.mkdir(parents=True, exist_ok=True)
    stages = {
        "pool": lambda: make_pool(work, plan, args.data),
        "embed": lambda: embed(work, plan, args.weights),
        "curate": lambda: curate(work, plan, args.threshold),
        "train": lambda: train(work, plan),
    }
    for name in args.stage or STAGES:
        began = time.monotonic()
        found = stages[name]()
        say(name, f"{time.monotonic() - began:.0f} s", found)
        results = work / "results.json"
        write_json(results, (read_json(results) if results.exists() else {}) | {name: found})


# ---- stages: each returns what results.json keeps of it ------------------------------------------


def make_pool(work: pathlib.Path, plan: Plan, data: pathlib.Path) -> dict[str, Any]:
    """pool.parquet, bank.parquet and queries.parquet."""
    if not (work / "pool.parquet").exists():
        photo_pool.build(data, work, plan.pool)
    pool, bank, queries = (read(work, name) for name in ("pool", "bank", "queries"))
    return {
        "images": len(pool["label"]),
        "copies": int(np.sum((pool["group"] >= 0) & (pool["kind"] != ""))),
        "leaked": int(np.sum(pool["query"] >= 0)),
        "bank": len(bank["label"]),
        "queries": len(queries["label"]),
    }


def embed(work: pathlib.Path, plan: Plan, weights: str) -> dict[str, Any]:
    """features/NAME of the three files, by the given backbone or one trained on the whole pool."""
    if not weights:
        flags = (*plan.model, *EMBEDDER)
        weights = pretrain(work / "embedder", flags, spec(work, "pool"), plan.embed_steps, 0)
    for name in ("queries", "bank", "pool"):
        run(
            "-m",
            *("dinojax", "features", "--weights", weights, "--data", spec(work, name)),
            *("--size", "32", "--batch", "256", "--out", str(work / "features" / name)),
        )
    return {"weights": weights, "similarities": similarities(work)}


def similarities(work: pathlib.Path) -> dict[str, Any]:
    """Quantiles of cosines: what a threshold must tell apart.

    nearest: of each image of the pool and the one most like it there. strangers: of images of the
    bank, none of which was planted, and the one most like it in the pool. planted: of copies and
    what they are copies of, by how they were made; `threshold` does not look at these. (Whoever set
    STRANGERS and EMBEDDER did: the embedder is the best of three that were tried.)
    """
    sets = {name: open_embeddings(work / "features" / name) for name in ("pool", "bank", "queries")}
    pool, queries = (normalised(sets[name]) for name in ("pool", "queries"))
    told = read(work, "pool")
    copies, originals, kind = planted_pairs(told)
    cosines = np.sum(pool[copies] * pool[originals], axis=1)
    rows = np.flatnonzero(told["query"] >= 0)
    found = {
        "nearest": knn(sets["pool"], k=1)[1][:, 0],
        "strangers": knn(sets["bank"], sets["pool"], k=1)[1][:, 0],
        **{f"planted {name}": cosines[kind == name] for name in photo_pool.CHANGES},
        "leaked": np.sum(pool[rows] * queries[told["query"][rows]], axis=1),
    }
    steps = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    return {
        name: {f"{100 * q:g}%": round(float(np.quantile(values, q)), 4) for q in steps}
        for name, values in found.items()
    }


def threshold(work: pathlib.Path) -> float:
    """The cosine that only 2% of images strange to the pool reach with any image of it.

    Every embedder has its own. The bank's images, of which the pool holds no planted copy, say how
    alike two different photographs are. Not 1%: those are mostly satellite tiles of sea and forest,
    all the same at 32 pixels, and duplicates that CIFAR-10 itself has (0.91 here, against 0.80).
    """
    bank, pool = (open_embeddings(work / "features" / name) for name in ("bank", "pool"))
    return round(float(np.quantile(knn(bank, pool, k=1)[1][:, 0], STRANGERS)), 4)


def curate(work: pathlib.Path, plan: Plan, cosine: float) -> dict[str, Any]:
    """curated/, by `python -m data_curation run`, and what became of what was planted."""
    cosine = cosine or threshold(work)
    levels = ", ".join(f"level{level}" for level in plan.levels)
    run(
        *("-m", "data_curation", "run", "--config", "photos", f"workdir={work / 'curated'}"),
        *("embed.source=", f"embeddings={work / 'features' / 'pool'}"),
        *(f"dedup.threshold={cosine}", f"dedup.reference_threshold={cosine}"),
        f"dedup.references=('{work / 'features' / 'queries'}',)",
        *(f"cluster.levels=({levels})", f"sample=(sample('balanced', {plan.target}),)"),
        "report.gallery=4",
    )
    pool, folder = read(work, "pool"), work / "curated"
    deduplicated, kept = (
        np.load(folder / "dedup" / name) for name in ("kept.npy", "relative/kept.npy")
    )
    sample = pq.read_table(folder / "samples/balanced/samples.parquet")["row"].to_numpy()
    everything = np.arange(len(pool["label"]))
    rows = {"pool": everything, "kept": kept, "curated": sample}
    # Of the raw pool, all equally likely: what a run without curation would see of it.
    rows["uniform"] = np.random.default_rng(1).choice(everything, len(sample), replace=False)
    known = {}
    for name, noise in KNOWING.items():
        chosen, known[name] = pretend(pool["label"][kept], plan, noise)
        rows[name] = kept[chosen]
    for name in ("uniform", *KNOWING):
        table = pa.table({"row": np.sort(rows[name])})
        told = {"source": spec(work, "pool")}
        write_table(work / f"{name}.parquet", table.replace_schema_metadata(told))
    return {
        "threshold": cosine,
        "duplicates": duplicates(pool, np.load(folder / "dedup/components.npy"), deduplicated),
        "leaked": leaked(pool, deduplicated, kept),
        "labels": {name: label_figures(pool["label"][chosen]) for name, chosen in rows.items()},
        "sources": {
            name: dict(collections.Counter(pool["source"][chosen].tolist()).most_common())
            for name, chosen in rows.items()
        },
        "nearest centre": known,
    }


def pretend(labels: np.ndarray, plan: Plan, noise: float) -> tuple[np.ndarray, float]:
    """A sample by a pretended embedder that knows the classes, and how well it knows them.

    A vector is the centre of its class and noise; the second number is how often it lies nearest to
    that centre. What this balances and the embedder does not is due to the embedder.
    """
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(labels) + 1, 32))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    x = (centres[labels] + noise * rng.normal(size=(len(labels), 32))).astype(np.float32)
    tree = hierarchical_kmeans(x, [Level(*level) for level in plan.levels])
    right = np.mean((x @ centres.T).argmax(axis=1) == labels)
    return hierarchical_sample(tree, plan.target), round(float(right), 3)


def train(work: pathlib.Path, plan: Plan) -> dict[str, Any]:
    """k-NN of backbones trained on as many images each, for every seed, in turn."""
    sources = {
        "uniform": f"curated:{work / 'uniform.parquet'}",
        "curated": f"curated:{work / 'curated/mixture.json'}",
        "known": f"curated:{work / 'known.parquet'}",
    }
    evaluators = {
        source: Evaluator(
            *(f"{spec(work, name)}?split={source}" for name in ("bank", "queries")),
            size=32,
            k=(NEIGHBOURS,),
            batch=256,
        )
        for source in photo_pool.FILES
    }
    # One step, in which the teacher hardly moves.
    runs = {"untrained-0": (sources["uniform"], 1)}
    for seed in range(plan.seeds):
        runs |= {f"{name}-{seed}": (of_it, plan.train_steps) for name, of_it in sources.items()}
    found: dict[str, Any] = {
        "pixels-0": {name: dict(one.pixel_knn()) for name, one in evaluators.items()}
    }
    for name, (source, steps) in runs.items():
        began, folder = time.monotonic(), work / "train" / name
        if not (folder / "knn.json").exists():
            pretrain(folder, plan.model, source, steps, int(name.rpartition("-")[2]))
            write_json(folder / "knn.json", evaluate(folder, evaluators))
        found[name] = read_json(folder / "knn.json")
        say(name, f"{time.monotonic() - began:.0f} s", top1(found[name]))
        write_json(work / "trained.json", found | {"summary": summary(found)})
    return found | {"summary": summary(found)}


def evaluate(folder: pathlib.Path, evaluators: dict[str, Evaluator]) -> dict[str, Any]:
    """Figures of a finished run, by evaluation set."""
    network = dinojax.load(folder)

    def features(images: np.ndarray) -> np.ndarray:
        return network.features(images, 256).cls

    return {name: dict(evaluator.run(features)) for name, evaluator in evaluators.items()}


def top1(scores: dict[str, Any]) -> dict[str, float]:
    """Top-1 of a run by set, and the mean of the sets."""
    found = {name: of_set[f"knn{NEIGHBOURS}/top1"] for name, of_set in scores.items()}
    found["mean of the sets"] = float(np.mean([*found.values()]))
    return {name: round(value, 2) for name, value in found.items()}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Top-1 of what was trained on the same images: of every seed, and their mean."""
    tables: dict[str, Any] = {}
    for name, scores in found.items():
        for column, value in top1(scores).items():
            cell = tables.setdefault(name.rpartition("-")[0], {}).setdefault(column, {"seeds": []})
            cell["seeds"].append(value)
            cell["mean"] = round(float(np.mean(cell["seeds"])), 2)
    return tables


# ---- what became of what was planted -------------------------------------------------------------


def planted_pairs(pool: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row of a copy, row of its original, how it was made) of every copy."""
    copies = np.flatnonzero((pool["group"] >= 0) & (pool["kind"] != ""))
    originals = np.flatnonzero((pool["group"] >= 0) & (pool["kind"] == ""))
    by_group = originals[np.argsort(pool["group"][originals])]  # groups are 0, 1, ...
    return copies, by_group[pool["group"][copies]], pool["kind"][copies]


def duplicates(
    pool: dict[str, np.ndarray], component: np.ndarray, kept: np.ndarray
) -> dict[str, Any]:
    """Recall: copies that lie in one component with their original, so that one of them is left.

    Precision: removed rows whose component holds another row of their own group. What else was
    removed is not all wrong: the sets have duplicates of their own, which nobody has marked.
    """
    copies, originals, kind = planted_pairs(pool)
    joined = component[copies] == component[originals]
    removed = np.setdiff1d(np.arange(len(component)), kept)
    rows = np.flatnonzero(pool["group"] >= 0)
    pairs = np.stack([component[rows], pool["group"][rows]], axis=1)
    seen = collections.Counter(map(tuple, pairs.tolist()))
    right = sum(
        pool["group"][row] >= 0 and seen[(int(component[row]), int(pool["group"][row]))] > 1
        for row in removed
    )
    sizes = np.unique(component, return_counts=True)[1]
    return {
        "planted": len(copies),
        "removed": len(removed),
        "recall": round(float(joined.mean()), 3),
        "precision": round(right / max(1, len(removed)), 3),
        "recall by kind": {
            name: round(float(joined[kind == name].mean()), 4) for name in photo_pool.CHANGES
        },
        "largest component": int(sizes.max()),
    }


def leaked(pool: dict[str, np.ndarray], before: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    """Leaked images that are gone, and how many others went for looking like evaluation images."""
    rows, gone = np.flatnonzero(pool["query"] >= 0), np.setdiff1d(before, kept)
    out = ~np.isin(rows, kept)
    return {
        "planted": len(rows),
        "removed": int(out.sum()),
        "recall": round(float(out.mean()), 4),
        "recall by kind": {
            name: round(float(out[pool["kind"][rows] == name].mean()), 4)
            for name in ("same", *photo_pool.CHANGES)
        },
        "removed by comparison": len(gone),
        "precision": round(float((pool["query"][gone] >= 0).mean()), 4) if len(gone) else None,
    }


def label_figures(labels: np.ndarray) -> dict[str, Any]:
    """Entropy (of its largest value, that of 60 equal classes) and the extremes of class sizes."""
    counts = np.bincount(labels, minlength=60)
    share = counts[counts > 0] / counts.sum()
    entropy = -float(np.sum(share * np.log(share)))
    return {
        "images": int(counts.sum()),
        "entropy, nats": round(entropy, 3),
        "of the largest possible": round(entropy / float(np.log(len(counts))), 3),
        "largest class": int(counts.max()),
        "smallest class": int(counts.min()),
    }


# ---- commands ------------------------------------------------------------------------------------


def pretrain(
    folder: pathlib.Path, settings: tuple[str, ...], source: str, steps: int, seed: int
) -> str:
    """A run of launch/run.py with a short experiments/cifar10_vitt.py; returns its folder."""
    settings = (
        *(f"data.source={source}", f"seed={seed}", f"phases[0].steps={steps}"),
        *("eval.knn_train=", "eval.knn_val=", "eval.every=0", "eval.pictures=0"),
        *("checkpoint.every=150", "checkpoint.keep=1", *settings),
    )
    if not (folder / "weights").exists():
        program, config = ROOT / "launch/run.py", ROOT / "experiments/cifar10_vitt.py"
        flags = [f"--config.{setting}" for setting in settings]
        run(str(program), "--config", str(config), "--workdir", str(folder), *flags)
    return str(folder)


def run(*arguments: str) -> None:
    """A Python program, as from a terminal; its exit code is ours where it fails."""
    code = subprocess.run([sys.executable, *arguments]).returncode
    if code:
        sys.exit(code)


def say(name: str, sentence: str, found: Any) -> None:
    print(f"{name}: {sentence}\n{json.dumps(found, indent=1)}", flush=True)


def spec(work: pathlib.Path, name: str) -> str:
    return f"parquet:{work / name}.parquet"


def read(work: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    """What a file says of its images."""
    names = [n for n in pq.read_schema(work / f"{name}.parquet").names if n != "image"]
    table = pq.read_table(work / f"{name}.parquet", columns=names)
    return {n: np.asarray(table[n].to_pylist()) for n in names}


def normalised(x: Any) -> np.ndarray:
    """All vectors, of length 1."""
    vectors = np.concatenate([block for _, block in x.blocks()])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
