"""The architecture of a UNet: Stable Diffusion's, and the temporal parts that LaVie's stages add to it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lavie_jax.errors import UserError, suggest
from lavie_jax.models.config import check_positive, config_from_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The architecture. The first group of fields is diffusers', with its names; the second is LaVie's and ours."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # width of each level, outermost first
    layers_per_block: int = 2  # residual blocks of a level on the way down; one more on the way up
    attention_levels: tuple[bool, ...] = (True, True, True, False)  # whether each level has transformers
    cross_attention_dim: int = 768  # width of the text that transformers attend to
    encoder_hid_dim: int | None = None  # width of the text encoder, if a linear layer maps its output to that width
    attention_heads: tuple[int, ...] = (8, 8, 8, 8)  # heads at each level (diffusers calls this attention_head_dim)
    only_cross_attention: tuple[bool, ...] = (
        False,
        False,
        False,
        False,
    )  # whether attn1 of each level attends to the text
    use_linear_projection: bool = False  # around a transformer: dense layers instead of 1x1 convolutions
    num_class_embeds: int | None = None  # number of noise levels (super-resolution)
    norm_num_groups: int = 32  # 0: no norms
    norm_eps: float = 1e-5

    enlarge_low_res: bool = False  # the prediction, of pixels, starts from the enlarged low-resolution frame; ours
    move_key_frames: bool = False  # the prediction, of pixels, starts from the key frames, moved in time; ours
    plain_mid: bool = False  # no transformer in the mid block; ours
    temporal_attention: str = "none"  # position in the block: "none", "before_ff", "after_ff"
    temporal_position: bool = False  # rotary embedding and relative position bias in the temporal attention
    motion_embedding: bool = False  # caption x time x position, before temporal attention; ours
    caption_modulation: bool = False  # the caption scales and shifts features in every resnet; ours
    key_frames_around: bool = False  # frames see the key frames on both sides; ours
    known_frames_around: bool = False  # frames see the known frames on both sides, moved by the caption; ours
    low_res_skip: bool = False  # the prediction starts from the low-resolution frame; ours
    spatial_attention: str = "self"  # "self"; "sparse_causal": to the first and the previous frame (interpolation)
    temporal_resblocks: bool = False  # temporal convolutions before each transformer (super-resolution)
    down_temporal_idx: tuple[int, ...] = ()  # down blocks that a TemporalModule follows (super-resolution)
    mid_temporal: bool = False  # whether a TemporalModule follows the mid block
    up_temporal_idx: tuple[int, ...] = ()  # up blocks that a TemporalModule follows, counted from the deepest
    temporal_norm_groups: int = (
        32  # in those modules and convolutions; 32 in the originals, whatever norm_num_groups is
    )

    def __post_init__(self):
        numbers = ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim")
        check_positive("UNetConfig", **{name: getattr(self, name) for name in numbers})
        levels = len(self.block_out_channels)
        for field in ("attention_levels", "attention_heads", "only_cross_attention"):
            if len(getattr(self, field)) != levels:
                entries = len(getattr(self, field))
                raise UserError(f"UNet config: {field} has {entries} entries, but block_out_channels has {levels}.")
        choices = {
            "temporal_attention": ("none", "before_ff", "after_ff"),
            "spatial_attention": ("self", "sparse_causal"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise UserError(
                    f"UNet config: unknown {field} {getattr(self, field)!r}{suggest(getattr(self, field), allowed)}"
                )
        if self.encoder_hid_dim is not None and self.encoder_hid_dim < 1:
            raise UserError(f"UNet config: encoder_hid_dim must be at least 1, or None, not {self.encoder_hid_dim}.")
        if not self.norm_num_groups and (any(self.attention_levels) or not self.plain_mid):
            raise UserError("UNet config: norm_num_groups = 0 is for a UNet without transformers, with plain_mid.")
        for width, heads in zip(self.block_out_channels, self.attention_heads, strict=True):
            if min(width, heads) < 1 or width % max(self.norm_num_groups, 1) or width % heads:
                divisors = f"norm_num_groups = {self.norm_num_groups} and of the level's {heads} heads"
                raise UserError(f"UNet config: block_out_channels has {width}, not a multiple of {divisors}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "UNetConfig":
        """Inverse of `to_dict`. Raises UserError for unknown names and wrong types."""
        return config_from_dict(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict that JSON can represent."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @property
    def text_width(self) -> int:
        """Width of the texts that the UNet is called with."""
        return self.cross_attention_dim if self.encoder_hid_dim is None else self.encoder_hid_dim

    @property
    def reads_text(self) -> bool:
        """Whether the output depends on the text."""
        additions = self.motion_embedding or self.caption_modulation or self.known_frames_around
        return any(self.attention_levels) or not self.plain_mid or additions

    @property
    def skip_connections(self) -> int:
        """Number of skip connections, which is that of the residual blocks on the way up."""
        return len(self.block_out_channels) * (self.layers_per_block + 1)

    def image_config(self) -> "UNetConfig":
        """Returns the config of the image model inside: the same network without its temporal parts."""
        return dataclasses.replace(
            self, **{f.name: f.default for f in dataclasses.fields(self) if f.name in TEMPORAL_FIELDS}
        )


TEMPORAL_FIELDS = (
    "temporal_attention",
    "temporal_position",
    "motion_embedding",
    "key_frames_around",
    "known_frames_around",
    "move_key_frames",
    "spatial_attention",
    "temporal_resblocks",
    "down_temporal_idx",
    "mid_temporal",
    "up_temporal_idx",
)
