"""Reproduces golden cases: stored outputs of the original PyTorch models.

    python -m lavie_jax.parity DIR [--case GLOB]

DIR has pairs of CASE.json and CASE.npz (see `cases.py` for the format). The command prints one line per case: name,
relative error, bound, seconds, and ok or FAIL with the reason. The exit code is 1 after any FAIL, and 2 when no case
matches or a file is malformed. Cases run one at a time, in float32 with full-precision matrix products. The full-size
UNets need about 10 GB of memory.
"""
