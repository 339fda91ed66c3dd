"""A toy: noisy least squares, for tests of the house."""

from configs.base import at_size, base


def get_config(size: str = "small"):
    config = base("tests.toy")
    config.steps = 30
    config.log_every = 3
    config.save_every = 10
    config.toy = dict(width=4, n_walkers=16, batch=8, nan_below=-1.0, pair=(1, 2), name="a")
    sizes = dict(
        test=dict(steps=6), small=dict(), many=dict(runs=dict(a={}, b=dict(toy=dict(batch=16))))
    )
    return at_size(config, size, sizes)
