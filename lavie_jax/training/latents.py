"""Which models made a set of latents: training goes on with those, or not at all."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lavie_jax.data.latents import LatentSet
from lavie_jax.errors import UserError
from lavie_jax.training.checkpoint import array_hash
from lavie_jax.weights.folder import Part, hash_dir

STAGES = ("base", "interpolation")  # super-resolution is fed pixels, and patches at random places


def identity(vae: Part, text_encoder: Part, tokenizer: Path) -> dict[str, str]:
    """SHA-256 of each model that makes latents: of the numbers, whatever dtype and file they come in.

    The VAE's `scaling_factor` is left out, as latents are stored unscaled.
    """
    unscaled = {k: v for k, v in vae.config.to_dict().items() if k != "scaling_factor"}
    return {
        "vae": _hash(unscaled, vae.params),
        "text_encoder": _hash(text_encoder.config.to_dict(), text_encoder.params),
        "tokenizer": hash_dir(tokenizer),
    }


def _hash(config: Mapping[str, Any], params: Any) -> str:
    numbers = array_hash(jax.tree.map(lambda x: np.asarray(x, np.float32), params))
    return hashlib.sha256(f"{json.dumps(config, sort_keys=True)} {numbers}".encode()).hexdigest()


def check_stage(stage: str, *, train_text_encoder: bool) -> None:
    """UserError for a run that needs more than latents and encoded captions."""
    if stage not in STAGES:
        raise UserError(
            f"stage {stage!r} is trained on pixels: latents are for {' and '.join(STAGES)}. Use encoded clips "
            "(data.source)"
        )
    if train_text_encoder:
        raise UserError(
            "train_text_encoder=True: sets of latents hold captions as encoded by a frozen text encoder. "
            "Set it to False, or use encoded clips (data.source)"
        )


def check_made_by(found: LatentSet, models: Mapping[str, str]) -> None:
    """UserError for a set that other models than those of this run, an `identity`, have made."""
    for name, digest in models.items():
        if (theirs := found.weights.get(name)) != digest:
            raise UserError(
                f"the latents in {str(found.path)!r} were made by another {name.replace('_', ' ')} than this run's: "
                f"SHA-256 {str(theirs)[:12]}..., of {found.made_from!r}; this run's is {digest[:12]}.... Train with "
                "those weights, or make the set again with --latents of these"
            )
