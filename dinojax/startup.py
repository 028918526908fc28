"""How a process takes memory from Linux and gives it back. Imports nothing of the project.

XLA on CPU asks for the temporaries of a step at every step and gives them back, and Linux fills
fresh pages with zeros one by one: a fifth of all CPU time of a training run was spent there.
"""

import ctypes
import os
import sys

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # 1: transparent huge pages, for whatever malloc maps


def restart_with_huge_pages() -> None:
    """Start this Python again, same process and arguments, with malloc set to huge pages.

    glibc reads the setting only when a program starts. Nothing happens off Linux, when the variable
    is set already (to anything: GLIBC_TUNABLES= switches this off), or without a command line.
    Measured: docs/performance.md.
    """
    if sys.platform != "linux" or TUNABLES in os.environ or len(sys.orig_argv) < 2:
        return
    sys.stdout.flush()
    environment = {**os.environ, TUNABLES: HUGE_PAGES}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def return_free_memory() -> None:
    """Give what malloc holds and nobody uses back to the system; a no-op without glibc.

    After compiling a ViT-S step that is 385 MB, which otherwise stand beside its temporaries.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
