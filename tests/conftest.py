"""Every test runs on 8 virtual CPU devices, without network, with array shapes and types checked at run time.

The order matters: the environment is set before jax is imported, the devices before jax is used, and the
import hook is installed before lavie_jax is imported. Programs that tests start inherit the environment.
"""

import gc
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # most of a test's time is compiling

import jax
import jaxtyping

FIRST = "PYTEST_XDIST_WORKER" not in os.environ
if FIRST:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lavie_jax-compiled-")  # workers inherit it
    if jax.__version_info__ < (0, 11):  # newer ones have no other way to make fusions; this one takes a third less
        os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # as `parallel.keep_compiled_programs` has it
jax.config.update("jax_num_cpu_devices", 8)
jaxtyping.install_import_hook("lavie_jax", "typecheck.checked")

# Files whose tests take minutes. Each worker takes the next file when it is done with one, so these come first: none is
# left for the end, when the other workers have nothing to do.
LONGEST = (
    "test_unet.py", "test_crash.py", "test_sample.py", "test_cascade.py", "test_survival.py", "test_train.py",
    "test_configs.py", "test_curation.py", "test_later_stages.py", "test_latents.py", "test_parity.py",
    "test_buckets.py", "test_notebook.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    """Exempts what importing allocated from garbage collection, as train.py does after compiling."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    if FIRST:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
