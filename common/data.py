"""Which rows belong to which step; a pure function, so nothing has to be saved."""

import numpy as np


def indices(step: int, n_rows: int, batch_size: int, seed: int) -> np.ndarray:
    """The rows of one step: epochs without replacement, each in its own order.

    Args:
      step: 0, 1, ...
      n_rows: rows in the data set.
      batch_size: rows per step; may exceed an epoch.
      seed: of the order.

    Returns:
      int64 [batch_size].
    """
    first = step * batch_size
    wanted = np.arange(first, first + batch_size)
    epochs, places = wanted // n_rows, wanted % n_rows
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng((seed, int(epoch))).permutation(n_rows)
        rows[epochs == epoch] = order[places[epochs == epoch]]
    return rows
