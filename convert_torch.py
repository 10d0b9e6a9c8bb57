r"""Converts between PyTorch files and weights folders.

    python convert_torch.py import --stage base --unet lavie_base.pt \
        --pretrained stable-diffusion-v1-4/ --out weights/base
    python convert_torch.py inflate --stage base --pretrained stable-diffusion-v1-4/ --out weights/base-init
    python convert_torch.py inflate --stage base --pretrained stable-diffusion-v1-4/ \
        --text-encoder t5-v1_1-large/ --out weights/base-t5-init
    python convert_torch.py export --weights weights/base --out lavie_base.pt --check original/lavie_base.pt
    python convert_torch.py import-clip --pretrained clip-vit-base-patch32/ --out weights/clip
    python convert_torch.py merge-lora --weights weights/base --lora style.safetensors:0.8 --out weights/style
    python convert_torch.py export-lora --lora runs/cat/weights --names kohya --out cat.safetensors

`import` converts a released LaVie checkpoint and the image model that it was trained from. `inflate` creates a model to
start training from. `export` converts back to PyTorch's names; `--check` compares with an original, byte for byte.
`import-clip` and `import-i3d` convert the networks with which `lavie_jax.evaluation` measures CLIPSIM and FVD.
`merge-lora` writes a weights folder with LoRA files merged; `export-lora` renames the tensors of a trained LoRA. The
exit code is 0; 1 when `--check` finds a difference; 2 for wrong input, with a message and nothing written.

Files are recognized by their content, whatever their ending. A sharded model is given as its folder or its index, an
entry of the Hugging Face hub's cache as its root. Where a file has both weights and moving averages of them, the
averages are used unless --no-ema is given. What was chosen or ignored in a file is printed.
"""

import argparse
import sys
from pathlib import Path

from lavie_jax.errors import Parser, UserError, user_location
from lavie_jax.models.registry import PARTS
from lavie_jax.samples.prompts import check_seed
from lavie_jax.stages import STAGES
from lavie_jax.weights.clip import import_clip
from lavie_jax.weights.convert import differences, export_part, exported, import_stage
from lavie_jax.weights.i3d import import_i3d
from lavie_jax.weights.inflate import inflate_pretrained, inflate_stage
from lavie_jax.weights.lora import parse_lora, read_lora
from lavie_jax.weights.lora_files import NAMES as LORA_NAMES
from lavie_jax.weights.lora_files import export_lora, merge_folder
from lavie_jax.weights.pretrained import read_part_file
from lavie_jax.weights.reading import read_weights_file


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line. Raises UserError when it is wrong."""
    parser = Parser(prog="convert_torch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    into = commands.add_parser("import", help="a LaVie checkpoint -> a weights folder")
    into.add_argument("--stage", required=True, choices=sorted(STAGES))
    into.add_argument("--unet", required=True, type=Path, help="the LaVie checkpoint: a file, or a folder of shards")

    grow = commands.add_parser("inflate", help="an image model -> a weights folder to start training from")
    grow.add_argument("--stage", required=True, choices=sorted(STAGES))
    grow.add_argument(
        "--from", dest="base", type=Path, help="stages prediction and interpolation: the weights folder of the base"
    )
    grow.add_argument("--seed", default="0", help="seed of the new parameters that do not start at zero")

    for command in (into, grow):
        command.add_argument(
            "--pretrained", type=Path, required=command is into,
            help="diffusers folder of the image model (vsr: the x4-upscaler), or a CompVis .ckpt, with --tokenizer",
        )  # fmt: skip
        command.add_argument("--tokenizer", type=Path, help="tokenizer folder, when --pretrained has none")
        command.add_argument("--vae", type=Path, help="another VAE than that of --pretrained: a file or a folder")
        command.add_argument(
            "--text-encoder", type=Path,
            help="another text encoder than that of --pretrained, with its tokenizer: a folder of CLIP's or T5's",
        )  # fmt: skip
        command.add_argument(
            "--ema", action=argparse.BooleanOptionalAction, default=True,
            help="use the moving averages of a file that has both them and the weights (default)",
        )  # fmt: skip
        command.add_argument("--out", required=True, type=Path, help="the weights folder to write")
        command.add_argument(
            "--share",
            type=Path,
            help="weights folder whose VAE, text encoder and tokenizer are referred to where they are equal",
        )

    back = commands.add_parser("export", help="a weights folder -> PyTorch names")
    back.add_argument("--weights", required=True, type=Path)
    back.add_argument("--part", choices=PARTS, default="unet")
    back.add_argument("--out", type=Path, help=".pt (a dict with the key ema) or .safetensors")
    back.add_argument("--check", type=Path, metavar="ORIGINAL", help="compare with this file, byte for byte")
    back.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=True,
        help="--check compares with the moving averages of a file that has both them and the weights (default)",
    )  # fmt: skip

    clip = commands.add_parser("import-clip", help="a CLIP model -> a weights folder for CLIPSIM")
    clip.add_argument("--pretrained", required=True, type=Path, help="transformers' folder, or OpenAI's file")
    clip.add_argument("--tokenizer", type=Path, help="folder of CLIP's tokenizer, when --pretrained has none")
    clip.add_argument("--out", required=True, type=Path, help="the weights folder to write")

    i3d = commands.add_parser("import-i3d", help="FVD's network, as TATS' i3d_pretrained_400.pt -> .safetensors")
    i3d.add_argument("--pretrained", required=True, type=Path, help="the PyTorch file")
    i3d.add_argument("--out", required=True, type=Path, help="the .safetensors file to write")

    merge = commands.add_parser("merge-lora", help="a weights folder and LoRA files -> a weights folder")
    merge.add_argument("--weights", required=True, type=Path)
    merge.add_argument(
        "--lora", required=True, action="append", type=user_location, metavar="FILE[:SCALE]", help="may be repeated"
    )
    merge.add_argument("--out", required=True, type=Path, help="the weights folder to write")

    rename = commands.add_parser("export-lora", help="a LoRA, as training writes it -> kohya's or diffusers' names")
    rename.add_argument("--lora", required=True, type=Path, help="the folder or file of the LoRA")
    rename.add_argument("--names", required=True, choices=LORA_NAMES)
    rename.add_argument("--out", required=True, type=Path, help="a .safetensors file")
    for command in (into, grow, back, clip, i3d, merge, rename):
        command.add_argument("--overwrite", action="store_true", help="replace what is at --out")

    args = parser.parse_args(argv)
    if args.command == "inflate" and (args.base is None) == (args.pretrained is None):
        grow.error("give either --pretrained (base, vsr) or --from (prediction, interpolation)")
    if args.command == "inflate" and (args.base is not None) != (STAGES[args.stage].inflates is not None):
        start = STAGES[args.stage].inflates
        option = f"--from a {start} folder" if start else f"a --pretrained {STAGES[args.stage].image_model}"
        grow.error(f"the stage {args.stage} starts from {option}")
    if args.command == "inflate" and args.base is not None and (args.vae or args.tokenizer or args.text_encoder):
        grow.error("--from has a VAE, a text encoder and a tokenizer: remove --vae, --text-encoder and --tokenizer")
    if args.command == "inflate" and args.base is not None and not args.ema:
        grow.error("--from is a weights folder, which has no moving averages beside the weights: remove --no-ema")
    if args.command == "export" and args.check is None and not args.ema:
        back.error("--no-ema is about the file of --check: give both")
    if args.command == "export" and args.out is None and args.check is None:
        back.error("give --out, --check, or both")
    if args.out is not None and args.overwrite:
        check_inputs_stay(args)
    return args


def check_inputs_stay(args: argparse.Namespace) -> None:
    """Raises UserError for an input inside of the folder --out, which is replaced as a whole."""
    kept = ("out", "share", "tokenizer")  # or copied
    given = {name: value for name, value in vars(args).items() if name not in kept}
    loras = [Path(parse_lora(text)[0]) for text in args.lora] if args.command == "merge-lora" else []
    for path in (*(value for value in given.values() if isinstance(value, Path)), *loras):
        if args.out.resolve() in (path.parent.resolve() / path.name).parents:
            raise UserError(
                f"{path} is inside of --out {args.out}, which --overwrite replaces as a whole: move it, or choose "
                "another name for --out"
            )


def use_cpu() -> None:
    """Keeps jax off accelerators, which conversion does not need and another program may hold."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def convert(args: argparse.Namespace) -> None:
    """Runs `import` or `inflate`: writes a weights folder."""
    stage, notes = STAGES[args.stage], []
    common = {"share": args.share, "overwrite": args.overwrite}
    image = {"pretrained": args.pretrained, "tokenizer": args.tokenizer, "vae": args.vae, "ema": args.ema, **common}
    image["text_encoder"] = args.text_encoder
    if args.command == "import":
        notes = import_stage(stage, args.out, unet_file=args.unet, **image)
    elif args.base is not None:
        inflate_stage(stage, args.out, source=args.base, seed=check_seed(args.seed), **common)
    else:
        notes = inflate_pretrained(stage, args.out, seed=check_seed(args.seed), **image)
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {args.out}")


def export(args: argparse.Namespace) -> int:
    """Runs `export`: writes a PyTorch file, compares with one, or both. Returns the exit code."""
    original, notes = (None, ()) if args.check is None else read_part_file(args.part, args.check, ema=args.ema)
    for note in notes:
        print(f"note: {note}")
    if args.out is not None:
        count = export_part(args.weights, args.out, part=args.part, overwrite=args.overwrite)
        print(f"wrote {count} tensors to {args.out}")
    if original is None:
        return 0
    ours = exported(args.weights, args.part) if args.out is None else read_weights_file(args.out)
    lines = differences(ours, original)
    print(*lines, sep="\n", end="\n" if lines else "")
    verdict = f"{len(lines)} differ" if lines else f"all {len(original)} are equal in name, shape, dtype and bytes"
    print(f"compared with {args.check}: {verdict}")
    return 1 if lines else 0


def convert_clip(args: argparse.Namespace) -> None:
    """Runs `import-clip`: writes a weights folder."""
    for note in import_clip(args.pretrained, args.out, tokenizer=args.tokenizer, overwrite=args.overwrite):
        print(f"note: {note}")
    print(f"wrote {args.out}")


def convert_i3d(args: argparse.Namespace) -> None:
    """Runs `import-i3d`: writes a file."""
    for note in import_i3d(args.pretrained, args.out, overwrite=args.overwrite):
        print(f"note: {note}")
    print(f"wrote {args.out}")


def merge_lora(args: argparse.Namespace) -> None:
    """Runs `merge-lora`: writes a weights folder."""
    loras = [(read_lora(file), scale) for file, scale in map(parse_lora, args.lora)]
    count, notes = merge_folder(args.weights, loras, args.out, overwrite=args.overwrite)
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {args.out}: {count} weights changed")


def rename_lora(args: argparse.Namespace) -> None:
    """Runs `export-lora`: writes a file."""
    count = export_lora(read_lora(args.lora), args.out, names=args.names, overwrite=args.overwrite)
    print(f"wrote the changes of {count} layers to {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        args = parse(argv)
        use_cpu()
        if args.command == "export":
            return export(args)
        commands = {"import-clip": convert_clip, "import-i3d": convert_i3d, "merge-lora": merge_lora}
        commands |= {"export-lora": rename_lora}
        commands.get(args.command, convert)(args)
        return 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
