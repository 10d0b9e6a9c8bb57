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

# Files whose tests take minutes. Each worker takes the next file when it is done with one, so these come first: none is
# left for the end, when the other workers have nothing to do.
LONGEST = (
    "test_train.py", "test_configs.py", "test_survival.py", "test_unet.py", "test_buckets.py", "test_notebook.py",
    "test_crash.py", "test_stage_training.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
