"""Reads batches from a config, for tests of the data pipeline."""

import contextlib

from lavie_jax.data import pipeline


def take(count, config, tokenizer=None, batch_size=4, **where):
    """Returns the first `count` batches; `where` are arguments of `pipeline.batches`, such as its first step."""
    examples = pipeline.open_examples(config, batch_size=batch_size)
    with contextlib.closing(pipeline.batches(examples, tokenizer, **where)) as stream:
        return [next(stream) for _ in range(count)]
