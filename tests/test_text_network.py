"""The text encoder of a run, by name: fields, their defaults, and choices that do not fit."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny

from lavie_jax.errors import UserError
from lavie_jax.models import registry
from lavie_jax.models.t5_text import T5Text, T5TextConfig
from lavie_jax.planner.sampling import abstract_weights
from lavie_jax.planner.training import abstract_batch, abstract_init
from lavie_jax.training import build, config, initial, latents, options
from lavie_jax.training.step import check_same

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def parse(*words):
    return options.parse(["--config", "configs/base_t5.py:tiny", "--workdir", "runs/none", *words]).config


def test_the_fields_of_the_text_encoder_follow_from_its_name():
    run = parse("--config.text_encoder.d_ff=48")
    assert run.text_encoder.d_ff == 48 and "hidden_size" not in run.text_encoder
    assert options.load("configs/base.py").text_network == "clip_text"
    # On the command line, a new encoder has the defaults of its own fields, in whatever order they are given.
    clip = parse("--config.text_encoder.hidden_size=24", "--config.text_network=clip_text")
    assert clip.text_encoder.hidden_size == 24 and "d_ff" not in clip.text_encoder
    with pytest.raises(UserError, match="'text_network': unknown value 't5'; did you mean 't5_text'"):
        parse("--config.text_network=t5")
    with pytest.raises(UserError, match="unknown config field 'text_encoder.hidden_size'"):
        parse("--config.text_encoder.hidden_size=24")
    assert "text_encoder.d_ff" in options.help_text(["--config=configs/base_t5.py:tiny"])


def test_configs_of_older_runs_have_clip():
    older = {"stage": "base", "text_encoder": {"hidden_size": 32}}
    assert config.complete(older)["text_encoder"]["hidden_act"] == "quick_gelu"
    newer = {"stage": "base", "text_network": "t5_text", "text_encoder": {"d_model": 32}}
    assert config.complete(newer)["text_encoder"]["feed_forward_proj"] == "relu"


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="unet.encoder_hid_dim = 24 must be the text encoder's width 32"):
        build.make_models(parse("--config.text_encoder.d_model=32"), jnp.float32, 1.0)
    with pytest.raises(UserError, match="cross_attention_dim = 32 must be the .* width 24. unet.encoder_hid_dim = 24"):
        build.make_models(parse("--config.unet.encoder_hid_dim=None"), jnp.float32, 1.0)
    with pytest.raises(UserError, match="has a clip_text, but the config has a t5_text"):
        check_same(tiny.TEXT, T5TextConfig(), "weights/base")
    run = parse("--config.text_from=random", "--config.train_text_encoder=false")
    with pytest.raises(UserError, match="text_from = 'random' is an untrained text encoder"):
        initial.load(run, build.make_models(run, jnp.float32, 1.0), Path())
    with pytest.raises(UserError, match="do not store which tokens are padding, as t5_text needs"):
        latents.check_text(T5Text(T5TextConfig()))


def test_the_planner_has_masks_and_the_projection():
    run = parse()
    batch = abstract_batch(run, 2)
    assert batch["token_mask"].shape == (2, 16) and batch["image_token_mask"].shape == (2, 1, 16)
    task = build.stage_task(run, jnp.float32, abstract_init(run))
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert params["unet"]["encoder_hid_proj"]["kernel"].shape == (24, 32)
    assert abstract_weights(run).text_encoder.config.width == 24


def test_unets_without_a_projection_are_as_before():
    assert tiny.UNET.encoder_hid_dim is None and tiny.UNET.text_width == tiny.UNET.cross_attention_dim
    assert "encoder_hid_proj" not in registry.abstract_params(tiny.UNET)
    wide = dataclasses.replace(tiny.UNET, encoder_hid_dim=24)
    new = set(registry.abstract_params(wide)) - set(registry.abstract_params(tiny.UNET))
    assert new == {"encoder_hid_proj"}
    with pytest.raises(UserError, match="encoder_hid_dim must be at least 1"):
        dataclasses.replace(tiny.UNET, encoder_hid_dim=0)
