"""Runs every test on 8 virtual CPU devices, without network, and checks array shapes and types at run time.

The order matters: the environment is set before jax is imported, the devices before jax is used, and the
import hook is installed before lavie_jax is imported. Subprocesses inherit the environment.
"""

import gc
import os
import shutil
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling takes most of the time of a test

import jax
import jaxtyping
import pytest

FIRST = "PYTEST_XDIST_WORKER" not in os.environ
if FIRST:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lavie_jax-compiled-")  # workers inherit it
    if jax.__version_info__ < (0, 11):  # later versions need the fusion emitters; without, compiling is a third faster
        os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # as in `parallel.keep_compiled_programs`
jax.config.update("jax_num_cpu_devices", 8)
jaxtyping.install_import_hook("lavie_jax", "typecheck.checked")

# Files whose tests take minutes. They come first: the other workers would wait for one that starts last.
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


@pytest.fixture(autouse=True)
def a_device_for_each_window(request, monkeypatch):
    """Pads batches to the devices, with one program for any number of windows; compiling takes most of a test's time.

    Tests marked `shared` have devices share windows, as outside of tests.
    """
    if "lavie_jax.cascade.denoising" in sys.modules and request.node.get_closest_marker("shared") is None:
        monkeypatch.setattr("lavie_jax.cascade.denoising.layout", lambda *args, **options: None)


def pytest_unconfigure():
    if FIRST:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
