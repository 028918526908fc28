"""A tiny world for the objective's tests: networks, parameters and a batch of eight groups.

One object holds everything, so that a compilation is paid for once in a session.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dinojax import config as configs
from dinojax.data import photometric
from dinojax.models import heads, vit
from dinojax.objectives import microbatch, ssl
from dinojax.sharding import constrain_batch

GROUP, GROUPS, LOCALS, PATCH, WIDTH, PROTOTYPES = 2, 8, 2, 8, 32, 24
SIDES = {"global": (2, 32), "local": (LOCALS, 16), "gram": (2, 64)}  # views, pixels
MASKED = (6, 4)  # patches of the two masked crops of each group
MODEL = {
    "width": WIDTH,
    "depth": 2,
    "heads": 2,
    "ffn": "mlp",
    "ffn_ratio": 2.0,
    "patch_size": PATCH,
    "storage_tokens": 1,
    "layerscale": 0.5,
    "untie_global_and_local_cls_norm": True,
    # One row in four of each group and crop size. Were it two, the CLS tokens of two images could
    # miss attention in both blocks and be equal, where KoLeo's distance is all rounding.
    "drop_path": 0.25,
    "rope_rescale": 2.0,
}
HEAD = {"prototypes": PROTOTYPES, "bottleneck": 16, "hidden": 24, "layers": 2}


class World:
    """Networks with stochastic depth and RoPE rescale on, `still` without; arrays to feed them."""

    group, groups, prototypes = GROUP, GROUPS, PROTOTYPES

    def __init__(self) -> None:
        self.networks = self._networks(MODEL)
        self.still = self._networks(MODEL | {"drop_path": 0.0, "rope_rescale": None})
        self.student = self._parameters(1)
        self.frozen = {"teacher": self._parameters(2), "gram": self._parameters(3)["backbone"]}
        self.batch = _batch(np.random.default_rng(0))
        values = {"teacher_temp": 0.05, "dino_local_weight": 0.7, "gram_weight": 1.3}
        self.scalars = {name: jnp.float32(value) for name, value in values.items()}
        self.centers: dict[str, jax.Array] = {}
        self.key = jax.random.key(4)
        self.whole = functools.cache(self._whole)

    def phase(self, **sections: Any) -> ConfigDict:
        """All terms on, with a Gram snapshot, unless `sections` say otherwise."""
        given = {"gram": {"teacher": "snapshot"}, "crops": {"locals": LOCALS}} | sections
        return configs.phase("test", 10, **given)

    def fns(
        self,
        phase: ConfigDict,
        networks: ssl.Networks | None = None,
        koleo_group: int = GROUP,
        masked_student: bool = True,
    ) -> ssl.LossFn:
        """The stages of the objective on float crops."""
        fns = ssl.make_loss_fn(
            phase,
            networks or self.networks,
            photometric.Photometric(),
            PATCH,
            koleo_group,
            masked_student=masked_student,
        )
        return fns._replace(prepare=lambda batch: constrain_batch({n: batch[n] for n in SIDES}))

    def gradients_of(self, pieces: int, koleo_group: int) -> Callable[..., Any]:
        """The function under test in test_microbatch: every term on, group-wide Gram matrices."""
        phase = self.phase(
            gram={"teacher": "snapshot", "img_level": False, "tokens": "masked", "stats": True},
            losses={"koleo_group": koleo_group},
        )
        fns = self.fns(phase, koleo_group=koleo_group)
        return microbatch.value_and_grad(fns, pieces, max(GROUP, koleo_group))

    def run(self, pieces: int, koleo_group: int) -> Any:
        """(metrics, gradients) as numpy, on one device."""
        step = jax.jit(self.gradients_of(pieces, koleo_group))
        found = step(self.student, self.frozen, self.batch, self.centers, self.scalars, self.key)
        return jax.device_get(found[:2])

    def _whole(self, koleo_group: int) -> Any:
        return self.run(1, koleo_group)

    def _networks(self, model: dict[str, Any]) -> ssl.Networks:
        built = {
            "backbone": vit.build(model),
            "dino_head": heads.build(HEAD, WIDTH, "float32"),
            "ibot_head": heads.build(HEAD | {"prototypes": PROTOTYPES + 8}, WIDTH, "float32"),
        }
        self._inits = {name: network.init for name, network in built.items()}
        applies = {name: network.apply for name, network in built.items()}
        return ssl.Networks(applies, applies, applies["backbone"])

    def _parameters(self, seed: int) -> dict[str, Any]:
        """Far from their initial values, so that features differ and every parameter matters."""
        shapes = {n: jax.eval_shape(init, jax.random.key(0)) for n, init in self._inits.items()}
        random = np.random.default_rng(seed)

        def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
            centre = 1.0 if path[-1].key in ("scale", "gamma") else 0.0
            return jnp.asarray(centre + 0.2 * random.normal(size=leaf.shape), jnp.float32)

        return jax.tree_util.tree_map_with_path(one, shapes)


def _batch(random: np.random.Generator) -> dict[str, jax.Array]:
    images, grid = GROUP * GROUPS, (32 // PATCH) ** 2
    batch = {
        name: random.normal(size=(images, views, side, side, 3)).astype(np.float32)
        for name, (views, side) in SIDES.items()
    }
    masks = np.zeros((GROUPS, 2 * GROUP, grid), bool)
    for group in masks:
        for crop, count in zip(random.permutation(2 * GROUP), MASKED):
            group[crop, random.permutation(grid)[:count]] = True
    counts = masks.sum(-1)
    batch["masks"] = masks.reshape(images, 2, grid)
    flat = masks.reshape(GROUPS, -1)
    batch["mask_indices"] = np.stack([np.flatnonzero(row) for row in flat]).astype(np.int32)
    weights = [np.repeat(1 / np.maximum(row, 1), row) for row in counts]
    batch["mask_weights"] = np.stack(weights).astype(np.float32)
    batch["groups"] = np.arange(GROUPS, dtype=np.int32)
    batch["seeds"] = np.arange(images, dtype=np.uint32)
    return {name: jnp.asarray(array) for name, array in batch.items()}


@pytest.fixture(scope="session")
def world() -> World:
    return World()
