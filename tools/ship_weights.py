"""Copies a trained model into the package, in half precision.

    python -m tools.ship_weights runs/base/weights lavie_jax/assets/base
    python -m tools.ship_weights runs/vsr/weights lavie_jax/assets/vsr --share lavie_jax/assets/base

Parts that equal those of the folder `--share` are referenced, not copied. A model above the size limit of its stage is
refused. An existing destination is replaced only if it is a weights folder.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from lavie_jax.errors import Parser, UserError, one_line_errors
from lavie_jax.weights import folder_hash, load_folder, save_folder

LIMITS = {"base": 24, "prediction": 8, "interpolation": 12, "vsr": 12}  # MiB, by stage


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="weights folder of a training run")
    parser.add_argument("destination", type=Path, help="weights folder to write")
    parser.add_argument("--share", type=Path, help="a weights folder that may have the same parts")
    args = parser.parse_args(argv)
    model = load_folder(args.source, dtype=np.float16)
    if model.stage not in LIMITS:
        raise UserError(f"{args.source} is a model of stage {model.stage}; only {', '.join(LIMITS)} are shipped")
    parts = {name: getattr(model, name) for name in ("unet", "vae", "text_encoder")}
    size = sum(2 * array.size for part in parts.values() for array in jax.tree.leaves(part.params))
    if size > LIMITS[model.stage] * 2**20:
        raise UserError(
            f"{args.source} has {size / 2**20:.1f} MiB in half precision; the limit of stage {model.stage} is "
            f"{LIMITS[model.stage]} MiB"
        )
    save_folder(
        args.destination,
        stage=model.stage,
        sampling=model.sampling,
        presets=model.presets,
        tokenizer=model.tokenizer_dir,
        schedule=model.schedule,
        low_res_schedule=model.low_res_schedule,
        share=args.share,
        overwrite=True,
        **{name: (part.config, part.params) for name, part in parts.items()},
    )
    print(f"{args.destination}: {size / 2**20:.1f} MiB, {folder_hash(args.destination)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
