"""Measures the peak anonymous memory of converting a full-size base UNet (3.6 GB, float32) and of exporting it again.

    python benchmarks/convert_memory.py [--dir FOLDER]

Writes a random `lavie_base.pt` of full size, with a tiny VAE and text encoder, to a temporary folder and runs
convert_torch.py on it. Exits with code 1 if the import exceeds the limit of 2 GB. Needs Linux, torch and 15 GB of disk.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from memory import run_measured

from lavie_jax.errors import Parser, one_line_errors
from lavie_jax.models.clip_text import CLIPTextConfig
from lavie_jax.stages import STAGES
from lavie_jax.weights.diffusers_configs import unet_config, vae_config
from lavie_jax.weights.expected import expected_shapes
from lavie_jax.weights.names import to_torch
from lavie_jax.weights.safetensors_io import Tensor, read_safetensors, write_safetensors
from lavie_jax.weights.torch_files import write_torch

ROOT = Path(__file__).parents[1]
LIMIT = 2e9  # bytes
UNET = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {"block_out_channels": [32, 32], "layers_per_block": 1}
TEXT = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
}  # fmt: skip


def random_tensors(part: str, config, dialect: str) -> dict[str, Tensor]:
    """Returns float32 tensors with PyTorch's names, generated when they are read."""
    tile = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    tensors = {}
    for path, shape in expected_shapes(config).items():
        name, view = to_torch(part, path, np.broadcast_to(np.float32(0), shape), dialect)
        tensors[name] = Tensor(
            view.shape,
            np.dtype(np.float32),
            lambda shape=view.shape: np.resize(tile, int(np.prod(shape))).reshape(shape),
        )
    return tensors


def make_files(folder: Path) -> None:
    """Writes `lavie_base.pt` and the diffusers folder `sd`."""
    flat = folder / "flat.safetensors"
    write_safetensors(flat, random_tensors("unet", unet_config(UNET, STAGES["base"]), "lavie"), {})
    write_torch(folder / "lavie_base.pt", read_safetensors(flat)[0])
    flat.unlink()
    vae, text = vae_config(VAE), CLIPTextConfig(**TEXT)
    for part, config, content, file in (
        ("vae", vae, VAE, "diffusion_pytorch_model.safetensors"),
        ("text_encoder", text, TEXT, "model.safetensors"),
    ):
        (folder / "sd" / part).mkdir(parents=True)
        write_safetensors(folder / "sd" / part / file, random_tensors(part, config, "diffusers"), {})
        (folder / "sd" / part / "config.json").write_text(json.dumps(content))
    for part, file, content in (("unet", "config.json", UNET), ("tokenizer", "tokenizer.json", {})):
        (folder / "sd" / part).mkdir()
        (folder / "sd" / part / file).write_text(json.dumps(content))


def main() -> int:
    """Runs the command line and returns its exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to create the temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
        folder = Path(temporary)
        make_files(folder)
        original, weights = folder / "lavie_base.pt", folder / "weights"
        print(f"lavie_base.pt: {original.stat().st_size / 1e9:.2f} GB", flush=True)
        common = ("--stage", "base", "--unet", original, "--pretrained", folder / "sd", "--out", weights)
        convert = sys.executable, ROOT / "convert_torch.py"
        seconds, imported = run_measured([*convert, "import", *common], cwd=ROOT)
        print(f"import: peak {imported / 1e9:.2f} GB (limit {LIMIT / 1e9:.0f} GB), {seconds:.0f} s", flush=True)
        back = ("--weights", weights, "--out", folder / "back.pt", "--check", original)
        seconds, exported = run_measured([*convert, "export", *back], cwd=ROOT)
        print(f"export and check: peak {exported / 1e9:.2f} GB, {seconds:.0f} s")
    return int(imported > LIMIT)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
