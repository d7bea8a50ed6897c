"""Freed memory that the process keeps: counted in page faults, in processes of their own."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
from mlfs_jax.allocator import keep_freed_memory
print(keep_freed_memory())
import jax, jax.numpy as jnp
x = jnp.zeros((16, 2**20))  # 64 MB
step = jax.jit(lambda x: x + 1)
for _ in range(50):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**settings: str) -> tuple[str, int]:
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    env |= {"JAX_PLATFORMS": "cpu"} | settings
    out = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True).stdout
    done, count = out.split()
    return done, int(count)


@pytest.mark.skipif(sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION"), reason="of glibc")
def test_a_step_finds_its_memory_again():
    pages = 64 * 2**20 // os.sysconf("SC_PAGESIZE")
    done, kept = faults()
    assert done == "True" and kept < pages  # of ten steps: not even one step's
    # somebody chose for themselves
    assert faults(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")[0] == "False"
