"""The feature cache: what a UNet computes with it, when it is used, and clips that are denoised with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavie_jax import cascade
from lavie_jax.cascade import denoising
from lavie_jax.cascade.denoising import denoise
from lavie_jax.diffusion.feature_cache import FeatureCache
from lavie_jax.diffusion.guidance import COMPUTED, NONE, REUSED
from lavie_jax.errors import UserError
from lavie_jax.flops import count_flops
from lavie_jax.models.unet import UNet, deep_features
from lavie_jax.weights import load_folder
from tests.test_denoising import OVERLAPPING, SHAPE, WHOLE, Model, Pointwise, clip, plan
from tests.tiny import UNETS, random_params

# ---- the network ----


@pytest.mark.parametrize(
    ("stage", "depth"),
    [("interpolation", 4), *(pytest.param(*case, marks=pytest.mark.heavy) for case in (("vsr", 3), ("base", 1)))],
)
def test_features_of_the_same_input_give_the_same_prediction_without_the_deep_layers(stage, depth):
    """With two levels of two layers: at depth 3, the features enter the outer level; at 4, the inner one."""
    two = {
        "block_out_channels": (16, 32), "attention_levels": (False, False), "attention_heads": (2, 2),
        "only_cross_attention": (False, False), "layers_per_block": 2,
    }  # fmt: skip
    config = dataclasses.replace(UNETS[stage], **two)
    unet, variables, rng = UNet(config), {"params": random_params(config)}, np.random.default_rng(0)
    x, text = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 2, 5, 6, config.in_channels), (1, 3, 16)))
    inputs = (x, jnp.array([300]), text, None, None, jnp.array([5]) if config.num_class_embeds else None)

    def whole(variables):
        prediction, kept = unet.apply(variables, *inputs, mutable="intermediates")
        return prediction, deep_features(config, kept["intermediates"], depth)

    def outermost(variables, deep):
        return unet.apply(variables, *inputs, deep=deep, depth=depth)

    prediction, deep = jax.jit(whole)(variables)
    np.testing.assert_allclose(jax.jit(outermost)(variables, deep), prediction, atol=1e-5)
    assert np.abs(jax.jit(outermost)(variables, deep + 1) - prediction).max() > 1e-3
    work = [count_flops(jax.make_jaxpr(f)(*given)) for f, *given in ((whole, variables), (outermost, variables, deep))]
    assert work[1] < 0.6 * work[0]


# ---- the schedule ----


def test_the_whole_network_is_computed_every_few_evaluations_and_where_a_half_is_missing():
    def whole(modes, every):
        return "".join("#" if computed else "." for computed in FeatureCache(every=every).plan(modes))

    assert whole([COMPUTED] * 6, 1) == "######"
    assert whole([COMPUTED] * 7, 3) == "#..#..#"
    assert whole([COMPUTED, REUSED] * 3, 2) == "#.#.#."
    # the features without the prompt are those of the last whole evaluation, or there are none
    assert whole([COMPUTED, REUSED] * 4, 3) == "#..##..#"
    assert whole([NONE, NONE, COMPUTED, COMPUTED, NONE, NONE], 5) == "#.#..."


# ---- denoising ----


class TwoLayers(Pointwise):
    """A stand-in for the UNet: the deep features are the text's product with x, the outermost layer adds x and t."""

    config = UNETS["base"]

    def apply(self, variables, x, t, text, noise_level=None, deep=None, depth=None, mutable=False):
        assert depth in (None, 1)
        if deep is None:
            deep = jnp.sin(x[..., :4] * 2) * text.mean((1, 2))[:, None, None, None, None]
        prediction = deep + 0.1 * x[..., 4:].sum(-1, keepdims=True) + t[:, None, None, None, None] / 1000
        return (prediction, {"intermediates": {"up_blocks_0": {"into_1": (deep,)}}}) if mutable else prediction


MODEL = Model(unet=TwoLayers())


def cached(cache_every, steps, **guidance):
    return dataclasses.replace(plan(WHOLE, steps=steps, **guidance), cache=FeatureCache(every=cache_every))


def finished(how, model=MODEL, windows=WHOLE, rows=1, **fields):
    one = clip(**fields)
    denoise(model, [one], dataclasses.replace(how, windows=windows, rows=rows))
    assert not one.deep
    return one.state["x"]


def by_definition(how):
    """The same chain written out, with the deep features of both halves of guidance."""
    one, chain = clip(), how.sampler
    state, deep, change = chain.init(one.noise(0, range(SHAPE[0]))), {}, None
    for i, (mode, whole) in enumerate(zip(how.guidance_modes, how.whole)):
        x_t, t = chain.model_input(state, i)
        x, halves = jnp.concatenate([x_t, jnp.asarray(one.concat)], axis=-1)[None], {}
        for name, text in (("with", one.text(None)), ("without", one.null_text)):
            if name == "without" and mode != COMPUTED:
                continue
            given = x, t[:1], jnp.asarray(text.hidden)[None]
            if whole:
                halves[name], kept = TwoLayers().apply({}, *given, mutable=True)
                deep[name] = kept["intermediates"]["up_blocks_0"]["into_1"][0]
            else:
                halves[name] = TwoLayers().apply({}, *given, deep=deep[name], depth=1)
        if mode == COMPUTED:
            change = halves["with"] - halves["without"]
        prediction = halves["with"] + (2.0 * change if mode != NONE else 0)
        state = chain.update(state, i, prediction[0])
    return state["x"]


@pytest.mark.parametrize(
    "guidance",
    [
        pytest.param({}, marks=pytest.mark.heavy, id="every"),
        pytest.param({"every": 2}, id="reused"),
        pytest.param({"low": 300, "high": 700, "every": 2}, marks=pytest.mark.heavy, id="interval"),
    ],
)
def test_both_halves_of_guidance_keep_features_of_their_own(guidance):
    how = cached(3, 7, **guidance)
    assert False in how.whole
    expected = by_definition(how)
    np.testing.assert_allclose(finished(how), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(finished(cached(1, 7, **guidance)) - expected).max() > 1e-2
    # windows keep features of their own; the network is without context, so that they change nothing
    eight = Model(8, TwoLayers())
    many = finished(how, eight, OVERLAPPING, rows=8)
    np.testing.assert_allclose(many, expected, rtol=1e-4, atol=1e-5)
    # the devices share a window: two groups for the halves of guidance, and the frames divided
    np.testing.assert_allclose(finished(how, eight, rows=8), expected, rtol=1e-4, atol=1e-5)


def test_halves_one_after_the_other_keep_the_same_features(monkeypatch):
    how = cached(2, 4)
    expected = finished(how, windows=OVERLAPPING)
    monkeypatch.setattr(denoising, "MAX_BATCHED_PIXELS", 4 * 4 * 4 - 1)
    np.testing.assert_allclose(finished(how, windows=OVERLAPPING), expected, atol=1e-5)


def test_a_state_is_saved_where_no_features_are_used_again_and_resumes_to_the_bit(monkeypatch):
    monkeypatch.setattr(denoising, "SAVE_EVERY", 1)
    how, saved = cached(3, 8, every=2), []
    expected = finished(how, save=lambda step, state: saved.append((step, state)))
    assert [step for step, _ in saved] == [4, 8]
    for step, state in saved:
        np.testing.assert_array_equal(finished(how, state=state, step=step), expected)


def test_a_depth_that_the_network_does_not_have_is_refused():
    weights = {"base": load_folder(cascade.SHIPPED / "base", params=False)}

    def resolved(**given):
        return cascade.resolve_settings(weights, ["base"], {"base": given})["base"]

    assert resolved(cache_every=2, cache_depth=5).cache_depth == 5
    with pytest.raises(UserError, match="cache_depth must be from 1 to 5 for this model, not 6"):
        resolved(cache_every=2, cache_depth=6)
    with pytest.raises(UserError, match="cache_every must be at least 1, not 0"):
        resolved(cache_every=0)
