"""What the processes of one run do about files they share: the first writes, the others wait.

Called by `hierarchy.py` and `split.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils


def first_writes(write: Callable[..., None], *args: Any) -> None:
    """`write(*args)` in the first process; the others go on when it is done."""
    if jax.process_index() == 0:
        write(*args)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{write.__name__} {args[0]}")
