r"""Between PyTorch files and weights folders.

    python convert_torch.py import --stage base --unet lavie_base.pt \
        --pretrained stable-diffusion-v1-4/ --out weights/base
    python convert_torch.py inflate --stage base --pretrained stable-diffusion-v1-4/ --out weights/base-init
    python convert_torch.py export --weights weights/base --out lavie_base.pt --check original/lavie_base.pt

`import` converts a released LaVie checkpoint and the image model that it was made from. `inflate` makes the model to
start training from. `export` goes back to PyTorch's names; `--check` compares with an original, byte for byte. Exit
code: 0; 1 when `--check` finds a difference; 2 for wrong input, after one message and with nothing written.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from lavie_jax.errors import Parser, UserError
from lavie_jax.models.registry import PARTS
from lavie_jax.samples.prompts import check_seed
from lavie_jax.stages import LOW_RES_SCHEDULE, STAGES, interpolated_sampling
from lavie_jax.weights import load_folder
from lavie_jax.weights.convert import Target, differences, export_part, exported, import_stage
from lavie_jax.weights.inflate import inflate_base, inflate_pretrained
from lavie_jax.weights.pretrained import read_weights_file


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; UserError for what is wrong with it."""
    parser = Parser(prog="convert_torch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    into = commands.add_parser("import", help="a LaVie checkpoint -> a weights folder")
    into.add_argument("--stage", required=True, choices=sorted(STAGES))
    into.add_argument("--unet", required=True, type=Path, help="the LaVie checkpoint: .pt or .safetensors")

    grow = commands.add_parser("inflate", help="an image model -> a weights folder to start training from")
    grow.add_argument("--stage", required=True, choices=sorted(STAGES))
    grow.add_argument("--from", dest="base", type=Path, help="stage interpolation: the weights folder of the base")
    grow.add_argument("--seed", default="0", help="of the new parameters that do not start at zero")

    for command in (into, grow):
        command.add_argument(
            "--pretrained", type=Path, required=command is into,
            help="diffusers folder of the image model (vsr: the x4-upscaler), or a CompVis .ckpt with --tokenizer",
        )  # fmt: skip
        command.add_argument("--tokenizer", type=Path, help="tokenizer folder, when --pretrained has none")
        command.add_argument("--out", required=True, type=Path, help="the weights folder to write")
        command.add_argument(
            "--share", type=Path, help="weights folder whose VAE, text encoder and tokenizer are named, if equal"
        )

    back = commands.add_parser("export", help="a weights folder -> PyTorch names")
    back.add_argument("--weights", required=True, type=Path)
    back.add_argument("--part", choices=PARTS, default="unet")
    back.add_argument("--out", type=Path, help=".pt (a dict with the key ema) or .safetensors")
    back.add_argument("--check", type=Path, metavar="ORIGINAL", help="compare with this file, byte for byte")
    for command in (into, grow, back):
        command.add_argument("--overwrite", action="store_true", help="replace what is at --out")

    args = parser.parse_args(argv)
    if args.command == "inflate" and (args.base is None) == (args.pretrained is None):
        grow.error("give --pretrained (base, vsr) or --from (interpolation)")
    if args.command == "inflate" and (args.base is not None) != (args.stage == "interpolation"):
        grow.error("stage interpolation starts --from a base folder, the others from a --pretrained image model")
    if args.command == "export" and args.out is None and args.check is None:
        back.error("give --out, --check, or both")
    return args


def convert(args: argparse.Namespace) -> None:
    """`import` and `inflate`: writes a weights folder."""
    stage = STAGES[args.stage]
    low_res = LOW_RES_SCHEDULE if args.stage == "vsr" else None
    target = Target(stage=stage.name, sampling=stage.sampling, schedule=stage.schedule, low_res_schedule=low_res)
    common = {"share": args.share, "overwrite": args.overwrite}
    if args.command == "import":
        import_stage(
            target, args.out, unet_file=args.unet, pretrained=args.pretrained, tokenizer=args.tokenizer, **common
        )
    elif args.base is not None:
        base = load_folder(args.base, stage="base", params=False)
        sampling = interpolated_sampling({**STAGES["base"].sampling, **base.sampling})
        target = dataclasses.replace(target, sampling=sampling)
        inflate_base(target, args.out, base=args.base, seed=check_seed(args.seed), **common)
    else:
        seed = check_seed(args.seed)
        inflate_pretrained(target, args.out, pretrained=args.pretrained, tokenizer=args.tokenizer, seed=seed, **common)
    print(f"wrote {args.out}")


def export(args: argparse.Namespace) -> int:
    """`export`: writes a PyTorch file, compares with one, or both. The exit code."""
    original = None if args.check is None else read_weights_file(args.check)
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


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        args = parse(argv)
        if args.command == "export":
            return export(args)
        convert(args)
        return 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
