"""What a UNet looks like: diffusers' JSON, and what each stage of LaVie adds to it."""

import dataclasses

from lavie_jax.errors import UserError, suggest
from lavie_jax.models.config import config_from_dict, only_supported


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The architecture. The first group has diffusers' names and meanings, the second is what LaVie adds."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # width of each level, outermost first
    layers_per_block: int = 2  # residual blocks per level on the way down; one more on the way up
    attention_levels: tuple[bool, ...] = (True, True, True, False)  # which levels have transformers
    cross_attention_dim: int = 768  # width of the text
    attention_heads: tuple[int, ...] = (8, 8, 8, 8)  # heads at each level (diffusers calls this attention_head_dim)
    only_cross_attention: tuple[bool, ...] = (False, False, False, False)  # levels whose attn1 attends to the text
    use_linear_projection: bool = False  # into and out of a transformer: a dense layer, or a 1x1 convolution
    num_class_embeds: int | None = None  # noise levels of the super-resolution stage
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    temporal_attention: str = "none"  # where: "none", "before_ff", "after_ff"
    temporal_position: bool = False  # rotary embedding and relative position bias in the temporal attention
    motion_embedding: bool = False  # caption x time x place, added before temporal attention; no released model has it
    caption_modulation: bool = False  # the caption scales and shifts features in every resnet; no released model has it
    key_frames_around: bool = False  # each frame sees those on both sides and starts from them; no released model does
    low_res_skip: bool = False  # the prediction starts from the low-resolution frame; no released model's does
    spatial_attention: str = "self"  # "self", or "sparse_causal": the first and the previous frame (interpolation)
    temporal_resblocks: bool = False  # each transformer begins with convolutions over time (super-resolution)
    down_temporal_idx: tuple[int, ...] = ()  # down blocks that a TemporalModule follows (super-resolution)
    mid_temporal: bool = False  # whether one follows the mid block
    up_temporal_idx: tuple[int, ...] = ()  # up blocks that one follows, counted from the deepest
    temporal_norm_groups: int = 32  # in those modules and convolutions; the original has 32 whatever norm_num_groups is

    def __post_init__(self):
        levels = len(self.block_out_channels)
        for field in ("attention_levels", "attention_heads", "only_cross_attention"):
            if len(getattr(self, field)) != levels:
                raise UserError(f"UNet config: {field} has {len(getattr(self, field))} entries for {levels} levels.")
        choices = {
            "temporal_attention": ("none", "before_ff", "after_ff"),
            "spatial_attention": ("self", "sparse_causal"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise UserError(
                    f"UNet config: unknown {field} {getattr(self, field)!r}{suggest(getattr(self, field), allowed)}"
                )
        for width, heads in zip(self.block_out_channels, self.attention_heads, strict=True):
            if width % self.norm_num_groups or width % heads:
                wanted = f"norm_num_groups {self.norm_num_groups} and of {heads} heads"
                raise UserError(f"UNet config: width {width} must be a multiple of {wanted}.")

    @classmethod
    def from_dict(cls, fields: dict) -> "UNetConfig":
        """From what `to_dict` gave; UserError for unknown names and wrong types."""
        return config_from_dict(cls, fields)

    def to_dict(self) -> dict:
        """A dict that JSON can hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_diffusers(cls, json: dict, kind: str) -> "UNetConfig":
        """From a diffusers UNet config and the kind of model: "image", "base", "interpolation", "vsr".

        Absent fields take diffusers' defaults; a field whose value this UNet cannot express raises UserError.
        """
        if kind not in VIDEO_FIELDS:
            raise UserError(f"Unknown kind of UNet {kind!r}{suggest(kind, VIDEO_FIELDS)}")
        only_supported("the UNet's config.json", json, FIXED_DIFFUSERS_FIELDS)
        widths = tuple(json.get("block_out_channels", cls.block_out_channels))
        levels = len(widths)
        down = json.get("down_block_types", ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"])
        up = json.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1))
        attends = tuple(_has_attention(name, "Down") for name in down)
        if attends[::-1] != tuple(_has_attention(name, "Up") for name in up) or len(down) != levels:
            raise UserError(
                f"UNet config: down_block_types {down} and up_block_types {up} must mirror each other, one a level."
            )

        def per_level(value):
            return tuple(value) if isinstance(value, list | tuple) else (value,) * levels

        temporal = dict(VIDEO_FIELDS[kind])
        if kind == "vsr":  # the released model has a temporal module at every level
            only_supported("the UNet's config.json", json, {"use_first_frame": False, "video_condition": False})
            temporal["down_temporal_idx"] = tuple(json.get("down_temporal_idx", range(levels)))
            temporal["mid_temporal"] = json.get("mid_temporal", True)
            temporal["up_temporal_idx"] = tuple(json.get("up_temporal_idx", range(levels)))
        return cls(
            in_channels=json.get("in_channels", 4),
            out_channels=json.get("out_channels", 4),
            block_out_channels=widths,
            layers_per_block=json.get("layers_per_block", 2),
            attention_levels=attends,
            cross_attention_dim=json.get("cross_attention_dim", 1280),
            attention_heads=per_level(json.get("attention_head_dim", 8)),
            only_cross_attention=per_level(json.get("only_cross_attention", False)),
            use_linear_projection=json.get("use_linear_projection", False),
            num_class_embeds=json.get("num_class_embeds"),
            norm_num_groups=json.get("norm_num_groups", 32),
            norm_eps=json.get("norm_eps", 1e-5),
            **temporal,
        )

    def inflated(self, kind: str) -> "UNetConfig":
        """The video network of a kind around this image model, with temporal modules at every level for "vsr"."""
        config = dataclasses.replace(self, **VIDEO_FIELDS[kind])
        if kind != "vsr":
            return config
        every = tuple(range(len(self.block_out_channels)))
        return dataclasses.replace(config, down_temporal_idx=every, mid_temporal=True, up_temporal_idx=every)

    def image_config(self) -> "UNetConfig":
        """The image model inside: the same network without anything temporal."""
        return dataclasses.replace(
            self, **{f.name: f.default for f in dataclasses.fields(self) if f.name in TEMPORAL_FIELDS}
        )


TEMPORAL_FIELDS = (
    "temporal_attention",
    "temporal_position",
    "motion_embedding",
    "key_frames_around",
    "spatial_attention",
    "temporal_resblocks",
    "down_temporal_idx",
    "mid_temporal",
    "up_temporal_idx",
)
VIDEO_FIELDS = {  # what a kind of model implies beyond its JSON
    "image": {},
    "base": {"temporal_attention": "before_ff", "temporal_position": True},
    "interpolation": {"temporal_attention": "after_ff", "spatial_attention": "sparse_causal"},
    "vsr": {
        "temporal_attention": "before_ff",
        "temporal_position": True,
        "temporal_resblocks": True,
    },
}
FIXED_DIFFUSERS_FIELDS = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}


def _has_attention(block_type: str, way: str) -> bool:
    name = block_type.removesuffix("2D").removesuffix("3D")
    if name not in (f"{way}Block", f"CrossAttn{way}Block"):
        allowed = [f"{way}Block2D", f"CrossAttn{way}Block2D"]
        raise UserError(f"UNet config: unknown block type {block_type!r}{suggest(block_type, allowed)}")
    return name.startswith("CrossAttn")
