"""Parts that several configs share. Not a config itself."""

from typing import Any

from lavie_jax.training.options import check_mode, new_config

__all__ = ["check_mode", "clip_folder", "new_config", "set_fields", "set_stage", "set_student", "set_subject", "set_t5"]


def clip_folder(data: Any) -> None:
    """Sets the group `data` to the user's clips and images at the paper's size: 16 frames of 320x512 at 8 fps."""
    set_fields(data, source="video_folder", path="data/clips", image_path="data/images", images=4)
    set_fields(data, height=320, width=512)


def set_fields(group: Any, **values: Any) -> None:
    """Sets several fields of a group; raises AttributeError for one that does not exist."""
    for name, value in values.items():
        getattr(group, name)
        setattr(group, name, value)


def set_t5(config: Any, **values: Any) -> None:
    """Makes T5 the text encoder of a stage's config, and sets its fields."""
    config.text_network = "t5_text"
    config.text_encoder = new_config(config.stage, config.text_network).text_encoder
    set_fields(config.text_encoder, **values)


def set_subject(config: Any, *, images: int) -> None:
    """Makes a base stage's config train a LoRA on a folder of a few pictures, `images` of them in each example."""
    config.regime, config.train_text_encoder, config.remat = "lora", False, "none"
    set_fields(config.data, source="video_folder", path=None, image_path="data/subject", frames=0, images=images)
    config.data.hold_out = False  # of five pictures, each counts
    config.held_out_batches = 1
    config.keep_best = 0
    config.ema_decay = 0.99


def set_student(config: Any) -> None:
    """Makes a stage's config distil the model in `init_from`, whose sampling settings the student inherits."""
    config.distill.kind = "guidance"
    config.regime, config.train_text_encoder = "joint", False
    config.inflate = False
    config.sampling = new_config(config.stage).sampling
    # The teacher sees the captions as they are: without them, its two predictions would be the same.
    config.data.caption_drop = config.data.detail_drop = 0.0
    config.ema_decay = 0.95


def set_stage(config: Any, stage: str) -> None:
    """Turns a base stage's config into one of another stage, with its fields of `sampling` and the groups that only it
    has."""
    new = new_config(stage)
    config.stage = stage
    config.sampling = new.sampling
    for group in new:
        if group not in config:
            config[group] = new[group]
