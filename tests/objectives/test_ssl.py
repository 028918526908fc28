"""What the objective adds up, and where no gradient may flow. Values of the terms: conformance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.objectives import ssl
from dinojax.training import optim

IMAGES = 8  # of the world's 16: four groups
WEIGHTS = {"dino": 1.5, "ibot": 0.75, "koleo": 0.2}
GRAM = {name: {"teacher": name} for name in ("snapshot", "ema", "none")}
# Phases that differ in one place from `all`.
VARIANTS = {
    "all": {},
    "no_dino": {"losses": {"dino": 0.0}},
    "no_ibot": {"losses": {"ibot": 0.0}},
    "no_koleo": {"losses": {"koleo": 0.0}},
    "no_gram": {"gram": GRAM["none"]},
    "gram_ema": {"gram": GRAM["ema"]},
    "diagonal": {"losses": {"ignore_diagonal": False}},
    "koleo_whole": {},  # one KoLeo group of all images
    "softmax": {"losses": {"centering": "softmax", "center_momentum": 0.8}},
    "student_temp": {"losses": {"student_temp": 0.2}},
    "unmasked": {},  # as in distillation
}


def stages(world, name: str, networks: ssl.Networks | None = None) -> ssl.LossFn:
    sections = VARIANTS.get(name, {})
    losses = WEIGHTS | sections.get("losses", {})
    gram = sections.get("gram", GRAM["snapshot"])
    phase = world.phase(losses=losses, gram=gram)
    neighbours = IMAGES if name == "koleo_whole" else world.group
    return world.fns(phase, networks, neighbours, masked_student=name != "unmasked")


def evaluate(fns, student, frozen, batch, centers, scalars, key):
    views = fns.prepare(batch)
    taught = fns.teach(frozen, views, batch)
    potentials, new_centers = fns.match(frozen, taught, centers, scalars)
    loss, metrics = fns.loss(student, frozen, views, batch, taught, potentials, scalars, key)
    return loss, (metrics, new_centers, taught, potentials)


@pytest.fixture(scope="module")
def batch(world):
    """Half of the world's batch."""
    share = world.group * world.groups // IMAGES
    return {name: x[: x.shape[0] // share] for name, x in world.batch.items()}


@pytest.fixture(scope="module")
def centers(world):
    random = np.random.default_rng(5)
    sizes = {"dino": world.prototypes, "ibot": world.prototypes + 8}
    return {name: jnp.asarray(random.normal(size=n), jnp.float32) for name, n in sizes.items()}


@pytest.fixture(scope="module")
def found(world, batch, centers):
    """Results of every variant, all from one compilation, without a key."""

    @jax.jit
    def everything(student, frozen, batch, centers, scalars):
        results = {
            name: evaluate(stages(world, name), student, frozen, batch, centers, scalars, None)[1]
            for name in VARIANTS
        }
        still = stages(world, "all", world.still)
        results["still"] = evaluate(still, student, frozen, batch, centers, scalars, None)[1]
        results["swapped"] = evaluate(
            stages(world, "all"), student, frozen, swapped(batch), centers, scalars, None
        )[1]
        return results

    return jax.device_get(everything(world.student, world.frozen, batch, centers, world.scalars))


def swapped(batch):
    """The batch with the two global views of every image exchanged, masks included."""
    masks = batch["masks"][:, ::-1]
    groups, slots = batch["mask_indices"].shape
    flat = masks.reshape(groups, -1)
    place = jnp.argsort(~flat, axis=1, stable=True)[:, :slots]
    counts = jnp.broadcast_to(masks.sum(-1, keepdims=True), masks.shape).reshape(groups, -1)
    weights = 1.0 / jnp.take_along_axis(counts, place, axis=1)
    changed = {"masks": masks, "mask_indices": place, "mask_weights": weights.astype(jnp.float32)}
    return batch | changed | {name: batch[name][:, ::-1] for name in ("global", "gram")}


def metrics_of(found, name: str) -> dict[str, np.ndarray]:
    return found[name][0]


def rows_of(x: np.ndarray) -> np.ndarray:
    """[..., k] -> [rows, k]."""
    return x.reshape(-1, x.shape[-1])


def close(value, wanted, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(value, wanted, rtol=tolerance)


# ---- the sum -------------------------------------------------------------------------------------


def total(metrics, diagonal: bool = False, koleo: float = WEIGHTS["koleo"]) -> float:
    """Spec 3.7 for two local views, from the terms: float64."""
    m = {name: np.float64(value) for name, value in metrics.items()}
    pairs_global, pairs_local = 4 if diagonal else 2, 4
    pairs = pairs_global + pairs_local
    dino = (0.7 * pairs_local * m["dino_local"] + pairs_global * m["dino_global"]) / pairs
    return (
        WEIGHTS["dino"] * dino + WEIGHTS["ibot"] * m["ibot"] + koleo * 2 * m["koleo"]
    ) + 1.3 * m["gram"]


@pytest.mark.parametrize("name", ["all", "gram_ema", "koleo_whole", "softmax", "student_temp"])
def test_total_is_the_weighted_sum(found, name: str) -> None:
    metrics = metrics_of(found, name)
    close(metrics["loss"], total(metrics))


def test_total_with_the_diagonal(found) -> None:
    metrics = metrics_of(found, "diagonal")
    close(metrics["loss"], total(metrics, diagonal=True))
    assert abs(metrics["dino_global"] - metrics_of(found, "all")["dino_global"]) > 1e-3


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("no_dino", {"dino_local", "dino_global"}),
        ("no_ibot", {"ibot"}),
        ("no_koleo", {"koleo"}),
        ("no_gram", {"gram"}),
    ],
)
def test_a_term_that_is_off_leaves_the_sum(found, name: str, gone: set[str]) -> None:
    everything, metrics = metrics_of(found, "all"), metrics_of(found, name)
    assert set(everything) - set(metrics) == gone
    zeros = {term: 0.0 for term in gone}
    close(metrics["loss"], total(everything | zeros))
    for term in set(metrics) - {"loss"}:  # the others do not change
        close(metrics[term], everything[term])


def test_a_term_that_is_off_needs_no_teacher(found) -> None:
    _, _, taught, potentials = found["no_dino"]
    assert set(taught) == {"ibot"} and set(potentials) == {"ibot_prototypes", "ibot_rows"}


def test_koleo_searches_its_group(found) -> None:
    """More candidates are nearer: the loss, minus a mean log distance, can only grow."""
    near, far = metrics_of(found, "koleo_whole"), metrics_of(found, "all")
    assert near["koleo"] > far["koleo"] + 1e-3
    close(near["ibot"], far["ibot"])


def test_order_of_the_views_does_not_matter(found) -> None:
    one, other = metrics_of(found, "all"), metrics_of(found, "swapped")
    for term, value in one.items():
        close(other[term], value)


def test_mask_tokens_reach_every_student_term(found) -> None:
    """Masked crops feed DINO, KoLeo and Gram too (spec 9.15); in distillation none is masked."""
    masked, unmasked = metrics_of(found, "all"), metrics_of(found, "unmasked")
    for term in ("dino_global", "koleo", "ibot", "gram"):
        assert abs(masked[term] - unmasked[term]) > 1e-4, term
    close(masked["dino_local"], unmasked["dino_local"])


def test_without_a_key_nothing_is_drawn(found) -> None:
    """Stochastic depth and RoPE rescale are on in `world.networks`, off in `world.still`."""
    for term, value in metrics_of(found, "still").items():
        close(metrics_of(found, "all")[term], value)


# ---- teachers ------------------------------------------------------------------------------------


def test_gram_anchors(world, batch, found) -> None:
    """A snapshot sees its own larger crops; the EMA teacher the student's, at their size."""
    ema, snapshot = found["gram_ema"], found["all"]
    assert "patches" in ema[2] and "patches" not in snapshot[2]
    backbone, teacher = world.networks.teacher["backbone"], world.frozen["teacher"]
    (seen,) = jax.jit(backbone)(teacher["backbone"], (ssl.fold(batch["global"]),))
    kept = ema[2]["patches"].reshape(seen.patches.shape)
    np.testing.assert_allclose(kept, seen.patches, atol=1e-4)
    assert abs(ema[0]["gram"] - snapshot[0]["gram"]) > 1e-4


def test_softmax_centering(world, centers, found) -> None:
    """q = softmax((z - c) / temp); c <- 0.8 c + 0.2 mean z, used from the next step on."""
    _, new_centers, taught, potentials = found["softmax"]
    assert found["all"][1] == {}
    for name, center in jax.device_get(centers).items():
        prototypes = world.frozen["teacher"][f"{name}_head"]["last_layer"]["prototypes"]
        z = np.float64(rows_of(taught[name])) @ np.float64(prototypes).T
        centred = (z - center) / 0.05
        column = potentials[f"{name}_prototypes"]
        rows = potentials[f"{name}_rows"].reshape(-1, 1)
        np.testing.assert_allclose(
            np.exp(z / 0.05 + column + rows),
            np.exp(centred) / np.exp(centred).sum(-1, keepdims=True),
            atol=2e-5,
        )
        np.testing.assert_allclose(
            new_centers[name], 0.8 * center + 0.2 * z.mean(0), rtol=1e-5, atol=1e-6
        )


def test_sinkhorn_targets_span_the_batch(world, found) -> None:
    """Each row sums to 1; over all rows of both crops, prototypes are used about equally."""
    _, _, taught, potentials = found["all"]
    for name in ("dino", "ibot"):
        prototypes = world.frozen["teacher"][f"{name}_head"]["last_layer"]["prototypes"]
        z = np.float64(rows_of(taught[name])) @ np.float64(prototypes).T
        rows = potentials[f"{name}_rows"].reshape(-1, 1)
        q = np.exp(z / 0.05 + potentials[f"{name}_prototypes"] + rows)
        np.testing.assert_allclose(q.sum(1), 1.0, atol=1e-4)
        use = q.sum(0) * q.shape[1] / q.shape[0]
        assert 0.3 < use.min() and use.max() < 3.0


def test_no_gradient_into_teacher_or_gram(world, batch) -> None:
    """Through every stage, with both kinds of anchor: zero for the frozen, all of the student."""
    variants = [stages(world, name) for name in ("all", "gram_ema")]

    def loss(student, frozen):
        arguments = (student, frozen, batch, {}, world.scalars, world.key)
        return sum(evaluate(fns, *arguments)[0] for fns in variants)

    student, frozen = jax.jit(jax.grad(loss, argnums=(0, 1)))(world.student, world.frozen)
    for path, leaf in optim.flatten(frozen).items():
        assert not np.asarray(leaf).any(), path
    for path, leaf in optim.flatten(student).items():
        norm = np.linalg.norm(leaf)
        assert np.isfinite(norm) and norm > 0, path


# ---- helpers -------------------------------------------------------------------------------------


def test_masked_tokens_are_those_of_the_mask(batch) -> None:
    random = np.random.default_rng(6)
    patches = jnp.asarray(random.normal(size=(2 * IMAGES, 16, 3)), jnp.float32)
    chosen = ssl.masked_tokens(patches, batch["mask_indices"])
    wanted = np.asarray(patches)[np.asarray(ssl.fold(batch["masks"]))]
    np.testing.assert_array_equal(ssl.fold(chosen), wanted)


def test_spread() -> None:
    """1 for independent directions, 0 for equal ones, whatever the number of groups."""
    random = np.random.default_rng(7)
    free = jnp.asarray(random.normal(size=(256, 2, 64)), jnp.float32)
    assert abs(float(ssl.spread(free, 1)) - 1) < 0.02
    assert abs(float(ssl.spread(free, 64)) - 1) < 0.02
    assert float(ssl.spread(jnp.ones((256, 2, 64)), 4)) < 1e-5
    unit = np.asarray(free) / np.linalg.norm(free, axis=-1, keepdims=True)
    groups = unit.reshape(64, 8, 64)
    wanted = np.sqrt(64 * groups.var(axis=1, ddof=1).mean(-1)).mean()
    close(ssl.spread(free, 64), wanted)
