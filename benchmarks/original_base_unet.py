"""Evaluates an original network in PyTorch once for each line on stdin. Started by base_unet_vs_original.py:

    PYTHON original_base_unet.py CHECKOUT CASE SHAPES CORES OUTPUT DTYPE

Runs in the original's environment, without jax. The network is the base UNet of CHECKOUT, or the decoder of diffusers'
VAE. Weights and inputs come from the formula of the golden CASE, with SHAPES (JSON) replacing its inputs, and are
cast to DTYPE. Prints one JSON object per line: torch's version when ready, then the seconds of each evaluation. For the
line "save", the output is written to OUTPUT (.npy).
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from lavie_jax.parity.cases import read_case  # numpy and the standard library only


def main() -> None:
    """Runs the command line."""
    checkout, case_path, shapes, cores, output, dtype = sys.argv[1:]
    torch.set_num_threads(int(cores))
    case = dataclasses.replace(read_case(Path(case_path)), inputs=json.loads(shapes))
    if case.kind == "vae":
        from diffusers import AutoencoderKL

        network = AutoencoderKL(**case.model).eval()
    else:
        sys.path.insert(0, str(Path(checkout) / "base"))
        from models.unet import UNet3DConditionModel

        network = UNet3DConditionModel.from_config({**case.model, "use_first_frame": False}).eval()
    with torch.inference_mode():
        for name, value in network.state_dict().items():
            if name.endswith("rotary_emb.freqs"):
                continue
            if name not in case.parameters:
                sys.exit(f"error: the installed network has {name}, which {case_path} does not have")
            value.copy_(torch.from_numpy(case.parameter(name, case.parameters[name])))
        network.to(getattr(torch, dtype))
        inputs = {
            name: torch.from_numpy(case.input(name)).to(getattr(torch, dtype))
            for name in ("sample", "context", "latent")
            if name in case.inputs
        }
        print(json.dumps({"torch": torch.__version__}), flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            if case.kind == "vae":
                result = network.decode(inputs["latent"]).sample
            else:
                timesteps = torch.tensor(case.inputs["timesteps"])
                result = network(inputs["sample"], timesteps, encoder_hidden_states=inputs["context"]).sample
            seconds = time.perf_counter() - start
            if line.strip() == "save":
                np.save(output, result.float().numpy())
            print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
