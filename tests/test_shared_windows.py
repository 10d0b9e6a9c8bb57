"""One clip on several devices: the layouts, the same sample on any number of them, and what they exchange."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lavie_jax import parallel
from lavie_jax.cascade.denoising import predict_rows
from lavie_jax.cascade.layout import layout
from lavie_jax.flops import count_flops
from lavie_jax.models import registry
from lavie_jax.models.placement import CLIP_AXIS
from lavie_jax.planner import hlo
from lavie_jax.stages.conditioning import Condition, Prompts


@pytest.mark.parametrize(
    ("devices", "windows", "halves", "frames", "expected"),
    [
        (8, 1, 2, 16, (2, 4, 1)),  # (groups, devices in each, windows)
        (8, 1, 1, 16, (1, 8, 1)),  # one half: all devices divide the frames
        (8, 2, 2, 16, (4, 2, 2)),
        (8, 3, 2, 16, (8, 1, 4)),  # padded by one window
        (8, 1, 2, 3, (4, 2, 2)),  # more devices than frames: padded
        (8, 1, 2, 1, (8, 1, 4)),  # images
        (3, 1, 2, 16, (1, 3, 1)),  # not two groups of equal size
        (6, 1, 2, 61, (2, 3, 1)),
        (8, 5, 2, 16, None),
        (8, 8, 2, 16, None),
        (1, 1, 2, 16, None),
    ],
)
def test_few_windows_are_shared(devices, windows, halves, frames, expected):
    shared = layout(parallel.make_mesh(devices=jax.devices()[:devices]), windows, halves=halves, frames=frames)
    assert (shared and (*shared[0].devices.shape, shared[1])) == expected


def test_split_weights_are_not_shared():
    assert layout(parallel.make_mesh(fsdp=8), 1, halves=2, frames=16) is None


def program(stage: str, frames: int, devices: int):
    """Returns the compiled prediction of one window, its arguments and the FLOPs of its trace."""
    config = tiny.UNETS[stage]
    unet, mesh = registry.module(config, jnp.float32), parallel.make_mesh(devices=jax.devices()[:devices])
    mesh, rows = layout(mesh, 1, halves=2, frames=frames) or (mesh, 1)
    sequential = CLIP_AXIS in mesh.shape and mesh.devices.shape[0] == rows
    rng = np.random.default_rng(0)
    more = config.in_channels - config.out_channels

    def noise(*shape):
        return rng.normal(size=(1, *shape)).astype(np.float32)

    x_t, concat = noise(frames, 4, 6, 4), noise(frames, 4, 6, more)
    level = np.array([20], np.int32) if config.num_class_embeds else None
    texts = [Prompts(noise(tiny.CONTEXT, config.cross_attention_dim)) for _ in range(2)]
    arguments = (
        tiny.random_params(config), x_t, np.array([500], np.int32), *texts, Condition(concat if more else None, level)
    )  # fmt: skip
    arguments = jax.tree.map(lambda x: np.repeat(x, rows, axis=0), arguments[1:])
    everywhere = parallel.replicated(mesh)
    arguments = parallel.put((tiny.random_params(config), *arguments), everywhere)
    traced = predict_rows.trace(
        *arguments, unet=unet, guidance=4.0, rescale=0.5, image=False, sequential_guidance=sequential, mesh=mesh
    )  # fmt: skip
    return traced.lower().compile(), arguments, count_flops(traced.jaxpr)


CASES = [
    ("base", 8, 8),
    ("interpolation", 5, 8),  # 2, 2, 1 and no frames
    *(pytest.param(*case, marks=pytest.mark.heavy) for case in (
        ("base", 8, 2), ("base", 5, 3), ("base", 8, 4), ("prediction", 4, 8), ("interpolation", 13, 3),
        ("interpolation", 13, 8), ("vsr", 4, 2), ("vsr", 4, 3), ("vsr", 4, 8),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "frames", "devices"), CASES)
def test_the_same_prediction_on_any_number_of_devices(stage, frames, devices):
    alone, arguments, flops = program(stage, frames, 1)
    shared, spread, shared_flops = program(stage, frames, devices)
    expected, actual = alone(*arguments).prediction[0], shared(*spread).prediction[0]
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
    assert 0.99 * flops < shared_flops < 1.1 * flops  # the same work, and the text's of each frame where uneven
    if (stage, devices) in (("base", 8), ("interpolation", 8)):
        each, whole = hlo.flops(shared.as_text()), hlo.flops(alone.as_text())
        # counted without the zeros around the frames, which are small here
        assert 0.7 < whole / flops < 1.2 and each < (0.15 if frames % 4 == 0 else 0.25) * whole
        exchanged = hlo.collectives(shared.as_text())
        layers = 1  # with temporal attention
        assert exchanged["all-to-all"]["count"] >= 2 * layers
        # no features are gathered: inputs and outputs have 4 to 8 channels, features 16
        pixels = 4 * 6 * 8 * -(-frames // 8)  # with padding
        assert exchanged["all-gather"]["bytes"] <= exchanged["all-gather"]["count"] * 4 * 6 * pixels
