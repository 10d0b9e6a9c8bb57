"""bfloat16 on CPUs with and without units for it, and the dtype that sampling chooses."""

import dataclasses
import re
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import sample
from lavie_jax import cascade
from lavie_jax.errors import UserError
from lavie_jax.models import layers, precision, registry
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.samples import again
from lavie_jax.samples.outputs import Output, make_request
from lavie_jax.samples.provenance import read_sample
from lavie_jax.stages import STAGES, base
from lavie_jax.stages.settings import BaseSettings
from lavie_jax.weights import load_folder

CPU, GPU = ([mock.Mock(spec=jax.Device, platform=name)] for name in ("cpu", "gpu"))


@pytest.fixture
def units(monkeypatch):
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: True)


def with_units(monkeypatch, there):
    monkeypatch.setattr("lavie_jax.cascade.dtypes.cpu_multiplies_bfloat16", lambda: there)


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("processor : 0\nflags : avx512f avx512_bf16\n", True),
        ("model name : amx_bf16\nflags : avx2 avx512f\n", False),
        (None, False),
    ],
)
def test_units_are_read_from_the_flags_of_the_cpu(text, there, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        precision.CPUINFO.write_text(text)
    assert precision.cpu_multiplies_bfloat16.__wrapped__() == there


def lowered(config, dtype, **inputs):
    """The program of a network that computes in `dtype`, with parameters of it."""
    module = registry.module(config, dtype)
    inputs = {**registry.example_inputs(config), **inputs}
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), tiny.random_params(config))
    return jax.jit(lambda params: module.apply({"params": params}, **inputs)).lower(params), params


def products(program) -> set[str]:
    """The dtypes of the results of all products in a program."""
    return set(re.findall(r"stablehlo\.(?:dot_general|convolution)\b.*-> tensor<(?:\d+x)*(\w+)>", program.as_text()))


@pytest.mark.heavy
@pytest.mark.parametrize("stage", ["base", "vsr"])
def test_a_unet_on_units_is_near_float32(stage, units):
    config = tiny.UNETS[stage]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 16, 16, config.in_channels), np.float32))
    half, full = (lowered(config, dtype, x=x) for dtype in (jnp.bfloat16, jnp.float32))
    assert products(half[0]) == products(full[0]) == {"f32"}
    near(*(program.compile()(params) for program, params in (half, full)))


def near(found, wanted):
    assert 1e-4 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.03


def test_networks_ask_units_for_products_in_float32(units):
    # attention over 256 positions, and convolutions of large frames
    assert products(lowered(tiny.UNET, jnp.bfloat16, x=jnp.zeros((1, 2, 16, 16, 4)))[0]) == {"f32"}
    assert products(lowered(tiny.VAE_CONFIG, jnp.bfloat16)[0]) == {"f32"}
    program, params = lowered(tiny.TEXT, jnp.bfloat16)
    assert products(program) == {"f32"}
    full, own = lowered(tiny.TEXT, jnp.float32)
    near(program.compile()(params).astype(jnp.float32), full.compile()(own))


def test_other_cpus_keep_their_programs(monkeypatch):
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: False)
    assert "bf16" in products(lowered(tiny.TEXT, jnp.bfloat16)[0])


def test_other_devices_keep_their_programs(units, monkeypatch):
    monkeypatch.setattr(precision, "platform", lambda: "gpu")
    assert "bf16" in products(lowered(tiny.TEXT, jnp.bfloat16)[0])


@pytest.mark.parametrize(
    ("sides", "kernel", "strides", "padding"),
    [
        ((9, 10), (3, 3), (1, 1), [(1, 1), (1, 1)]),
        ((9, 10), (3, 3), (2, 2), [(0, 1), (0, 1)]),  # the VAE's downsampling
        ((5, 3, 2), (5, 1, 1), (1, 1, 1), [(2, 2), (0, 0), (0, 0)]),
    ],
)
def test_shifted_products_are_the_convolution(sides, kernel, strides, padding, units):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, *sides, 8)), jnp.bfloat16)
    weights = jnp.asarray(random.standard_normal((*kernel, 8, 4)), jnp.bfloat16)
    axes = "".join("HWD"[: len(sides)])
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    found = precision.conv_general_dilated(x, weights, strides, padding, dimension_numbers=numbers)
    exact = jax.lax.conv_general_dilated(
        x.astype(jnp.float32), weights.astype(jnp.float32), strides, padding, dimension_numbers=numbers
    )
    assert found.dtype == jnp.bfloat16 and found.shape == exact.shape
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-7, atol=2**-6)


def test_products_of_units_have_gradients(units):
    x = jnp.ones((1, 12, 12, 8), jnp.bfloat16)
    dense, conv = (f(4, name="layer", dtype=jnp.bfloat16) for f in (layers.dense, partial(layers.conv, kernel=(3, 3))))
    for layer in (dense, conv):
        params = jax.eval_shape(layer.init, jax.random.key(0), x)
        gradient = jax.eval_shape(jax.grad(lambda params: layer.apply(params, x).sum()), params)  # noqa: B023
        assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, params)


@pytest.fixture
def sizes():
    """Weights of a small model and of one of full size, without parameters."""
    small = load_folder(cascade.SHIPPED / "base", params=False)
    return small, dataclasses.replace(small, unet=dataclasses.replace(small.unet, config=UNetConfig()))


def test_models_of_full_size_use_one_device_of_a_cpu(sizes):
    small, full = sizes
    assert cascade.without_copies(CPU * 2, [small, small]) == CPU * 2
    assert cascade.without_copies(CPU * 2, [small, full]) == CPU
    assert cascade.without_copies(GPU * 2, [full]) == GPU * 2


def test_auto_is_bfloat16_for_full_size_on_units_and_on_accelerators(sizes, monkeypatch):
    small, full = sizes

    def chosen(devices, *weights, dtype=None):
        return cascade.compute_dtype(dtype, devices, weights).name

    with_units(monkeypatch, True)
    assert chosen(CPU, full) == chosen(CPU, full, dtype="auto") == "bfloat16"
    assert chosen(CPU, small) == chosen(CPU, full, small) == chosen(CPU) == "float32"
    assert chosen(CPU, full, dtype="float32") == "float32"
    assert chosen(CPU, small, dtype="bfloat16") == chosen(CPU, small, dtype=jnp.bfloat16) == "bfloat16"
    with_units(monkeypatch, False)
    assert chosen(CPU, full) == "float32"
    assert chosen(GPU, small) == chosen(GPU, full) == "bfloat16"


@pytest.mark.parametrize("dtype", ["float61", "float16", jnp.float16, np.float64])
def test_an_unknown_dtype_is_refused(dtype):
    with pytest.raises(UserError, match=r"dtype: 'float\d+' is not a dtype of sampling.* Allowed: auto, bfloat"):
        cascade.Cascade({}, dtype=dtype)


def test_the_command_refuses_an_unknown_dtype(capsys):
    assert sample.main(["--prompt", "a red circle", "--dtype", "float16"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--dtype" in error and "bfloat16" in error


@pytest.mark.parametrize("format", ["gif", "json"])
def test_a_sample_is_made_again_in_its_dtype(format, tmp_path):
    settings = BaseSettings.make(base.STAGE.sampling, {"frames": 2, "height": 16, "width": 16})
    request = make_request("a red circle", 0, {"base": settings}, {"base": "0" * 64})
    output = Output(folder=tmp_path, index=0, formats=("gif",), request=request)
    output.write(np.zeros((2, 16, 16, 3), np.uint8), ("gif",), {"dtype": "bfloat16"})
    assert read_sample(output.path(format)) == (request, "bfloat16")
    options, _ = again.prepare(output.path(format), tmp_path / "again", [])
    assert sample.parse_args(options).dtype == "bfloat16"
    assert sample.parse_args([*options, "--dtype=float32"]).dtype == "float32"  # the user's own comes last


def test_a_stage_model_computes_in_the_given_dtype(tmp_path):
    pipe = cascade.load(tiny.make_base(tmp_path / "base"), dtype="bfloat16", devices=jax.devices()[:1])
    model = pipe.base
    assert pipe.made_with()["dtype"] == "bfloat16" and "bfloat16" in repr(pipe)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.unet_params)} == {jnp.dtype("bfloat16")}
    assert STAGES["vsr"].vae_dtype == jnp.float32  # whatever the dtype
