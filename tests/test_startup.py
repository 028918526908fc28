"""Huge pages for a command, and memory given back: seen from outside, in processes of their own."""

import os
import subprocess
import sys

import pytest

from dinojax import startup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")

SHOW = """
import os, sys
from dinojax import startup
print(os.getpid(), flush=True)
startup.restart_with_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""
TRIM = """
from dinojax import startup
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
blocks = [bytearray(1500) for _ in range(100_000)]
del blocks[1::1000], blocks[:-1]
before = resident()
startup.return_free_memory()
print(before - resident())
"""


def run(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *arguments]
    clean = {key: value for key, value in os.environ.items() if key != startup.TUNABLES}
    ended = subprocess.run(
        command, env=clean | environment, capture_output=True, text=True, check=True, timeout=60
    )
    return ended.stdout.splitlines()


def test_restart_keeps_process_and_arguments():
    first, second, shown = run(SHOW, "--a=b c", "d")
    assert first == second  # the same process ran twice: signals find it
    assert shown == f"{startup.HUGE_PAGES} ['--a=b c', 'd']"


def test_a_setting_of_the_user_is_left_alone():
    assert run(SHOW, GLIBC_TUNABLES="")[1:] == [" []"]


def test_freed_memory_goes_back():
    assert int(run(TRIM)[0]) > 50e6
