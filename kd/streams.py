"""The streams of randomness: all that is drawn at random, named by (seed, epoch, purpose)."""

import numpy as np

# Never by a sum of them: an epoch can be replayed alone, and seed 0's epoch 1 is not seed 1's epoch 0.
INIT, ORDER, VIEW, DROPOUT, DIRECTION = range(5)


def random_stream(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    """The generator of one purpose in one epoch of a seed."""
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, purpose)))
