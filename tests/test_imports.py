"""The order of the house: who may import whom, what sampling and training need, and who may print."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lavie_jax"

GROUND = {"models", "diffusion", "data", "parallel"}  # these know none of each other
MIDDLE = {"weights", "stages"}
UPPER = {"cascade", "training"}
KNOWS = {
    "errors": set(),
    "disk": set(),
    "flops": {"models"},
    "samples": {"data"},
    **dict.fromkeys(GROUND, set()),
    **dict.fromkeys(MIDDLE, {"models", "diffusion"}),
    "cascade": GROUND | MIDDLE | {"samples"},
    "training": GROUND | MIDDLE | {"samples", "disk", "flops"},  # samples: until the settings move to stages
    **dict.fromkeys(["evaluation", "curation", "parity"], GROUND | MIDDLE | UPPER | {"samples", "disk", "flops"}),
    "planner": GROUND | MIDDLE | UPPER | {"samples", "evaluation", "flops"},
    "__init__": GROUND | MIDDLE | UPPER | {"samples"},
}
MODEL_LIBRARIES = {"jax", "flax", "einops", "numpy", "jaxtyping"}
# Installed for some configurations only, or slow to import; whoever needs one imports it where it is used.
ON_DEMAND = [
    "grain", "av", "ml_collections", "tensorflow_datasets", "tensorboard", "torch", "transformers",
    "scenedetect", "cv2", "matplotlib",
]  # fmt: skip

SOURCES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def unit(path: Path) -> str:
    """The room that a file of the package belongs to: `models` for lavie_jax/models/unet.py."""
    return path.parts[1].removesuffix(".py")


def imported(path: Path, tree: ast.AST) -> set[str]:
    """Full names of all modules that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(path.parts[: -node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def is_command(tree: ast.Module) -> bool:
    """True for a file that `python -m` runs."""
    return any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body)


def modules() -> list[str]:
    """Importable names of the library's modules, without commands and the reader of PyTorch files."""
    return [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path, tree in SOURCES.items()
        if not is_command(tree) and path.name not in ("__main__.py", "torch_files.py")
    ]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_file_imports_only_what_its_rank_may_know(path):
    here = unit(path)
    assert here in KNOWS, f"{here} has no rank: give it a place in KNOWS"
    allowed = KNOWS[here] | {here, "errors"}
    for name in imported(path, SOURCES[path]):
        root, *rest = name.split(".")
        assert root not in ("configs", "train", "sample", "convert_torch"), f"{path} imports the script {name}"
        if root == "lavie_jax" and rest:
            assert rest[0] in allowed, f"{path} imports {name}; {here} may know {sorted(allowed)}"


@pytest.mark.parametrize("path", [p for p in SOURCES if unit(p) == "models"], ids=str)
def test_models_need_jax_flax_and_einops_only(path):
    roots = {name.split(".")[0] for name in imported(path, SOURCES[path])}
    assert roots <= MODEL_LIBRARIES | {"lavie_jax"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", [p for p, tree in SOURCES.items() if not is_command(tree)], ids=str)
def test_library_code_does_not_print(path):
    if path.name == "__main__.py":
        return
    calls = [node for node in ast.walk(SOURCES[path]) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if ast.unparse(call.func) == "print"]
    assert not lines, f"{path} prints in lines {lines}: use absl's logging"


def test_sampling_and_training_import_without_the_packages_they_may_not_need():
    """One process in which importing any of ON_DEMAND fails imports every library module and sample.py."""
    program = f"""
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ON_DEMAND!r}:
            raise ImportError(name + " is imported although nothing asked for it")

sys.meta_path.insert(0, Refuse())
for module in {[*modules(), "sample"]!r}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
