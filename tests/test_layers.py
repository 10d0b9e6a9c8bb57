"""Layers with CPU-specific implementations, which must not change results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavie_jax.models import layers


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 8, 8, 5), (2, 1, 1, 5)])
def test_convolution_as_a_product_is_the_convolution(shape):
    """For small frames on a CPU: same values and gradients as the plain convolution."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    module = layers.conv(7, (3, 3), name="conv", dtype=jnp.float32)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 5, 7)), jnp.float32), "bias": jnp.arange(7.0)}
    frames = x.reshape(-1, *shape[-3:])

    def plain(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + params["bias"]

    def ours(params, x):
        return module.apply({"params": params}, x.reshape(shape)).reshape(*x.shape[:-1], 7)

    def value_and_gradients(f):
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sin(f(p, x)).sum(), argnums=(0, 1)))(params, frames)

    text = jax.jit(ours).lower(params, frames).as_text()
    assert "stablehlo.convolution" not in text and "stablehlo.dot_general" in text
    np.testing.assert_allclose(ours(params, frames), plain(params, frames), rtol=1e-5, atol=1e-5)
    for a, b in zip(*(jax.tree.leaves(value_and_gradients(f)) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_convolutions_of_large_frames_stay_convolutions():
    module = layers.conv(7, (3, 3), name="conv", dtype=jnp.float32)
    x = jnp.zeros((1, 9, 8, 5))
    params = {"kernel": jnp.zeros((3, 3, 5, 7)), "bias": jnp.zeros(7)}
    assert "stablehlo.convolution" in jax.jit(module.apply).lower({"params": params}, x).as_text()
