"""RoPE periods, tables, augmentation and rotation against the reference's arrays."""

import jax.numpy as jnp
import vectors

from dinojax.layers import rope


def dtype(case: vectors.Case):
    return jnp.bfloat16 if case.meta.get("dtype") == "bf16" else jnp.float32


def close(case: vectors.Case) -> dict:
    return {"atol": 0.05 if dtype(case) == jnp.bfloat16 else 3e-5, "rtol": 0.0}


def periods(case: vectors.Case):
    meta = case.meta
    head_dim = meta["embed_dim"] // meta["num_heads"]
    base, *ends = (meta.get(k) for k in ("base", "min_period", "max_period"))
    return rope.make_periods(head_dim, base, *ends, bf16=dtype(case) == jnp.bfloat16)


@vectors.cases("rope", sub=lambda case: case.matching("periods"))
def test_periods(case, sub):
    rtol = 1e-5 if dtype(case) == jnp.float32 else 2**-8
    vectors.assert_close(periods(case), case[sub], atol=0.0, rtol=rtol)


@vectors.cases("rope", sub=lambda case: case.matching(r"\d+x\d+(?=/sin)"))
def test_tables(case, sub):
    meta = case.meta
    height, width = map(int, sub.split("x"))
    normalize = meta.get("normalize_coords", "separate")
    coords = rope.coordinates(height, width, normalize, dtype(case))
    drawn = case.group(sub)
    by = rope.Augmentation(
        jnp.asarray(drawn.get("shift_hw", [0.0, 0.0]), dtype(case)),
        jnp.asarray(drawn.get("jitter_hw", [1.0, 1.0]), dtype(case)),
        jnp.asarray(drawn.get("rescale", [1.0]), dtype(case)),
    )
    within_ranges(meta, drawn)
    tables = rope.tables(rope.augment(coords, by)[None], periods(case).astype(dtype(case)))
    vectors.assert_close(tables.sin[0], drawn["sin"], **close(case), name="sin")
    vectors.assert_close(tables.cos[0], drawn["cos"], **close(case), name="cos")


def within_ranges(meta: dict, drawn: dict) -> None:
    """The stored draws lie in the ranges of the settings, as ours do."""
    for name, setting in {"jitter_hw": "jitter_coords", "rescale": "rescale_coords"}.items():
        if name in drawn:
            assert (drawn[name] <= meta[setting]).all() and (drawn[name] >= 1 / meta[setting]).all()
    if "shift_hw" in drawn:
        assert (abs(drawn["shift_hw"]) <= meta["shift_coords"]).all()


@vectors.cases("rope", sub=lambda case: case.matching(r"q(?=_out)"))
def test_apply(case, sub):
    meta = case.meta
    head_dim = meta["embed_dim"] // meta["num_heads"]
    base = rope.make_periods(head_dim, meta.get("base", 100.0), None, None)
    tables = rope.tables(rope.coordinates(*meta["HW"])[None], base)
    # In the bfloat16 case float32 tables are rounded: 0.016 from the reference; computed in
    # bfloat16 from the start they would be 0.059 away.
    tables = rope.Tables(*(table.astype(dtype(case)) for table in tables))
    for name in ("q", "k"):
        x = jnp.asarray(case[name]).swapaxes(1, 2)  # [n, h, t, e] -> [n, t, h, e]
        turned = rope.apply(x, tables).swapaxes(1, 2)
        vectors.assert_close(turned, case[f"{name}_out"], **close(case), name=name)
