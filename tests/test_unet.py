"""The UNet: the joint batch of video and images, inflation, and options that must not change results."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange, repeat
from flax import traverse_util

from lavie_jax.errors import UserError
from lavie_jax.flops import count_flops
from lavie_jax.models import registry
from lavie_jax.models.additions import (
    BETWEEN_KEYS,
    ConditionSkip,
    KnownFrameSkip,
    conditions_around,
    known_frames_around,
)
from lavie_jax.models.layers import Frames
from lavie_jax.models.transformer import Setting, Transformer
from lavie_jax.models.unet import UNet
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.stages import STAGES
from lavie_jax.weights.diffusers_configs import inflated_config, unet_config

TINY = {
    "block_out_channels": [16],
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 4,
}
TWO_LEVELS = {
    "block_out_channels": [16, 32],
    "only_cross_attention": [True, False],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "down_temporal_idx": [0, 1],
    "up_temporal_idx": [1],
}
KINDS = {  # one level and the mid block have every kind of layer; the last tests, and parity, have two levels
    "base": TINY,
    "prediction": TINY | {"in_channels": 9},
    "interpolation": TINY | {"in_channels": 8},
    "vsr": {
        **TINY,
        "in_channels": 7,
        "num_class_embeds": 20,
        "use_linear_projection": True,
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "only_cross_attention": [True],
        "down_temporal_idx": [0],
        "mid_temporal": True,
        "up_temporal_idx": [0],
    },
}

OURS = {  # extensions that released models do not have
    "base": ("motion_embedding", "caption_modulation"),
    "interpolation": ("key_frames_around",),
    "vsr": ("low_res_skip",),
}


def random_params(unet, *inputs):
    """Parameters without zeros, so that every part of the network has an effect."""
    if isinstance(unet, UNet):
        shapes = registry.abstract_params(unet.config)  # traced once for all tests
    else:
        shapes = jax.eval_shape(unet.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)

    def draw(s):
        fan_in = int(np.prod(s.shape[:-1])) if len(s.shape) > 1 else 25
        return jnp.asarray(rng.normal(size=s.shape) / fan_in**0.5, jnp.float32)

    return jax.tree.map(draw, shapes)


def make(kind, change=None):
    """Returns (unet, inputs of a video with 2 images): x (2, 4+2, 6, 10, C), t, text, image_text, image_t, level."""
    config = unet_config(KINDS[kind] | (change or {}), STAGES[kind])
    config = dataclasses.replace(config, temporal_norm_groups=4, **dict.fromkeys(OURS.get(kind, ()), True))
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    t, image_t = jnp.array([500, 3]), jnp.array([[10, 900], [7, 999]])
    noise_level = jnp.array([3, 11]) if config.num_class_embeds else None
    return UNet(config), (
        normal(2, 6, 6, 10, config.in_channels),
        t,
        normal(2, 5, 12),
        normal(2, 2, 5, 12),
        image_t,
        noise_level,
    )


@functools.cache
def applied(unet):
    """Returns the compiled `unet.apply`, which tests share whose inputs have the same shapes."""
    return jax.jit(unet.apply)


def relative_error(a, b):
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    ("kind", "gradients"),
    [
        ("base", False),
        pytest.param("interpolation", False, marks=pytest.mark.heavy),
        pytest.param("vsr", False, marks=pytest.mark.heavy),
        pytest.param("base", True, marks=pytest.mark.heavy),
    ],
)
def test_joint_batch_equals_separate_calls(kind, gradients):
    """The video's output is the same as without images, and each image's as on its own; gradients add up."""
    unet, (x, t, text, image_text, image_t, level) = make(kind)
    params = random_params(unet, x, t, text, image_text, image_t, level)

    def joint(p):
        return unet.apply({"params": p}, x, t, text, image_text, image_t, level)

    def separate(p):
        video = unet.apply({"params": p}, x[:, :4], t, text, None, None, level)
        alone = "b m ... -> (b m) 1 ..."  # every image a row of its own
        levels = None if level is None else repeat(level, "b -> (b m)", m=2)
        times = rearrange(image_t, "b m -> (b m) 1")
        images = unet.apply(
            {"params": p}, rearrange(x[:, 4:], alone), times[:, 0], None, rearrange(image_text, alone), times, levels
        )
        return jnp.concatenate([video, rearrange(images, "(b m) 1 ... -> b m ...", b=2)], axis=1)

    if not gradients:
        assert relative_error(jax.jit(joint)(params), jax.jit(separate)(params)) < 1e-6
        return
    weights = jnp.asarray(np.random.default_rng(2).normal(size=jax.eval_shape(joint, params).shape), jnp.float32)

    def output_and_gradients(f):
        def weighted(p):
            y = f(p)
            return (y * weights).sum(), y

        grads, y = jax.jit(jax.grad(weighted, has_aux=True))(params)
        return y, grads

    (y, grads), (y_alone, grads_alone) = output_and_gradients(joint), output_and_gradients(separate)
    assert relative_error(y, y_alone) < 1e-6
    assert relative_error(grads, grads_alone) < 1e-5


@pytest.mark.parametrize("frames", [1, pytest.param(5, marks=pytest.mark.heavy)])
def test_video_ignores_which_images_are_beside_it(frames):
    unet, (x, t, text, image_text, image_t, _) = make("base")
    params = random_params(unet, x, t, text, image_text, image_t)
    video = repeat(x[:, 0], "b ... -> b t ...", t=frames) + jnp.arange(float(frames))[None, :, None, None, None]
    apply = functools.partial(applied(unet), {"params": params})

    def beside(images):
        return apply(jnp.concatenate([video, images], 1), t, text, image_text, image_t)[:, :frames]

    alone = apply(video, t, text)
    assert relative_error(beside(x[:, 4:]), alone) < 1e-6
    assert relative_error(beside(100 * x[:, 4:] + 1), alone) < 1e-6


def test_an_image_is_not_a_one_frame_video():
    """Temporal layers apply to a one-frame video, but never to an image."""
    unet, (x, t, text, *_) = make("base")
    params = random_params(unet, x[:, :1], t, text)
    apply = functools.partial(applied(unet), {"params": params})
    assert relative_error(apply(x[:, :1], t, None, text[:, None]), apply(x[:, :1], t, text)) > 1e-2


@pytest.mark.parametrize(
    ("kind", "frames"),
    [
        pytest.param("base", 3, marks=pytest.mark.heavy),  # test_inflate.py tests it with weights
        pytest.param("interpolation", 3, marks=pytest.mark.heavy),
        pytest.param("vsr", 3, marks=pytest.mark.heavy),
        pytest.param("base", 1, marks=pytest.mark.heavy),
    ],
)
def test_temporal_layers_change_nothing_when_new(kind, frames):
    """For T copies of an image, a new model outputs what the image model inside outputs for it."""
    unet, (x, t, text, _, _, level) = make(kind)
    inputs = x[:, :2], t, text, None, None, level

    @jax.jit
    def initialised(rng):  # temporal layers only: compiling the others takes longer than the test
        params = traverse_util.flatten_dict(unet.init(rng, *inputs)["params"])
        return {path: p for path, p in params.items() if any("temporal" in name for name in path)}

    temporal, rest = initialised(jax.random.key(0)), traverse_util.flatten_dict(random_params(unet, *inputs))
    fresh = traverse_util.unflatten_dict(rest | temporal)
    image_params = traverse_util.unflatten_dict({path: p for path, p in rest.items() if path not in temporal})

    def run(network, params, frames):
        copies = repeat(x[:, 0], "b ... -> b t ...", t=frames)
        return applied(network)({"params": params}, copies, t, text, noise_level=level)

    image = run(UNet(unet.config.image_config()), image_params, 1)
    assert relative_error(run(unet, fresh, frames), repeat(image, "b 1 ... -> b t ...", t=frames)) < 1e-5


def test_only_numbered_frames_that_look_alike_can_differ():
    """With relative positions only, equal frames have equal outputs whatever the weights: motion has no direction."""
    unet, (x, t, text, *_) = make("base")
    copies = repeat(x[:, 0], "b ... -> b t ...", t=3)
    params = random_params(unet, copies, t, text)

    def spread(network):
        y = applied(network)({"params": params}, copies, t, text, noise_level=None)
        return relative_error(y, repeat(y[:, 0], "b ... -> b t ...", t=3))

    assert spread(UNet(dataclasses.replace(unet.config, motion_embedding=False))) < 1e-5
    assert spread(unet) > 1e-2


def test_the_mean_of_the_key_frames_around_is_the_cross_fade():
    """`ConditionSkip` can represent it, with the key frames as the stage assigns them to frames."""
    keys = np.random.default_rng(0).normal(size=(1, 5, 2, 3, 4)).astype(np.float32)
    condition = STAGES["interpolation"].condition({"key_latents": jnp.asarray(keys)}).concat
    x = jnp.concatenate([jnp.ones_like(condition), condition], axis=-1)
    skip = ConditionSkip(frames=BETWEEN_KEYS)
    params = skip.init(jax.random.key(0), x, jnp.ones((1, 17, 6)), 4)["params"]
    assert not skip.apply({"params": params}, x, jnp.ones((1, 17, 6)), 4).any()  # zero at initialization
    mean = np.concatenate([np.zeros((4, 4)), *[np.eye(4) / 4] * 4]).reshape(-1)
    output = skip.apply({"params": {"matrix": {**params["matrix"], "bias": mean}}}, x, jnp.ones((1, 17, 6)), 4)
    place = np.arange(17) / 4
    faded = [np.interp(place, range(5), keys[0, :, i, j, c]) for i, j, c in np.ndindex(2, 3, 4)]
    np.testing.assert_allclose(output[0], np.stack(faded, 1).reshape(17, 2, 3, 4), atol=1e-6)


def test_the_known_frames_around_are_the_nearest_on_either_side():
    latents = np.random.default_rng(0).normal(size=(2, 6, 2, 3, 4)).astype(np.float32)
    mask = np.array([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    condition = STAGES["prediction"].condition({"mask": mask, "masked_latents": latents}).concat
    x = jnp.concatenate([jnp.ones_like(condition[..., :4]), condition], axis=-1)
    known, around = known_frames_around(x, jnp.zeros((2, 1, 2)), 4)
    np.testing.assert_array_equal(known, mask == 0)
    before, after = np.split(np.asarray(around), 2, axis=-1)
    nearest = {before.tobytes(): [None, 1, 1, 1, 4, 4], after.tobytes(): [1, 1, 4, 4, 4, None]}
    for side in (before, after):
        for frame, source in enumerate(nearest[side.tobytes()]):
            if source is None:
                assert not side[0, frame].any()
                continue
            np.testing.assert_array_equal(side[0, frame, ..., :4], latents[0, source])
            np.testing.assert_allclose(side[0, frame, 0, 0, 4:], [1, abs(source - frame) / 6], rtol=1e-6)
        assert not side[1].any()


def test_known_frames_move_with_the_velocity():
    """A known frame's pixel is found where the velocity moves it, before and after that frame."""
    latents, mask = np.zeros((1, 4, 8, 8, 1), np.float32), np.array([[1, 0, 1, 1]])
    latents[0, 1, 4, 3] = 1
    condition = STAGES["prediction"].condition({"mask": mask, "masked_latents": latents}).concat
    x = jnp.concatenate([jnp.ones_like(condition[..., :1]), condition], axis=-1)
    velocity = jnp.array([[[-0.5, 1.0]]])  # per clip of 4 frames: one row up and two columns right per frame
    _, around = known_frames_around(x, velocity, 1)
    before, after = around[0, ..., 0], around[0, ..., 3]
    assert [before[2, 3, 5], before[3, 2, 7], after[0, 5, 1], after[1, 4, 3]] == [1, 1, 1, 1]
    assert float(before[2].sum()) == 1
    _, halves = known_frames_around(x, velocity / 2, 1)
    np.testing.assert_allclose(halves[0, 2, 3:5, 4, 0], [0.5, 0.5])


def test_a_linear_map_predicts_a_known_frame_exactly():
    """v of a known frame follows from x_t and its latents; the map is zero at initialization."""
    rng, alpha, sigma = np.random.default_rng(0), 0.6, 0.8
    x0, eps = (rng.normal(size=(1, 3, 2, 2, 4)).astype(np.float32) for _ in range(2))
    condition = STAGES["prediction"].condition({"mask": np.array([[0, 1, 0]]), "masked_latents": x0}).concat
    x, temb = jnp.concatenate([alpha * x0 + sigma * eps, condition], axis=-1), jnp.ones((1, 3, 6))
    skip = KnownFrameSkip()
    still = jnp.zeros((1, 1, 2))
    params = skip.init(jax.random.key(0), x, still, temb, 4)["params"]
    assert not skip.apply({"params": params}, x, still, temb, 4).any()
    rows = np.zeros((22, 4))  # own x_t, mask and latents, whether known, and two frames around
    rows[:4], rows[5:9] = np.eye(4) * alpha / sigma, np.eye(4) * -1 / sigma
    output = skip.apply({"params": {"matrix": {**params["matrix"], "bias": rows.reshape(-1)}}}, x, still, temb, 4)
    np.testing.assert_allclose(output[:, ::2], (alpha * eps - sigma * x0)[:, ::2], atol=1e-5)
    assert not output[:, 1].any()


def test_conditions_around_are_the_neighbors_and_borders_repeat():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 3, 4, 5)), jnp.float32)
    around = conditions_around(x, 2, reach=1)
    padded = np.pad(x[0, 0, ..., 2:], ((1, 1), (1, 1), (0, 0)), mode="edge")
    for i, j in np.ndindex(3, 4):
        np.testing.assert_array_equal(around[0, 0, i, j], padded[i : i + 3, j : j + 3].reshape(-1))


def test_modulation_by_the_caption_changes_nothing_when_new():
    unet, (x, t, text, *_) = make("base")
    x = x[:, :3]
    plain = UNet(dataclasses.replace(unet.config, caption_modulation=False))
    params = random_params(unet, x, t, text)

    def new(path, leaf):
        return jnp.zeros_like(leaf) if "caption_proj" in jax.tree_util.keystr(path) else leaf

    def without(tree):
        return {k: without(v) for k, v in tree.items() if "caption_" not in k} if isinstance(tree, dict) else tree

    def run(network, params):
        return applied(network)({"params": params}, x, t, text, noise_level=None)

    before = run(plain, without(params))
    assert relative_error(run(unet, jax.tree_util.tree_map_with_path(new, params)), before) < 1e-6
    assert relative_error(run(unet, params), before) > 1e-3


def test_padding_of_texts_is_masked():
    """Padded texts with masks have the same outputs as texts without padding, in the additions of small models too."""
    unet, (x, t, text, image_text, image_t, _) = make("base")
    x = x[:, jnp.array([0, 1, 4, 5])]  # 2 frames and 2 images
    params = random_params(unet, x, t, text, image_text, image_t)
    apply = jax.jit(functools.partial(unet.apply, {"params": params}))
    plain = apply(x, t, text, image_text, image_t)
    long_text, long_image_text = (
        jnp.concatenate([tokens, jnp.full_like(tokens[..., :3, :], 50.0)], axis=-2) for tokens in (text, image_text)
    )
    mask, image_mask = (
        jnp.broadcast_to(jnp.arange(8) < 5, tokens.shape[:-1]) for tokens in (long_text, long_image_text)
    )
    masked = apply(x, t, long_text, long_image_text, image_t, text_mask=mask, image_text_mask=image_mask)
    assert relative_error(masked, plain) < 1e-5
    video_only = apply(x, t, long_text, long_image_text, image_t, text_mask=mask)
    assert relative_error(video_only[:, :2], plain[:, :2]) < 1e-5  # the images attend to their padding here
    assert relative_error(video_only[:, 2:], plain[:, 2:]) > 1e-2


@pytest.mark.parametrize(
    ("remat", "kernels"),
    [
        pytest.param("block", (), marks=pytest.mark.heavy),
        pytest.param("full", ("blockwise", "dot_product"), marks=pytest.mark.heavy),
        pytest.param("offload", (), marks=pytest.mark.heavy),
    ],
)
def test_remat_and_kernels_change_nothing(remat, kernels):
    unet, (x, t, text, *_) = make("base")
    inputs = (
        x[:, :2],
        text,
    )  # gradients of these pass through every layer and compile twice as fast as those of parameters
    params = random_params(unet, x[:, :2], t, text)

    def value(network):
        return lambda inputs: jnp.square(network.apply({"params": params}, inputs[0], t, inputs[1])).sum()

    def value_and_gradients(network):
        return jax.jit(jax.value_and_grad(value(network)))(inputs)

    expected = value_and_gradients(unet)
    assert relative_error(value_and_gradients(unet.clone(remat=remat)), expected) < 1e-5
    for kernel in kernels:  # test_attention.py tests them one by one, with gradients
        assert relative_error(jax.jit(value(unet.clone(attention_kernel=kernel)))(inputs), expected[0]) < 1e-5


@pytest.mark.heavy
def test_remat_recomputes_or_offloads():
    """ "block" and "offload" recompute the layers once; "full" twice, except for unneeded outputs."""
    unet, (x, t, text, *_) = make("base")
    params = jax.eval_shape(unet.init, jax.random.key(0), x[:, :2], t, text)

    def traced(remat):
        network = unet.clone(remat=remat)
        loss = lambda params: jnp.square(network.apply(params, x[:, :2], t, text)).sum()  # noqa: E731
        return jax.make_jaxpr(jax.grad(loss))(params)

    result = {remat: traced(remat) for remat in ("none", "block", "full", "offload")}
    work = {remat: count_flops(jaxpr) for remat, jaxpr in result.items()}
    assert work["none"] < work["offload"] <= work["block"] < work["full"]
    assert {remat for remat, jaxpr in result.items() if "<host>" in str(jaxpr)} == {"offload"}


def test_norms_of_temporal_convolutions_have_their_own_groups():
    """The original has 32 there whatever `norm_num_groups` is."""
    config = make("vsr")[0].config
    x, text = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 2, 16)), jnp.float32), jnp.ones((1, 1, 2, 12))

    def run(**groups):
        setting = Setting(dataclasses.replace(config, **groups), Frames(3, 0), jnp.float32, "xla")
        block = Transformer(setting, level=0, only_text=True)
        return jax.jit(block.apply)({"params": random_params(block, x, text)}, x, text)

    plain = run(norm_num_groups=4, temporal_norm_groups=4)
    assert relative_error(run(norm_num_groups=4, temporal_norm_groups=8), plain) > 1e-3


@pytest.mark.heavy  # test_vae.py tests it for the VAE
def test_bfloat16_is_near_float32():
    unet, inputs = make("vsr")
    params = random_params(unet, *inputs)
    half, full = (jax.jit(u.apply)({"params": params}, *inputs) for u in (unet.clone(dtype=jnp.bfloat16), unet))
    assert half.dtype == jnp.float32
    assert relative_error(half, full) < 0.05


def test_odd_sides_keep_their_size():
    unet, (x, t, text, *_) = make("base", TWO_LEVELS)
    x = x[:, :2, :5, :7]
    out = jax.eval_shape(lambda: unet.init_with_output(jax.random.key(0), x, t, text)[0])
    assert out.shape == (2, 2, 5, 7, 4)


def test_config_survives_json():
    for kind, json in KINDS.items():
        config = unet_config(json, STAGES[kind])
        assert UNetConfig.from_dict(config.to_dict()) == config
        assert config.image_config() == unet_config(json)
    assert set(KINDS) == set(STAGES)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"act_fn": "relu"}, "act_fn"),
        ({"block_out_channels": [30, 64]}, "30"),
        ({"down_block_types": ["CrossAttnDownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
        ({"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}, "mirror"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
    ],
)
def test_unsupported_configs_are_refused(change, names):
    with pytest.raises(UserError, match=names):
        unet_config(TINY | TWO_LEVELS | change)


def test_mixed_up_inputs_are_refused():
    unet, (x, t, text, image_text, *_) = make("base")
    for wrong in ((x[:, :1], t, None), (x[:, :2], t, text, image_text), (x, t, text, None, None, t)):
        with pytest.raises(ValueError, match="frames|noise_level"):
            jax.eval_shape(unet.init, jax.random.key(0), *wrong)


def test_inflated_is_the_inverse_of_image_config():
    for stage in STAGES.values():
        image = unet_config(TINY)
        assert inflated_config(image, stage.unet_fields).image_config() == image


def test_the_mid_block_always_attends_to_itself():
    """As in the original, whatever only_cross_attention is at the deepest level: to_k takes the features."""
    unet, inputs = make("vsr", TWO_LEVELS | {"only_cross_attention": [True, True]})
    shapes = jax.eval_shape(unet.init, jax.random.key(0), *inputs)["params"]
    attn1 = [shapes[block]["attentions_0"]["transformer_blocks_0"]["attn1"] for block in ("mid_block", "down_blocks_1")]
    assert [attn["to_k"]["kernel"].shape for attn in attn1] == [(32, 32), (12, 32)]


def test_temporal_modules_follow_the_configured_blocks():
    unet, inputs = make("vsr", TWO_LEVELS)
    shapes = jax.eval_shape(unet.init, jax.random.key(0), *inputs)["params"]
    result = {name for name in shapes if "temporal" in name}
    assert result == {"down_temporal_blocks_0", "down_temporal_blocks_1", "mid_temporal_block", "up_temporal_blocks_1"}
