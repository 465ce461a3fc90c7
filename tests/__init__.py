"""The test suite. Eight host devices, strict broadcasting, and code that compiles fast, set before JAX starts."""

import atexit
import os
import shutil
import tempfile

FAST = "--xla_cpu_use_fusion_emitters=false"  # without optimization, the older emitters compile twice as fast
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count=8 {FAST}"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # most of the suite's time is compilation
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the cache, and no run of the tests leans on an earlier one
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax_cache")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
