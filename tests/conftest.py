"""Every test runs on 8 virtual CPU devices, without network, with array shapes and types checked at run time.

The order matters: the environment is set before jax is imported, the devices before jax is used, and the
import hook is installed before lavie_jax is imported.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jaxtyping

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # most of a test's time is compiling
jaxtyping.install_import_hook("lavie_jax", "typecheck.checked")
