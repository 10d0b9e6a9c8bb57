"""Devices that are absent or taken, and runs that are far too large for them: one line."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import train
from lavie_jax import estimate, parallel
from lavie_jax.errors import UserError
from lavie_jax.flops import count_flops
from lavie_jax.models import registry
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.stages import STAGES
from lavie_jax.training import build, options

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "sample": ["sample.py", "--prompt", "a red circle", "--out", "{tmp}/out"],
    "train": ["train.py", "--config", "configs/moving_shapes/base.py:tiny", "--workdir", "{tmp}/run"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_absent_accelerator_is_one_line_and_nothing_is_written(command, tmp_path):
    words = [word.format(tmp=tmp_path) for word in COMMANDS[command]]
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "no device can be used" in line and "JAX_PLATFORMS=cpu" in line and "cuda" in line
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process 7.\nMore."),
         r"^no device can be used: Unable .* in use by process 7\. Another program may hold"),
        (AssertionError(), "^no device can be used: jax finds no device of the platform"),
    ],
)  # fmt: skip
def test_a_taken_accelerator_gives_jaxs_reason(error, message, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(jax, "local_devices", fail)
    with pytest.raises(UserError, match=message):
        parallel.make_mesh()


def test_an_accelerator_without_free_memory_gives_jaxs_reason(monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4 bytes.")

    monkeypatch.setattr(jax, "device_put", fail)
    with pytest.raises(UserError, match="RESOURCE_EXHAUSTED"):
        parallel.local_devices()


@pytest.mark.parametrize("name", ["base", "interpolation", "vsr"])
def test_full_size_training_on_a_cpu_is_warned_of(name):
    config = options.load(f"configs/{name}.py")
    line = estimate.training_warning(config, "cpu")
    assert re.fullmatch(r"a training step takes about \de\+1[45] FLOPs, on a CPU roughly \d+ \w+, and no GPU .*", line)
    assert estimate.training_warning(config, "tpu") is None
    for small in (f"configs/{name}.py:tiny", f"configs/moving_shapes/{name}.py", "configs/moving_shapes/vae.py"):
        assert estimate.training_warning(options.load(small), "cpu") is None


@pytest.mark.parametrize("name", ["base", "interpolation", "vsr"])
def test_full_size_sampling_on_a_cpu_is_warned_of(name):
    for file, count in ((f"configs/{name}.py", 1), (f"configs/moving_shapes/{name}.py", 0)):
        config = options.load(file)
        models = build.make_models(config, jnp.float32, 1.0)
        weights = SimpleNamespace(
            sampling=build.sampling_defaults(config), unet=models.unet, vae=models.vae, schedule=models.schedule,
            low_res_schedule=None,
        )  # fmt: skip
        clip = STAGES[name].default_clip(weights) if STAGES[name].info.consumes else None
        settings = {name: STAGES[name].resolve(weights, {}, clip)}
        lines = estimate.sampling_warnings({name: weights}, settings, "cpu")
        assert len(lines) == count
        assert all(line.startswith(f"stage {name}: a sample takes about ") for line in lines)
        assert not estimate.sampling_warnings({name: weights}, settings, "gpu")

    def flops(**changes):
        values = {"steps": 50, "sampler": "ddim", "guidance": 4.0, **changes}
        return estimate.sampling_flops({name: weights}, {name: dataclasses.replace(settings[name], **values)})[name]

    less = flops(steps=10), flops(guidance=1.0), flops(cache_every=5), flops(sampler="heun", steps=25)
    assert [each / flops() for each in less] == pytest.approx([0.2, 0.5, 0.28, 0.98])


def test_the_estimate_is_near_the_number_of_flops():
    config = UNetConfig(block_out_channels=(64, 128), attention_levels=(True, False), attention_heads=(2, 2),
                        only_cross_attention=(False, False), cross_attention_dim=32,
                        temporal_attention="after_ff")  # fmt: skip
    inputs = {"x": jnp.zeros((1, 4, 16, 24, 4)), "t": jnp.zeros((1,), jnp.int32), "text": jnp.zeros((1, 77, 32))}
    apply = lambda params: registry.module(config).apply({"params": params}, **inputs)  # noqa: E731
    exact = count_flops(jax.make_jaxpr(apply)(registry.abstract_params(config)))
    assert 0.5 < estimate.unet_flops(config, frames=4, height=16, width=24) / exact < 1.5


@pytest.fixture
def handlers():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_request_a_checkpoint(number, handlers):
    stop = train.StopRequest(multi_host=False)
    assert not stop.requested(None, 1)
    signal.raise_signal(number)
    assert stop.requested(None, 2)


def test_on_several_hosts_sigusr1_becomes_sigterm(handlers):
    caught = []
    signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    train.StopRequest(multi_host=True)
    signal.raise_signal(signal.SIGUSR1)
    assert caught == [signal.SIGTERM]


def test_training_resets_settings_of_jax_that_would_change_a_run(monkeypatch):
    warnings = []
    monkeypatch.setattr(parallel.logging, "warning", lambda text, *args: warnings.append(text % args))
    jax.config.update("jax_enable_x64", True)
    try:
        parallel.initialise()
        assert not jax.config.jax_enable_x64
    finally:
        jax.config.update("jax_enable_x64", False)
    (warning,) = warnings
    assert warning.startswith("jax_enable_x64=True is not used in training")
