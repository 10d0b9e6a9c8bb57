"""Reproduce golden cases: outputs of the original PyTorch models, to be matched number by number.

    python -m lavie_jax.parity DIR [--case GLOB]

DIR holds pairs CASE.json and CASE.npz (`cases.py` tells their format). One line is printed for each case:
name, relative error, bound, seconds, and ok or FAIL with the reason. The exit code is 1 after any FAIL, and 2
when no case matches or a file is malformed. Computed in float32 with full-precision matrix products. The
full-size UNets need about 10 GB of memory; cases run one after the other.
"""
