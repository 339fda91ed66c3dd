"""Eight virtual devices and cheap compilation, set before anything loads JAX.

Our packages are imported under jaxtyping's hook: annotations of shapes and types that do
not hold fail the test that calls them.
"""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()
os.environ["JAX_ENABLE_X64"] = "0"
os.environ["NETKET_SHARDING"] = "0"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_DEBUG_KEY_REUSE"] = "1"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# Kept as long as the tests run.
HOOK = install_import_hook(["optim", "nqs", "lm", "diffusion", "geometry"], "beartype.beartype")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests of a package's file stay on one worker, which has then compiled for all of them."""
    for item in items:
        own = item.path.parent != Path(__file__).parent
        if own and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
