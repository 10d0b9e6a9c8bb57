"""python -m lavie_jax.parity DIR [--case GLOB]: see the package's docstring."""

import fnmatch
import gc
import sys
from pathlib import Path

from lavie_jax.errors import Parser, UserError
from lavie_jax.parallel import local_devices
from lavie_jax.parity.cases import read_case
from lavie_jax.parity.judge import judge


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases that the command line selects and returns the exit code."""
    parser = Parser(prog="python -m lavie_jax.parity", description="Reproduces golden cases.")
    parser.add_argument("dir", type=Path, metavar="DIR", help="folder of CASE.json and CASE.npz pairs")
    parser.add_argument("--case", default="*", metavar="GLOB", help="run only cases whose name matches")
    try:
        options = parser.parse_args(arguments)
        paths = [p for p in sorted(options.dir.glob("*.json")) if fnmatch.fnmatchcase(p.stem, options.case)]
        if not paths:
            raise UserError(f"no case matches {options.case!r} in {options.dir} (pairs of CASE.json and CASE.npz)")
        for path in paths:
            read_case(path)  # check all files before the first long run
        local_devices()  # or one line about why there are none
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = False
    for path in paths:
        result = judge(read_case(path))
        print(result, flush=True)
        failed |= bool(result.problem)
        gc.collect()  # the next case may need all of the memory
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
