"""Checks that a set of latents was encoded by the models of this run."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lavie_jax.data.latents import LatentSet
from lavie_jax.errors import UserError
from lavie_jax.models.registry import TextEncoder, network_name
from lavie_jax.stages import STAGES
from lavie_jax.training.checkpoint import array_hash
from lavie_jax.weights.folder import Part, hash_dir
from lavie_jax.weights.tokenizer_files import FILES


def identity(vae: Part, text_encoder: Part, tokenizer: Path) -> dict[str, str]:
    """Returns the SHA-256 of each model that encodes: of its values, whatever their dtype and file.

    The VAE's `scaling_factor` does not count, because latents are stored unscaled.
    """
    unscaled = {k: v for k, v in vae.config.to_dict().items() if k != "scaling_factor"}
    return {
        "vae": _hash(unscaled, vae.params),
        "text_encoder": _hash(text_encoder.config.to_dict(), text_encoder.params),
        "tokenizer": hash_dir(tokenizer, only=FILES),
    }


def _hash(config: Mapping[str, Any], params: Any) -> str:
    numbers = array_hash(jax.tree.map(lambda x: np.asarray(x, np.float32), params))
    return hashlib.sha256(f"{json.dumps(config, sort_keys=True)} {numbers}".encode()).hexdigest()


def check_stage(stage: str, *, train_text_encoder: bool) -> None:
    """Refuses a run that needs more than latents and encoded captions."""
    if not STAGES[stage].latents_suffice:
        others = " and ".join(name for name, other in STAGES.items() if other.latents_suffice)
        raise UserError(
            f"stage {stage!r} is trained on pixels: latents are for {others}. Set data.source to a source of videos"
        )
    if train_text_encoder:
        raise UserError(
            "train_text_encoder=True: the captions in sets of latents were encoded by a frozen text encoder. "
            "Set it to False, or set data.source to a source of videos"
        )


def check_text(text_encoder: TextEncoder) -> None:
    """Refuses a text encoder with padding, whose masks sets of latents do not have."""
    if text_encoder.takes_mask:
        raise UserError(
            f"sets of latents do not store which tokens are padding, as {network_name(text_encoder.config)} needs: set "
            "data.source to a source of videos"
        )


def check_made_by(latents: LatentSet, models: Mapping[str, str]) -> None:
    """Refuses a set that was not encoded by `models`, the `identity` of this run's."""
    for name, digest in models.items():
        if (theirs := latents.weights.get(name)) != digest:
            raise UserError(
                f"the latents in {str(latents.path)!r} were made by another {name.replace('_', ' ')} than this "
                f"run's: SHA-256 {str(theirs)[:12]}... of {latents.made_from!r}, this run's is {digest[:12]}.... Train "
                "with those weights, or encode the set again, with --latents naming this run's"
            )
