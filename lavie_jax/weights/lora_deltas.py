"""The change of one weight by an adapter, in numpy and float32: LoRA, LoCon, LoHa, LoKr, and DoRA around any of them.

    LoRA    (alpha / r) up . down                          arXiv 2106.09685
    LoCon   the same for convolutions, with or without a factor `mid` (LyCORIS, arXiv 2309.14859)
    LoHa    (alpha / r) (w1_a . w1_b) * (w2_a . w2_b)      element by element (arXiv 2108.06098)
    LoKr    scale * kron(w1, w2)                           (LyCORIS, arXiv 2309.14859)
    DoRA    m (W + delta) / |W + delta|                    arXiv 2402.09353

All weights here are in PyTorch's order of axes: (outputs, inputs) or (outputs, inputs, height, width).
"""

import dataclasses
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np

from lavie_jax.errors import UserError
from lavie_jax.weights.safetensors_io import Tensor

EPSILON = np.finfo(np.float32).eps  # that LyCORIS adds to the norm of DoRA
ALWAYS_OPTIONAL = {"alpha", "magnitude", "dora_scale"}  # of PEFT's and LyCORIS' DoRA
ALGORITHMS = {  # algorithm: (required roles, optional roles)
    "LoRA": ({"down", "up"}, {"mid"}),
    "LoHa": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"}),
    "LoKr": (set(), {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleDelta:
    """The tensors of one module of an adapter, unread.

    Attributes:
        file: the file, for messages.
        keys: {role: the key in the file}, for messages.
        tensors: {role: tensor}; see `lora_keys.ROLES`.
        alpha: from the adapter's configuration, if it is not among the tensors; None is the rank.
        rank_stabilized: whether the scale is alpha / sqrt(r) (arXiv 2312.03732).
    """

    file: Path | None
    keys: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    alpha: float | None = None
    rank_stabilized: bool = False

    @property
    def algorithm(self) -> str:
        """The entry of `ALGORITHMS` that the tensors belong to."""
        roles = set(self.tensors)
        return next((name for name, sets in ALGORITHMS.items() if roles & set().union(*sets)), "LoRA")

    def check(self) -> None:
        """Raises UserError, naming a key, if a tensor has no counterpart or an impossible shape."""
        required, optional = ALGORITHMS[self.algorithm]
        roles = set(self.tensors) - ALWAYS_OPTIONAL
        first = next(iter(self.keys.values()))
        if extra := roles - required - optional:
            raise self._wrong(f"{first} and {self.keys[min(extra)]} belong to different algorithms.")
        if self.algorithm == "LoKr":
            for name in ("lokr_w1", "lokr_w2"):
                required = required | ({name} if name in roles else {f"{name}_a", f"{name}_b"})
        if self.algorithm == "LoHa" and roles & {"hada_t1", "hada_t2"}:
            required = required | {"hada_t1", "hada_t2"}
        if missing := required - roles:
            raise self._wrong(f"{first} has no counterpart: the tensor {min(missing)} of its module is missing.")
        for role, tensor in self.tensors.items():
            if tensor.dtype.kind in ("iub" if role != "alpha" else "b"):  # kohya stores a whole alpha as an integer
                raise self._wrong(f"{self.keys[role]} is {tensor.dtype.name}: quantized files are not supported.")
            if role == "alpha" and prod(tensor.shape) != 1:
                raise self._wrong(f"{self.keys[role]} must be one number, not of shape {list(tensor.shape)}.")
            if role != "alpha" and (not tensor.shape or 0 in tensor.shape):
                raise self._wrong(f"{self.keys[role]} has the shape {list(tensor.shape)}: its rank is 0.")
        if self.algorithm == "LoRA":
            rank = self.tensors["mid" if "mid" in roles else "down"].shape[0]
            if self.tensors["up"].shape[1:2] != (rank,):
                raise self._wrong(f"{self.keys['down']} and {self.keys['up']} have different ranks.")

    def _wrong(self, problem: str) -> UserError:
        return UserError(f"{self.file}: {problem}")

    def read(self, role: str) -> np.ndarray:
        """Returns a tensor in float32."""
        return np.asarray(self.tensors[role].read()).astype(np.float32)

    def scale(self, rank: int) -> np.float32:
        """Returns alpha / r, or 1 where alpha is absent or 0."""
        alpha = float(self.read("alpha").reshape(())) if "alpha" in self.tensors else self.alpha
        if not alpha:
            return np.float32(1)
        return np.float32(alpha / (rank**0.5 if self.rank_stabilized else rank))

    def matrix_shape(self) -> tuple[int, int]:
        """Returns the shape of the weight that this changes, as a matrix: outputs, and inputs times a kernel's area."""
        shapes = {role: t.shape for role, t in self.tensors.items()}
        if self.algorithm == "LoRA":
            return shapes["up"][0], prod(shapes["down"][1:]) * prod(shapes.get("mid", ())[2:])
        if self.algorithm == "LoHa":
            a, b, core = (shapes.get(f"hada_{role}", ()) for role in ("w1_a", "w1_b", "t1"))
            return a[-1] if core else a[0], prod(b[1:]) * prod(core[2:])
        rows, columns = 1, 1
        for name in ("lokr_w1", "lokr_w2"):
            rows *= shapes.get(name, shapes.get(f"{name}_a"))[0]
            columns *= prod(shapes.get(name, shapes.get(f"{name}_b"))[1:])
        return rows, columns

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether this changes weights of `shape`."""
        return self.matrix_shape() == (shape[0], prod(shape[1:]))

    def delta(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns alpha / r times the product of the factors, in the shape of the weight. Raises UserError."""
        try:
            product = {"LoRA": self._lora, "LoHa": self._loha, "LoKr": self._lokr}[self.algorithm]()
            return product.reshape(shape)
        except UserError:
            raise
        except (ValueError, IndexError) as error:
            shapes = ", ".join(f"{self.keys[role]} {list(t.shape)}" for role, t in self.tensors.items())
            raise UserError(f"{self.file}: {shapes} do not make a weight of shape {list(shape)}.") from error

    def _lora(self) -> np.ndarray:
        down, up = self.read("down"), self.read("up")
        rank = down.shape[0]
        if "mid" in self.tensors:
            product = np.einsum("oi,ijhw,jc->ochw", _flat(up), self.read("mid"), _flat(down), optimize=True)
        else:
            product = _flat(up) @ _flat(down)
        return self.scale(rank) * product

    def _loha(self) -> np.ndarray:
        factors = []
        for n in (1, 2):
            a, b = self.read(f"hada_w{n}_a"), self.read(f"hada_w{n}_b")
            if f"hada_t{n}" in self.tensors:
                core = self.read(f"hada_t{n}")
                factors.append(np.einsum("ij...,jc,io->oc...", core, b, a, optimize=True))
            else:
                factors.append(a @ b)
        return self.scale(self.tensors["hada_w1_b"].shape[0]) * factors[0] * factors[1]

    def _lokr(self) -> np.ndarray:
        factors, scale = {}, np.float32(1)
        for n in (1, 2):
            if f"lokr_w{n}" in self.tensors:
                factors[n] = self.read(f"lokr_w{n}")
            else:
                a, b = self.read(f"lokr_w{n}_a"), self.read(f"lokr_w{n}_b")
                scale = self.scale(b.shape[0])  # that of w2 if both are factored
                factors[n] = a @ b.reshape(b.shape[0], -1)
        w1, w2 = factors[1], factors[2]
        return scale * np.kron(w1.reshape(w1.shape + (1,) * (w2.ndim - w1.ndim)), w2)

    def merged(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """Returns W + s (W' - W) in float32, for a float32 weight W. Raises UserError for shapes that do not fit."""
        changed = self.delta(weight.shape)
        if role := next((role for role in ("magnitude", "dora_scale") if role in self.tensors), None):
            changed = self._normalized(weight + changed, role) - weight
        return weight + np.float32(strength) * changed

    def _normalized(self, value: np.ndarray, role: str) -> np.ndarray:
        """Returns m V / |V|: norms per output, or per input for LyCORIS' m of shape (1, inputs, ...)."""
        m = self.read(role)
        per_input = role == "dora_scale" and m.ndim > 1 and m.shape[0] == 1 and value.shape[0] != 1
        axis = 1 if per_input else 0
        if m.size != value.shape[axis]:
            raise self._wrong(f"{self.keys[role]} has {m.size} numbers, not {value.shape[axis]}.")
        others = tuple(i for i in range(value.ndim) if i != axis)
        norm = np.sqrt(np.square(value).sum(axis=others, keepdims=True)) + EPSILON
        return m.reshape(norm.shape) * (value / norm)


def _flat(array: np.ndarray) -> np.ndarray:
    """A factor as a matrix: linear layers, and convolutions of any size."""
    return array.reshape(array.shape[0], -1)
