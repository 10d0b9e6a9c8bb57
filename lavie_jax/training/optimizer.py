"""AdamW or Muon, with warm-up and clipping, and the choice of parameters that are trained (paper, appendix D)."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import optax
import optax.contrib
from flax import traverse_util

from lavie_jax.errors import UserError, suggest

# LaVie compares three regimes of fine-tuning an image model on video (appendix D): the whole UNet on
# images and videos (best), the whole UNet on videos only (forgets), the temporal layers only (poor). "motion_only"
# is ours: the motion embedding alone, before the rest (see `models.additions.MotionEmbedding`).
REGIMES = ("joint", "video_only", "temporal_only", "motion_only")


KINDS = ("adamw", "muon")
ADAMW_RMS = 0.2  # of AdamW's updates at a learning rate of 1, as measured in arXiv 2502.16982, sec. 2.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The paper gives none of these numbers; the defaults are Stable Diffusion's habits."""

    kind: str = "adamw"  # or "muon": far fewer steps for a model from scratch, see `make_optimizer`
    learning_rate: float = 1e-4
    warmup: int = 1000  # updates of linear warm-up
    decay: str = "constant"  # after the warm-up: "constant" or "cosine" (to zero at the last update)
    b1: float = 0.9  # b1 and b2 are Adam's
    b2: float = 0.999
    weight_decay: float = 0.01  # on kernels only
    clip: float = 1.0  # global norm of the gradient; 0 = no clipping

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"unknown optimizer.kind {self.kind!r}{suggest(self.kind, KINDS)}")
        for name in ("learning_rate", "warmup", "weight_decay", "clip"):
            check_number(f"optimizer.{name}", getattr(self, name), low=0)
        for name in ("b1", "b2"):
            check_number(f"optimizer.{name}", getattr(self, name), low=0, below=1)


def check_number(name: str, value: float, *, low: float, below: float = math.inf) -> None:
    """UserError for a number of a config that is below `low`, not below `below`, or not finite."""
    if not low <= value < below:
        limit = "" if below == math.inf else f" and below {below}"
        raise UserError(f"config field {name!r} must be finite, at least {low}{limit}; given {value}.")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """update number -> learning rate."""
    if config.decay not in ("constant", "cosine"):
        raise UserError(f"unknown optimizer.decay {config.decay!r}{suggest(config.decay, ('constant', 'cosine'))}")
    if config.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warmup, max(steps, config.warmup + 1)
        )
    # A warm-up of 0 would divide by zero inside optax's linear schedule.
    return (
        optax.linear_schedule(0.0, config.learning_rate, config.warmup)
        if config.warmup
        else (optax.constant_schedule(config.learning_rate))
    )


def updates_done(opt_state: Any) -> jax.Array:
    """How many updates were applied: what the learning rate is a function of. Steps that are skipped do not count."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip the gradient's global norm, then AdamW or Muon; weight decay on kernels only.

    Muon (K. Jordan 2024; arXiv 2502.16982) makes the singular values of a kernel's update alike, so that what few
    examples ask for is learnt beside what all of them do. Its updates are brought to AdamW's usual size, so that one
    learning rate fits both; what is no kernel inside the network stays with Adam.
    """
    rate = learning_rate(config, steps)
    if config.kind == "adamw":
        decayed = lambda params: {path: path.endswith("kernel") for path in params}  # noqa: E731
        kind = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decayed)
    else:
        kind = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=ADAMW_RMS,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), kind) if config.clip else kind


def _matrices(params: Mapping[str, Any]) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    """Which of the parameters Muon takes, as matrices (inputs of a place, outputs); None: Adam's.

    First and last layers are Adam's, as the inventor has it: their inputs or outputs are no hidden features.
    """

    def inside(path: str) -> bool:
        first_or_last = re.search(r"/(conv_in|conv_out|key_frame_(embedding|skip)_temporal|low_res_skip)/", path)
        return path.endswith("/kernel") and not first_or_last

    return {
        path: optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), (x.ndim - 1,)) if inside(path) else None
        for path, x in params.items()
    }


def is_trained(path: str, *, regime: str, images_only: bool) -> bool:
    """Whether the parameter at `path` (e.g. `unet/conv_in/kernel`) is trained.

    Without video frames the temporal layers do nothing: left out, weight decay cannot wear them down.
    """
    if regime == "motion_only":
        return "motion_embedding" in path
    temporal = "temporal" in path
    return temporal if regime == "temporal_only" else not (temporal and images_only)


def split(params: Mapping[str, Any], *, regime: str, images_only: bool) -> tuple[dict, dict]:
    """Splits a nested dict of parameters into flat dicts (trained, frozen) with paths as keys.

    Differentiating the first alone costs no gradients and no optimizer state for the second.
    """
    if regime not in REGIMES:
        raise UserError(f"unknown regime {regime!r}{suggest(regime, REGIMES)}")
    flat = traverse_util.flatten_dict(params, sep="/")
    trained = {k: v for k, v in flat.items() if is_trained(k, regime=regime, images_only=images_only)}
    if not trained:
        raise UserError(f"regime {regime!r} trains no parameter of this model.")
    return trained, {k: v for k, v in flat.items() if k not in trained}


def merge(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict:
    """The inverse of `split`."""
    return traverse_util.unflatten_dict({**trained, **frozen}, sep="/")
