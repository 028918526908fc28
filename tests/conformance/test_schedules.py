"""Schedules of the reference's recipes and its two schedule functions (schedules.npz)."""

import numpy as np
import pytest
import vectors

from dinojax.training import schedules

LOSS_WEIGHTS = ("dino_local_loss_weight", "gram_loss_weight")
FUNCTIONS = ("linear_warmup_cosine", "cosine_scheduler")


def close(got: np.ndarray, want: np.ndarray, name: str) -> None:
    vectors.assert_close(got, want, atol=1e-12, rtol=1e-9, name=name)


def recipes(case: vectors.Case) -> list[str]:
    """`<config>/world<w>` prefixes."""
    return [p for p in case.matching(r"[^/]+/[^/]+") if p.split("/")[0] not in FUNCTIONS]


def v2_schedule(spec: dict, epoch: int) -> dict:
    """A schedule of a recipe, from epochs to steps."""
    return {
        "kind": "v2",
        "start": spec["start"],
        "peak": spec["peak"],
        "end": spec["end"],
        "warmup": int(spec["warmup_epochs"] * epoch),
        "cosine": int(spec["cosine_epochs"] * epoch) if "cosine_epochs" in spec else -1,
    }


def v2_recipe(meta: dict) -> tuple[dict, int]:
    epoch = meta["epoch_length"]
    sections = meta["schedules"]
    recipe = {name: v2_schedule(spec, epoch) for name, spec in sections.items()}
    factor = schedules.scale_lr("sqrt_1024", meta["batch_per_gpu"] * meta["world_size"])
    recipe["lr"] = schedules.scaled(recipe["lr"], factor)
    return recipe, int(sections["lr"]["freeze_last_layer_epochs"] * epoch)


def v1_recipe(meta: dict) -> tuple[dict, int]:
    v1, epoch = meta["v1"], meta["epoch_length"]

    def cosine(base: float, end: float, warmup: int = 0) -> dict:
        fields = {"start": 0.0, "base": base, "end": end, "warmup": warmup}
        return {"kind": "v1", **fields, "trunc_extra": v1["schedule_trunc_extra"]}

    first, last, warmup = v1["teacher_temp"]
    recipe = {
        # The factor is in it already; that min_lr carries none is what the vectors show.
        "lr": cosine(v1["lr_after_scaling"], v1["min_lr"], int(v1["warmup_epochs"] * epoch)),
        "weight_decay": cosine(*v1["weight_decay"]),
        "momentum": cosine(*v1["momentum"]),
        "teacher_temp": {
            "kind": "v1_linear",
            "start": first,
            "end": last,
            "warmup": int(warmup * epoch),
        },
    }
    return recipe, int(v1["freeze_last_layer_epochs"] * epoch)


@vectors.files("schedules", sub=recipes)
def test_recipe(case, sub):
    meta, arrays = case.meta[sub], case.group(sub)
    recipe, freeze = v2_recipe(meta) if isinstance(meta["schedules"], dict) else v1_recipe(meta)
    total, steps = meta["total_iterations"], arrays["iterations"]
    names = {"teacher_momentum": "momentum"}
    for name in ("lr", "weight_decay", "teacher_momentum", "teacher_temp"):
        got = schedules.values(recipe[names.get(name, name)], steps, total)
        close(got, arrays[f"{name}_f64"], name)
    got = schedules.last_layer_values(recipe["lr"], freeze, steps, total)
    close(got, arrays["last_layer_lr_f64"], "last_layer_lr")
    for name in LOSS_WEIGHTS:
        if f"{name}_f64" in arrays:
            schedule = v2_schedule(meta[name], meta["epoch_length"])
            got = schedules.values(schedule, arrays[f"{name}_iterations"], total)
            close(got, arrays[f"{name}_f64"], name)


@vectors.files("schedules", sub=lambda case: case.matching(r"linear_warmup_cosine/[^/]+"))
def test_linear_warmup_cosine(case, sub):
    meta, want = case.meta[sub], case[f"{sub}/values_f64"]
    schedule = {
        "kind": "v2",
        **{name: meta[name] for name in ("start", "peak", "end")},
        "warmup": meta["warmup_iterations"],
        "cosine": meta.get("cosine_iterations", -1),
    }
    got = schedules.values(schedule, np.arange(len(want)), meta["total_iterations"])
    close(got, want, sub)


@vectors.files("schedules", sub=lambda case: case.matching(r"cosine_scheduler/[^/]+"))
def test_cosine_scheduler(case, sub):
    meta, want = case.meta[sub], case[f"{sub}/values_f64"]
    # The reference's function can hold 0 before the warm-up; no recipe does (a frozen last layer is
    # `last_layer_values`), so here the schedule simply starts later.
    freeze = meta.get("freeze_iters", 0)
    schedule = {
        "kind": "v1",
        "start": meta.get("start_warmup_value", 0.0),
        "base": meta["base_value"],
        "end": meta["final_value"],
        "warmup": meta.get("warmup_iters", 0),
        "trunc_extra": meta.get("trunc_extra", 0.0),
    }
    steps = np.arange(len(want))
    got = schedules.values(schedule, steps - freeze, meta["total_iters"] - freeze)
    close(np.where(steps < freeze, 0.0, got), want, sub)


def test_something_was_there(vectors_dir):
    if not (vectors_dir / "schedules.npz").exists():
        pytest.skip(f"schedules.npz is not in {vectors_dir}")
    held = {name.split("/")[-1] for name in vectors.arrays(vectors_dir, "schedules")}
    known = {f"{n}_f64" for n in ("lr", "weight_decay", "teacher_momentum", "teacher_temp")}
    known |= {"last_layer_lr_f64", "iterations", "values_f64"}
    known |= {f"{n}{end}" for n in LOSS_WEIGHTS for end in ("_f64", "_iterations")}
    assert held <= known, f"arrays nobody compares: {sorted(held - known)}"
