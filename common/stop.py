"""SIGTERM and Ctrl-C: finish the step, save, leave with the code of the signal."""

import signal

import jax
from jax.experimental import multihost_utils


class Stop:
    """Listens for signals from its creation on.

    Outside of training a signal ends the program at once, since all that matters is
    saved. Within (`with stop.after_step():`) it is only noted, until the loop asks.
    With several processes JAX itself listens, and all agree on the step.
    """

    def __init__(self):
        self._signal = 0
        self._waiting = False
        self._alone = jax.process_count() == 1
        signal.signal(signal.SIGINT, self._heard)
        if self._alone:
            signal.signal(signal.SIGTERM, self._heard)

    def _heard(self, number, frame):
        if self._waiting and not self._signal:
            self._signal = number
        else:
            raise SystemExit(128 + number)

    def after_step(self):
        """Context in which signals wait for `requested`."""
        return _Waiting(self)

    def requested(self, step: int) -> int:
        """128 + the signal if the program should save and leave now, else 0."""
        if self._signal:
            return 128 + self._signal
        if not self._alone and multihost_utils.reached_preemption_sync_point(step):
            return 128 + signal.SIGTERM
        return 0


class _Waiting:
    def __init__(self, stop: Stop):
        self.stop = stop

    def __enter__(self):
        self.stop._waiting = True

    def __exit__(self, *error):
        self.stop._waiting = False
