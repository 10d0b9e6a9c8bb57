"""Super-resolution of real film: frames of four times the size, by a network for CPUs.

    python tools/real_film.py --out data/film                       # the film, cut into clips of 512 rows
    python tools/metric_weights.py                                  # LPIPS, a part of the loss
    python train.py --config configs/film/vsr.py --workdir runs/film-vsr
    python train.py --config configs/film/vsr.py:tiny --workdir runs/film-vsr-tiny    # a minute on a CPU

Latents are folded pixels (a VAE without levels), because a small VAE loses more than enlargement by bicubic
interpolation does. The UNet has one level, no attention and no norms, so that it treats all sizes of frames alike. It
predicts x0, starting from the enlarged low-resolution frame. Sampling takes one step, at the highest noise level: the
low-resolution frame determines the frame that minimises the loss, which is what one step returns. The loss is the
absolute error, whose minimum is blurred, and LPIPS, whose minimum is sharp. The text has no influence; the text encoder
is as small as possible.

Modes: "" for one CPU core; "tiny" (a minute on a CPU, generated data). Hardware, time and result: docs/film.md.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("tiny",))
    config = film("vsr", mode)
    common.set_fields(config.unet, in_channels=48 + 3, num_class_embeds=1, enlarge_low_res=True)
    config.low_res_noise.highest = 0
    common.set_fields(config.data, frames=3, fps=24.0, height=96, width=96)
    config.batch, config.steps = 5, 3000
    common.set_fields(config.sampling, noise_level=0)
    if mode == "tiny":
        config.data.height = config.data.width = 32
        config.batch, config.steps = 2, 20
    return config


def film(stage: str, mode: str) -> ConfigDict:
    """Returns what the configs of film have in common."""
    config = common.new_config(stage)
    common.set_fields(config.vae, block_out_channels=(), patch_size=4, latent_channels=48)
    config.train_text_encoder = True  # from random weights; nothing reads it
    common.set_fields(
        config.text_encoder, vocab_size=192, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    common.set_fields(
        config.unet,
        out_channels=48,
        block_out_channels=(40,),
        layers_per_block=2,
        attention_levels=(False,),
        attention_heads=(1,),
        only_cross_attention=(False,),
        cross_attention_dim=8,
        norm_num_groups=0,
        plain_mid=True,
        mid_temporal=True,
        temporal_norm_groups=0,
        temporal_attention="none",
        temporal_resblocks=False,
        temporal_position=False,
    )
    config.schedule.prediction = "sample"
    common.set_fields(config.loss, absolute=True, posterior_mean=True, logit_normal=(6.0, 1.0), perceptual=0.1)
    config.loss.held_out_timesteps = (999,)
    common.set_fields(config.optimizer, learning_rate=1e-3, warmup=100, decay="cosine", weight_decay=0.0)
    config.ema_decay = 0.995
    common.set_fields(
        config.sampling, sampler="respaced_ddim", spacing="trailing", steps=1, guidance=1.0, prompt_suffix="",
        negative_prompt="",
    )  # fmt: skip
    common.set_fields(
        config.data, source="array_record", path="data/film/shards", images=0, full_height=256, full_width=256,
        caption_drop=0.0,
    )  # fmt: skip
    config.held_out_batches, config.held_out_every, config.checkpoint_every = 8, 500, 500
    config.prompts = ()
    if mode == "tiny":
        config.unet.block_out_channels, config.unet.layers_per_block = (8,), 1
        common.set_fields(config.data, source="moving_shapes", path=None, full_height=0, full_width=0)
        config.loss.perceptual = 0.0  # its weights are in another package
        config.held_out_batches, config.optimizer.warmup = 1, 5
        config.log_every = config.held_out_every = config.checkpoint_every = config.sample_every = 10
    return config
