"""The test suite. Eight host devices, strict broadcasting, and code that compiles fast, set before JAX starts."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # most of the suite's time is compilation
