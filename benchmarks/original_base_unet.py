"""Evaluates the original base UNet in PyTorch once for each line on stdin. Started by base_unet_vs_original.py:

    PYTHON original_base_unet.py CHECKOUT CASE SHAPES CORES OUTPUT

Runs in the original's environment, without jax. Weights and inputs come from the formula of the golden cases, with
SHAPES (JSON) replacing the case's inputs. Prints one JSON object per line: torch's version when ready, then the seconds
of each evaluation. For the line "save", the output is written to OUTPUT (.npy).
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
    checkout, case_path, shapes, cores, output = sys.argv[1:]
    sys.path.insert(0, str(Path(checkout) / "base"))
    from models.unet import UNet3DConditionModel

    torch.set_num_threads(int(cores))
    case = dataclasses.replace(read_case(Path(case_path)), inputs=json.loads(shapes))
    unet = UNet3DConditionModel.from_config({**case.model, "use_first_frame": False}).eval()
    with torch.inference_mode():
        for name, value in unet.state_dict().items():
            if name in case.parameters and not name.endswith("rotary_emb.freqs"):
                value.copy_(torch.from_numpy(case.parameter(name, case.parameters[name])))
        sample, context = (torch.from_numpy(case.input(name)) for name in ("sample", "context"))
        timesteps = torch.tensor(case.inputs["timesteps"])
        print(json.dumps({"torch": torch.__version__}), flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            result = unet(sample, timesteps, encoder_hidden_states=context).sample
            seconds = time.perf_counter() - start
            if line.strip() == "save":
                np.save(output, result.numpy())
            print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
