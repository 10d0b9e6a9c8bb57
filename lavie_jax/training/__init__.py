"""What `train.py` is made of: options, optimizer, step, EMA, checkpoints, metrics."""
