"""Live progress on a terminal; plain lines where there is none."""

import sys
import time

import jax
from tqdm import tqdm

EVERY = 10.0  # Seconds between plain lines.


class Progress:
    """Step, rate, time left and the figures that matter, from the first process.

    Args:
      name: the run's.
      start: steps done before.
      steps: steps in all.
    """

    def __init__(self, name: str, start: int, steps: int):
        self.quiet = jax.process_index() != 0
        self.name, self.steps, self.done = name, steps, start
        self.figures = ""
        self._last = (time.monotonic(), start)
        self._rate = 0.0
        self._bar = None
        if not self.quiet and sys.stderr.isatty():
            self._bar = tqdm(
                total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True
            )
        elif not self.quiet:
            self._say(f"{name}: step {start}/{steps}, compiling")

    def step(self, done: int) -> None:
        """One more step was dispatched."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        self.done = done

    def show(self, figures: str) -> None:
        """The newest figures, from a row of metrics."""
        self.figures = figures
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
        elif not self.quiet:
            self._line()

    def _line(self, force: bool = False) -> None:
        then, before = self._last
        now = time.monotonic()
        if now - then < EVERY and not force:
            return
        if self.done > before:
            self._rate = (self.done - before) / max(now - then, 1e-9)
        left = (self.steps - self.done) / self._rate if self._rate else float("nan")
        eta = f"{int(left) // 60}:{int(left) % 60:02d}" if left == left else "?"
        self._last = (now, self.done)
        self._say(
            f"{self.name}: step {self.done}/{self.steps}  {self._rate:.3g} steps/s"
            f"  ETA {eta}  {self.figures}"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif not self.quiet:
            self._line(force=True)

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
