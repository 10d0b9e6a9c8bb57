"""Writes notebooks/lavie_colab.ipynb, which samples videos in Colab stage by stage, from weights or PyTorch files.

    python -m tools.make_notebook

Edit the cells here, not in the notebook: tests/test_notebook.py checks that the committed notebook equals the output of
this script, and runs it. Cells are plain Python without magics. A line `name = value  # @param ...` is a field of a
Colab form.
"""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "lavie_colab.ipynb"

ABOUT = """
# LaVie in JAX

Text to video in three stages ([LaVie](https://arxiv.org/abs/2309.15103)): **base** generates key frames from a prompt,
**interpolation** generates four times as many frames, and **vsr** enlarges them to four times the size.

Run the cells from top to bottom. With the default settings they sample a small model that is included in the project
and was trained on Moving Shapes, a data set of moving coloured shapes. To use LaVie itself, convert its checkpoints and
Stable Diffusion below. Only one stage's weights are on the chip at a time, and the host maps them from disk instead of
loading them into memory. The notebook is designed for one chip with 16 GB and a host with 12 GB; the project's README
lists what has been measured.

What the cells download, and how long they take. Sizes are computed from numbers of parameters in float32; times are
estimates for a runtime with one v5e chip, not measured. The first run of a stage compiles it, later ones do not.

| cell | downloads | time (estimate) |
| --- | --- | --- |
| Install | the repository, 40 MB, and packages | 2 to 4 minutes |
| Weights, included models | nothing | seconds |
| Weights, `hub:Vchitect/LaVie` | base, interpolation 3.7 GB each, vsr 2.8 GB; of Stable Diffusion 1.4 0.8 GB, \
of the x4-upscaler 1.6 GB | 5 to 15 minutes; seconds the second time |
| Base | nothing | 2 to 4 minutes; seconds with the included models |
| Interpolation | nothing | 4 to 8 minutes |
| Super-resolution | nothing | 10 to 30 minutes |

All results are stored in the folder `results`. If a cell is interrupted, run it again and it resumes, also in a new
session if the folder is on a mounted Drive. Different settings use different folders, so nothing is overwritten.
"""

INSTALL = """
# @title Install
import importlib.util
import subprocess
import sys
from pathlib import Path

# @markdown In Colab: the URL of the project's git repository, and the hardware of the runtime. Both are ignored if
# @markdown `lavie_jax` is installed already. If Colab asks for a restart afterwards, restart and run this cell again.
repository = ""  # @param {type:"string"}
hardware = "tpu"  # @param ["tpu", "cuda", "cpu"]

CLONE = Path("lavie-clone").resolve()

for folder in (Path.cwd(), Path.cwd().parent):  # opened in a clone
    if (folder / "sample.py").is_file():
        sys.path.insert(0, str(folder))
if importlib.util.find_spec("lavie_jax") is None:
    if not repository and not CLONE.exists():
        raise SystemExit("repository: enter the URL of the project's git repository")
    extra = {"tpu": "[tpu]", "cuda": "[cuda]", "cpu": ""}[hardware]
    if not CLONE.exists():
        subprocess.run(["git", "clone", "--depth", "1", repository, str(CLONE)], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--editable", f"{CLONE}{extra}"], check=True)
if CLONE.exists():  # for sample.py and convert_torch.py, which are not part of the package
    sys.path.insert(0, str(CLONE))
"""

DEVICE = """
# @title Device
import jax

import lavie_jax

print(f"lavie_jax {lavie_jax.__version__}, jax {jax.__version__}")
for device in jax.local_devices():
    memory = (device.memory_stats() or {}).get("bytes_limit")
    print(device.device_kind, "" if memory is None else f"{memory / 2**30:.1f} GiB")
if jax.local_devices()[0].platform == "cpu":
    print("No TPU or GPU: sufficient for the small model only. In Colab: Runtime > Change runtime type.")
"""

KEEP = """
# @title Where to store results
# @markdown To keep them after this session, mount Drive and use a folder in it, such as `/content/drive/MyDrive/lavie`.
results = "results"  # @param {type:"string"}
mount_drive = False  # @param {type:"boolean"}

if mount_drive:
    from google.colab import drive

    drive.mount("/content/drive")
"""

WEIGHTS = """
## Weights

Leave `weights` empty to use the included small models. For LaVie itself, enter `hub:Vchitect/LaVie`, its repository on
the Hugging Face hub, or another with the files `lavie_base.pt`, `lavie_interpolation.pt` and `lavie_vsr.pt`: the chosen
stages are downloaded and converted once, with the parts of Stable Diffusion 1.4 and the x4-upscaler that they use. This
needs PyTorch, which Colab has. Weights folders of other people are `hub:OWNER/NAME`; a folder, e.g. on a mounted Drive,
is a path, and a bucket `gs://BUCKET/FOLDER`.

Downloads are in `~/.cache`, which Colab deletes after the session. Gated repositories need a token: enter it under
Secrets as `HF_TOKEN`. These models have their own licences. Read them before you use or share the results.
"""

HUB = """
# @title Weights
from lavie_jax import cascade

weights = ""  # @param {type:"string"}
# @markdown `all` = every stage that has weights. Fewer stages download less.
stages = "all"  # @param ["all", "base", "base,interpolation", "base,vsr", "base,interpolation,vsr"]

wanted = None if stages == "all" else stages.split(",")
if weights.startswith(("hub:", "gs://", "s3://")):  # from here on a folder, so that no cell downloads again
    found = cascade.stage_folders(weights, stages=wanted)
    if not found:
        raise SystemExit(f"{weights} has no weights of the stages {stages}")
    folder = next(iter(found.values()))
    weights = str(folder if len(found) == 1 else folder.parent)
"""

BY_HAND = """
### PyTorch files of your own

Skip this cell unless LaVie's checkpoints are elsewhere: name them, the image models that they were trained from (Stable
Diffusion 1.4 for base and interpolation, the x4-upscaler for vsr), and in `weights`, above, a new folder. Each is a
path, e.g. on a mounted Drive, or on the hub: `hub:OWNER/NAME` for an image model, `hub:OWNER/NAME/FILE` for a
checkpoint. An image model is a diffusers folder, or a CompVis `.ckpt` with the folder of its tokenizer. SHA-256 hashes
are optional and are checked if given; for a folder, enter `HASH NAME, HASH NAME` for files in it.
"""

CONVERT = """
# @title PyTorch files of your own
import convert_torch
from lavie_jax.weights import originals

# @markdown PyTorch files to convert into the folder `weights`:
lavie_base = ""  # @param {type:"string"}
lavie_base_sha256 = ""  # @param {type:"string"}
lavie_interpolation = ""  # @param {type:"string"}
lavie_interpolation_sha256 = ""  # @param {type:"string"}
lavie_vsr = ""  # @param {type:"string"}
lavie_vsr_sha256 = ""  # @param {type:"string"}
stable_diffusion = ""  # @param {type:"string"}
stable_diffusion_sha256 = ""  # @param {type:"string"}
stable_diffusion_tokenizer = ""  # @param {type:"string"}
upscaler = ""  # @param {type:"string"}
upscaler_sha256 = ""  # @param {type:"string"}
downloads = "downloads"  # @param {type:"string"}
# @markdown After conversion, delete the files named above and all downloads (folders that you named are kept):
delete_originals = False  # @param {type:"boolean"}

diffusion = (stable_diffusion, stable_diffusion_sha256)
originals_of = {  # stage -> (checkpoint, image model), each with its hash
    "base": ((lavie_base, lavie_base_sha256), diffusion),
    "interpolation": ((lavie_interpolation, lavie_interpolation_sha256), diffusion),
    "vsr": ((lavie_vsr, lavie_vsr_sha256), (upscaler, upscaler_sha256)),
}
named = [stage for stage, ((checkpoint, _), _) in originals_of.items() if checkpoint]
if named and not weights:
    raise SystemExit("weights: name a folder for the converted weights")
todo = [stage for stage in named if not (Path(weights) / stage / "config.json").exists()]
for number, stage in enumerate(todo):
    (checkpoint, checkpoint_hash), (image_model, image_hash) = originals_of[stage]
    if not image_model:
        raise SystemExit(f"{stage}: also name the image model that the checkpoint was trained from")
    files = {
        "unet": originals.get(checkpoint, downloads, sha256=checkpoint_hash),
        "pretrained": originals.get(image_model, downloads, sha256=image_hash),
        "out": Path(weights) / stage,
    }
    if stage != "vsr" and stable_diffusion_tokenizer:
        files["tokenizer"] = stable_diffusion_tokenizer
    if stage == "interpolation" and (Path(weights) / "base" / "config.json").exists():
        files["share"] = Path(weights) / "base"  # VAE and text encoder are the same and stored once
    if convert_torch.main(["import", f"--stage={stage}", *(f"--{name}={path}" for name, path in files.items())]):
        raise SystemExit(f"{stage} was not converted")
    if delete_originals:
        originals.discard(checkpoint, downloads)
        if image_model not in [originals_of[later][1][0] for later in todo[number + 1 :]]:
            originals.discard(image_model, downloads)

print("weights:", ", ".join(f"{stage} in {path}" for stage, path in cascade.stage_folders(weights or None).items()))
"""

PROMPT = """
# @title Prompt and settings
prompt = "a small red circle moving left over a blue background"  # @param {type:"string"}
seed = 0  # @param {type:"integer"}
# @markdown Empty fields and `None` use the defaults of the weights.
negative_prompt = ""  # @param {type:"string"}
frames = None  # @param {type:"raw"}
height = None  # @param {type:"raw"}
width = None  # @param {type:"raw"}
sampler = ""  # @param ["", "ddpm", "ddim", "euler", "heun", "respaced_ddim", "dpm++2m", "unipc"]
base_steps = None  # @param {type:"raw"}
base_guidance = None  # @param {type:"raw"}
interpolation_steps = None  # @param {type:"raw"}
interpolation_guidance = None  # @param {type:"raw"}
vsr_steps = None  # @param {type:"raw"}
vsr_guidance = None  # @param {type:"raw"}
# @markdown Noise level of the small frames, 0 to 350: higher lets vsr add more detail. Tiles, sized in pixels of the
# @markdown small frames, need less memory.
vsr_noise_level = None  # @param {type:"raw"}
vsr_tile = None  # @param {type:"raw"}
"""

SAMPLING = '''
import hashlib

from IPython.display import Image, Video, display

import sample
from lavie_jax.samples.outputs import slug
from lavie_jax.stages.settings import parse_stages

chosen = parse_stages(list(cascade.stage_folders(weights or None)) if stages == "all" else stages, own_clip=False)


def make(stage, settings, clip=None):
    """Samples a stage, or reuses its result from an earlier run, and shows it. Returns the file of the exact frames."""
    name = f"{slug(prompt)}-{seed}"
    words = [f"--prompt={prompt}", f"--seed={seed}", f"--stages={stage}"]
    words += [f"--format={'mp4' if stage == 'vsr' else 'mp4,npz'}"]
    words += [f"--weights={weights}"] if weights else []
    words += [f"--input={clip}"] if clip else []
    prefix = "" if stage == "base" else f"{stage}-"
    words += [f"--{prefix}{setting}={value}" for setting, value in settings.items() if value is not None]
    # The settings, and through `clip` those of earlier stages, determine the folder: no two requests share one.
    out = Path(results) / name / f"{stage}-{hashlib.sha256(repr(words).encode()).hexdigest()[:8]}"
    if sample.main([*words, f"--out={out}"]):
        raise SystemExit(f"{stage} is not finished; run this cell again to resume")
    jax.clear_caches()  # frees memory for the programs of the next stage
    display(Video(filename=str(out / f"0000-{name}.mp4"), embed=True, width=512, html_attributes="controls loop"))
    if (sheet := out / "contact-sheet.png").exists():
        display(Image(filename=str(sheet)))
    print(f"stored in {out}")
    return out / f"0000-{name}.npz"


print(f"{prompt!r}: {', '.join(chosen)}")
'''

BASE = """
# @title Base: key frames
clip = make(
    "base",
    {
        "negative-prompt": negative_prompt or None,
        "frames": frames,
        "height": height,
        "width": width,
        "sampler": sampler or None,
        "steps": base_steps,
        "guidance": base_guidance,
    },
)
"""

INTERPOLATION = """
# @title Interpolation: frames between the key frames
smooth = clip
if "interpolation" in chosen:
    smooth = make("interpolation", {"steps": interpolation_steps, "guidance": interpolation_guidance}, clip)
else:
    print("interpolation is not among the chosen stages")
"""

VSR = """
# @title Super-resolution: four times the size
if "vsr" in chosen:
    make(
        "vsr",
        {"steps": vsr_steps, "guidance": vsr_guidance, "noise-level": vsr_noise_level, "tile": vsr_tile},
        smooth,
    )
else:
    print("vsr is not among the chosen stages")
"""

KEPT = """
# @title Stored videos
for path in sorted((Path(results) / f"{slug(prompt)}-{seed}").rglob("*.mp4")):
    print(f"{path.stat().st_size / 1e6:8.2f} MB  {path}")
"""

CELLS = (
    ("about", "markdown", ABOUT),
    ("install", "code", INSTALL),
    ("device", "code", DEVICE),
    ("keep", "code", KEEP),
    ("weights-text", "markdown", WEIGHTS),
    ("weights", "code", HUB),
    ("convert-text", "markdown", BY_HAND),
    ("convert", "code", CONVERT),
    ("prompt", "code", PROMPT),
    ("sampling", "code", SAMPLING),
    ("base", "code", BASE),
    ("interpolation", "code", INTERPOLATION),
    ("vsr", "code", VSR),
    ("kept", "code", KEPT),
)


def notebook() -> str:
    """The notebook as JSON, format 4.5."""
    cells = []
    for name, kind, text in CELLS:
        cell = {"cell_type": kind, "id": name, "metadata": {}, "source": text.strip("\n").splitlines(keepends=True)}
        if kind == "code":
            form = {"cellView": "form"} if "# @param" in text else {}  # Colab shows the form and folds the code
            cell |= {"execution_count": None, "metadata": form, "outputs": []}
        cells.append(cell)
    metadata = {
        "accelerator": "TPU",
        "colab": {"provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Writes the notebook."""
    NOTEBOOK.parent.mkdir(exist_ok=True)
    NOTEBOOK.write_text(notebook(), encoding="utf-8")
    print(f"wrote {NOTEBOOK}")


if __name__ == "__main__":
    main()
