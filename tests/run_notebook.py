"""Runs the code cells of a notebook in order, in this process, once per set of form values.

    python tests/run_notebook.py NOTEBOOK '[{"seed": 1}, {"seed": 2}]'

The cells are plain Python, so this is what Colab does, without a browser. IPython is not a dependency of the project;
three stand-ins replace it and read the files that they would show. Any error in a cell ends this process.
"""

import json
import re
import sys
import types
from pathlib import Path


class Shown:
    """A stand-in for IPython.display.Video and Image."""

    def __init__(self, *, filename: str, embed: bool = True, width: int | None = None, html_attributes: str = ""):
        self.filename, self.bytes = filename, Path(filename).read_bytes()
        assert embed, f"{filename} would not be stored in the notebook"


def display(shown: Shown) -> None:
    """Prints what the browser would show."""
    print(f"shown: {shown.filename} ({len(shown.bytes)} bytes)")


def filled(source: str, values: dict) -> str:
    """Returns a cell with values in its form fields, and removes these from `values`."""
    for name in list(values):
        source, result = re.subn(
            rf"^{name} = .*?(?=  # @param)",
            lambda _, name=name: f"{name} = {values[name]!r}",
            source,
            flags=re.MULTILINE,
        )
        if result:
            del values[name]
    return source


def main() -> None:
    path, runs = sys.argv[1:]
    sys.modules["IPython"] = types.ModuleType("IPython")
    sys.modules["IPython.display"] = types.ModuleType("IPython.display")
    sys.modules["IPython.display"].__dict__.update(Video=Shown, Image=Shown, display=display)
    cells = [cell for cell in json.loads(Path(path).read_text())["cells"] if cell["cell_type"] == "code"]
    for values in json.loads(runs):
        names = {"__name__": "__main__"}
        for cell in cells:
            print(f"cell: {cell['id']}", flush=True)
            exec(compile(filled("".join(cell["source"]), values), f"cell {cell['id']}", "exec"), names)
        assert not values, f"no cell has fields {sorted(values)}"
    import jax

    print("left on the devices:", sum(array.nbytes for array in jax.live_arrays()), "bytes")


if __name__ == "__main__":
    main()
