"""The parts of `train.py`: options, optimizer, step, EMA, checkpoints, metrics."""
