"""Layers with CPU-specific implementations, which must not change results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavie_jax.models import layers


def assert_same_function(f, g, *arguments):
    """Checks values and gradients."""

    def value_and_gradients(h):
        wanted = tuple(range(len(arguments)))
        return jax.jit(jax.value_and_grad(lambda *inputs: jnp.sin(h(*inputs)).sum(), argnums=wanted))(*arguments)

    np.testing.assert_allclose(f(*arguments), g(*arguments), rtol=1e-5, atol=1e-5)
    for a, b in zip(*(jax.tree.leaves(value_and_gradients(h)) for h in (f, g)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def random(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 8, 8, 5), (2, 1, 1, 5)])
def test_convolution_as_a_product_is_the_convolution(shape, monkeypatch):
    """For small frames of wide features on a CPU."""
    monkeypatch.setattr(layers, "CPU_CHANNELS", 5)
    module = layers.conv(7, (3, 3), name="conv", dtype=jnp.float32)
    params, frames = {"kernel": random(3, 3, 5, 7), "bias": jnp.arange(7.0)}, random(*shape).reshape(-1, *shape[-3:])

    def plain(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + params["bias"]

    def ours(params, x):
        return module.apply({"params": params}, x.reshape(shape)).reshape(*x.shape[:-1], 7)

    text = jax.jit(ours).lower(params, frames).as_text()
    assert "stablehlo.convolution" not in text and "stablehlo.dot_general" in text
    assert_same_function(ours, plain, params, frames)


@pytest.mark.parametrize("length", [1, 3, 5])
def test_convolution_along_the_frames_has_two_axes_on_a_cpu(length):
    module = layers.conv(7, (length, 1, 1), name="conv", dtype=jnp.float32)
    params, x = {"kernel": random(length, 1, 1, 5, 7), "bias": jnp.arange(7.0)}, random(2, 4, 3, 2, 5)

    def plain(params, x):
        padding, axes = [(length // 2, length // 2), (0, 0), (0, 0)], ("NDHWC", "DHWIO", "NDHWC")
        y = jax.lax.conv_general_dilated(x, params["kernel"], (1, 1, 1), padding, dimension_numbers=axes)
        return y + params["bias"]

    def ours(params, x):
        return module.apply({"params": params}, x)

    def axes(f, platform):
        text = jax.jit(f).trace(params, x).lower(lowering_platforms=(platform,)).as_text()
        return "[b, 0, 1, f]" in text, "[b, 0, 1, 2, f]" in text

    assert axes(ours, "cpu") == (True, False) and axes(ours, "tpu") == (False, True)
    assert_same_function(ours, plain, params, x)


@pytest.mark.parametrize(("height", "channels"), [(9, 5), (8, 4)])
def test_convolutions_of_large_or_narrow_frames_stay_convolutions(height, channels, monkeypatch):
    monkeypatch.setattr(layers, "CPU_CHANNELS", 5)
    module = layers.conv(7, (3, 3), name="conv", dtype=jnp.float32)
    x = jnp.zeros((1, height, 8, channels))
    params = {"kernel": jnp.zeros((3, 3, channels, 7)), "bias": jnp.zeros(7)}
    assert "stablehlo.convolution" in jax.jit(module.apply).lower({"params": params}, x).as_text()
