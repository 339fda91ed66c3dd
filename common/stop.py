"""SIGTERM and Ctrl-C: finish the step, save, leave with the code of the signal."""

import os
import signal

import jax

from common import pod


class Stop:
    """Listens for signals from its creation on.

    Within training (`with stop.after_step():`) a signal is noted until the loop asks.
    Outside it ends the program at once, since all that matters is saved.

    With several processes a signal to one is meant for all, and none may leave alone:
    the others would wait for it. So it is noted outside of training too, and every call
    of `requested` exchanges what was heard; all processes hear of it at the same call,
    one after it was sent. A second signal ends its process at once.

    JAX has a service for this, but it counts steps over the whole job, and Orbax feeds
    the same counter with the step numbers of checkpoints, which begin anew in each run.
    """

    def __init__(self):
        self._signal = 0
        self._waiting = False
        self._alone = jax.process_count() == 1
        self._heard_by_any = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._heard)

    def _heard(self, number, frame):
        if not self._signal and (self._waiting or not self._alone):
            self._signal = number
        elif self._alone:
            raise SystemExit(128 + number)
        else:
            os._exit(128 + number)  # An exit in order would wait for the others.

    def after_step(self):
        """Context in which signals wait for `requested`."""
        return _Waiting(self)

    def at_rest(self):
        """Context within `after_step` in which all that matters is saved again."""
        return _Waiting(self, False)

    def requested(self) -> int:
        """128 + the signal if the program should save and leave now, else 0.

        Asked after every step and every run, by all processes equally often.
        """
        number = self._signal
        if not self._alone:
            # The answer of the call before has come by now: nobody waits for the network.
            asked, self._heard_by_any = self._heard_by_any, pod.largest(number)
            number = 0 if asked is None else int(asked)
        return 128 + number if number else 0


class _Waiting:
    def __init__(self, stop: Stop, waiting: bool = True):
        self.stop, self.waiting = stop, waiting

    def __enter__(self):
        self.before, self.stop._waiting = self.stop._waiting, self.waiting

    def __exit__(self, *error):
        self.stop._waiting = self.before
