"""Does it fit, and what bounds its speed: the real programs, compiled for TPUs that are not there.

    python -m lavie_jax.planner --config configs/base.py --topology v5e:4x4 --per-chip-batch 1 --json docs/planner.json
    python -m lavie_jax.planner --config configs/vsr.py --topology v5e:1x1 --sample vsr
    python -m lavie_jax.planner --tables docs/planner.json    # docs/planner.md and docs/memory.md, from the rows

    chips.py                     topologies, and what a chip can do
    programs.py                  a jitted function and its arguments, as shapes
    training.py, sampling.py     the programs of train.py and of cascade/
    measure.py, plan.py          a program -> a row: bytes, operations, collectives; memory before there is any code
    apart.py                     the same in a process of its own, which can be ended
    operations.py, hlo.py        counted before and after the compiler
    roofline.py                  a row -> what bounds the step's time
    report.py, tables.py         rows -> JSON and lines; the tables in docs/
    search.py                    how many clips a chip takes

Compiling needs libtpu (`pip install -e '.[tpu]'`) and no TPU. Bytes are the compiler's own plan and hold on the chip;
times are estimates.
"""
