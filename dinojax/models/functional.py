"""A network as two pure functions; called by every `build` in `models/`.

Outside `models/` and `layers/` nothing knows about Flax: parameters are a nested dict of float32
arrays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Key

Params = dict[str, Any]


class Network(NamedTuple):
    """`init(key) -> params` and `apply(params, *args, method="__call__", **kwargs)`."""

    init: Callable[[Key[Array, ""]], Params]
    apply: Callable[..., Any]


class Features(NamedTuple):
    """What a backbone returns for one crop size, in its compute dtype."""

    cls: Float[Array, "n d"]
    storage: Float[Array, "n r d"]
    patches: Float[Array, "n p d"]
    prenorm: Float[Array, "n t d"]  # all tokens before the last norm


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """Splits a module's constructor into `init` and `apply`."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key: Key[Array, ""]) -> Params:
        return nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)))[1])

    def apply(params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        return getattr(nnx.merge(graphdef, params), method)(*args, **kwargs)

    return Network(init, apply)


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` modules in one: every parameter has a leading layer axis s, for `jax.lax.scan`."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), depth)
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(keys))
