"""Copy a trained base model into the package, in half precision.

    python -m tools.ship_weights runs/base/weights lavie_jax/assets/base

Refuses more than 24 MiB, what the package may carry for this stage. What is at the destination is replaced only
if it is a weights folder.
"""

import argparse
from pathlib import Path

import numpy as np

from lavie_jax.errors import UserError, one_line_errors
from lavie_jax.weights import folder_hash, load_folder, save_folder

LIMIT = 24 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="weights folder of a training run")
    parser.add_argument("destination", type=Path)
    args = parser.parse_args()
    model = load_folder(args.source, dtype=np.float16)
    parts = {name: getattr(model, name) for name in ("unet", "vae", "text_encoder")}
    size = sum(2 * array.size for part in parts.values() for array in _leaves(part.params))
    if size > LIMIT:
        raise UserError(
            f"{args.source} has {size / 2**20:.1f} MiB in half precision; at most {LIMIT >> 20} may be shipped"
        )
    save_folder(
        args.destination,
        stage=model.stage,
        sampling=model.sampling,
        tokenizer=model.tokenizer_dir,
        schedule=model.schedule,
        overwrite=True,
        **{name: (part.config, part.params) for name, part in parts.items()},
    )
    print(f"{args.destination}: {size / 2**20:.1f} MiB, {folder_hash(args.destination)}")


def _leaves(tree):
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else [tree]


if __name__ == "__main__":
    with one_line_errors():
        main()
