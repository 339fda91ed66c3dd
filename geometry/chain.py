"""Chains of bridges through the frames of a trajectory: section 3.

Frames R^0, ..., R^K. Segment i is a bridge from R^i to R^{i+1} on its own clock [0, T], with
D(R_t, t, i/K; condition_i) the mean of R^{i+1}. If the condition makes the frames a Markov
chain, generated frames have exactly the frames' joint law. Noise of each segment:

    sigma_i^2 T = kappa m_i ,    m_i the mean square displacement per coordinate of segment i

Conditions, the known states of `network.Inputs`, the start of the segment always first:

    segment            R^i
    segment+initial    R^i, R^0
    history            R^i, R^{i-1}, ..., R^{i-k+1}, those before R^0 being R^0
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from common.errors import reject
from geometry.data.align import kabsch
from geometry.graphs import Graph
from geometry.matching import LAST, denoised, times
from geometry.network import Network
from geometry.reference import Reference, scaled
from geometry.samplers import Sampler, Table, run, table

CONDITIONS = ("segment", "segment+initial", "history")
SAME = 1e-6  # angstrom rms; frames nearer than this are one.


class Chain(NamedTuple):
    """What a chain is, beyond its network.

    Attributes:
      reference: of unit noise, `reference.brownian(1.0, T)` or another.
      squares: m_i, angstrom^2, [K].
      factors: what the reference's variances are multiplied by in each segment, [K].
      condition: one of `CONDITIONS`.
      history: k of "history"; else 1.
    """

    reference: Reference
    squares: Float[np.ndarray, " segments"]
    factors: Float[np.ndarray, " segments"]
    condition: str
    history: int


def chain(
    reference: Reference,
    squares: Float[np.ndarray, " segments"],
    condition: str = "segment+initial",
    history: int = 2,
    kappa: float = 1.0,
) -> Chain:
    """A chain whose noise is kappa times the mean square of each segment's displacements.

    Args:
      reference: the process whose noise is scaled, segment by segment, so that v(0,T) is
        kappa m_i; for the Brownian bridge this is sigma_i^2 T = kappa m_i.
      squares: m_i, of `mean_squares`.
      condition: see the module; "history-3" is "history" with k = 3.
      history: k of "history"; the others do not read it.
      kappa: above 0.

    Raises:
      UserError: an unknown condition, kappa not above 0, or a segment without displacement.
    """
    if not 0 < kappa < np.inf:
        raise reject("chain.kappa", kappa, "a finite number above 0")
    squares = np.asarray(squares, np.float64)
    if not len(squares) or not (squares > 0).all():
        raise reject("chain.frames", len(squares), "segments in all of which atoms move")
    kind, dash, count = condition.partition("-")
    if kind not in CONDITIONS or (dash and not (kind == "history" and count.isdigit())):
        allowed = f"one of {', '.join(CONDITIONS)}, or history-k with a number for k"
        raise reject("chain.condition", condition, allowed)
    known = int(count or history) if kind == "history" else 1
    if known < 1:
        raise reject("chain.history", known, "a whole number from 1 up")
    factors = kappa * squares / float(reference.v(0.0, reference.end))
    return Chain(reference, squares, factors, kind, known)


def resample(
    frames: Float[np.ndarray, "frames atoms 3"], segments: int, rotate: bool = True
) -> Float[np.ndarray, "{segments}+1 atoms 3"] | None:
    """A path at K + 1 points of equal mass-free length sum rms(R^{j+1} - R^j).

    Steps of an optimiser are very uneven. The first and the last frame are kept exactly, the
    last one as rotated.

    Args:
      frames: of one structure, angstrom, periodic ones unwrapped.
      segments: K.
      rotate: every frame onto its predecessor; of molecules only.

    Returns:
      The frames in their dtype; None, with a warning, where there are fewer than two
      different ones: then there is a single bridge to learn.

    Raises:
      UserError: no segment.
    """
    if segments < 1:
        raise reject("chain.segments", segments, "a whole number from 1 up")
    path = list(frames[:1])
    for frame in frames[1:]:
        path.append(kabsch(frame, path[-1]) if rotate else frame)
    path = np.asarray(path).reshape(frames.shape)
    steps = np.sqrt(((path[1:] - path[:-1]) ** 2).sum(-1).mean(-1))
    if len(path) < 2 or steps.max() < SAME:
        warnings.warn(
            f"A trajectory of {len(path)} frames does not move: it is a single bridge.",
            stacklevel=2,
        )
        return None
    # Repeated frames take no length; interpolation needs lengths that rise.
    kept = np.r_[0, 1 + np.flatnonzero(steps > 0)]
    length = np.r_[0.0, np.cumsum(steps)][kept]
    at = np.linspace(0, length[-1], segments + 1)
    after = np.clip(np.searchsorted(length, at, side="right"), 1, len(kept) - 1)
    part = ((at - length[after - 1]) / (length[after] - length[after - 1]))[:, None, None]
    new = (1 - part) * path[kept[after - 1]] + part * path[kept[after]]
    new[0], new[-1] = path[0], path[-1]
    return new.astype(frames.dtype)


def mean_squares(
    paths: Iterable[tuple[Float[np.ndarray, "frames atoms 3"], Shaped[np.ndarray, " atoms"]]],
) -> Float[np.ndarray, " segments"]:
    """m_i of a training set: pairs of frames and of what of the atoms may move (0 or 1)."""
    square, count = 0.0, 0.0
    for frames, free in paths:
        moved = np.diff(np.asarray(frames, np.float64), axis=0) ** 2
        square = square + (moved.sum(-1) * free).sum(-1)
        count += 3 * np.asarray(free, np.float64).sum()
    return np.asarray(square / max(count, 1.0))


def of_segment(chain: Chain, i: Any) -> tuple[Reference, Array]:
    """The reference and s^2 of segment i; an array of them gives arrays of noise."""
    factor, square = (
        jnp.asarray(values, jnp.result_type(float))[i]
        for values in (chain.factors, chain.squares)
    )
    return scaled(chain.reference, factor), square


def draw(
    key: jax.Array,
    real: Shaped[Array, "*batch"],
    segments: int,
    end: float = 1.0,
    last: float = LAST,
) -> tuple[Int[Array, "*batch"], Float[Array, "*batch"]]:
    """i ~ U{0 .. K-1} and t ~ U(0, T) of each structure, stratified together.

    Args:
      key: of the step.
      real, end, last: as of `matching.times`.

    Returns:
      i, int32, and t, float32, in [0, last T].
    """
    whole = times(key, real, float(segments), last=1.0)
    i = jnp.clip(whole.astype(jnp.int32), 0, segments - 1)
    return i, last * end * jnp.clip(whole - i, 0.0, 1.0)


def condition(
    chain: Chain,
    graph: Graph,
    frames: Float[Array, "frames atoms 3"],
    i: Int[Array, " graphs"],
) -> tuple[Float[Array, "known atoms 3"], Float[Array, "atoms 3"]]:
    """The known states and R^{i+1} of each structure's segment i, out of its frames."""
    i = i[graph.owner]
    atoms = jnp.arange(frames.shape[1])
    back = jnp.maximum(i - jnp.arange(chain.history)[:, None], 0)
    known = frames[back, atoms]
    if chain.condition == "segment+initial":
        known = jnp.concatenate([known, frames[:1]])
    return known, frames[i + 1, atoms]


def denoiser(network: Network, chain: Chain, params: Any, graph: Graph) -> Callable:
    """D of a network: (x, known, t scalar, i int32) -> [atoms, 3], for `sample`."""

    def denoise(x, known, t, i):
        own, s2 = of_segment(chain, i)
        part = i / len(chain.squares)
        return denoised(network, own, s2, params, graph, x, known, t, part)

    return denoise


def tables(chain: Chain, sampler: Sampler) -> Table:
    """The sampler's table for every segment, on a leading axis."""
    rows = [table(scaled(chain.reference, factor), sampler) for factor in chain.factors]
    return jax.tree.map(lambda *parts: np.stack(parts), *rows)


def sample(
    denoise: Callable,
    chain: Chain,
    tables: Table,
    start: Float[Array, "*shape"],
    noise: Callable | None = None,
    keep: Callable = lambda x: x,
    path: bool = False,
):
    """Generates R^1 ... R^K: a scan over segments of the scan over steps.

    Args:
      denoise: (x, known [k, *shape], t scalar, i int32) -> D.
      tables: of `tables`.
      start: R^0.
      noise, keep: as of `samplers.run`; k counts the calls of all segments.
      path: the states at every point of the grids, too.

    Returns:
      Frames [K + 1, *shape]; with `path` the pair of them and [K, points + 1, *shape], of
      which each segment begins with the last state of the one before.
    """
    segments, calls = tables.time.shape
    first = jnp.broadcast_to(start, (chain.history, *start.shape))

    def segment(history, row):
        i, rows = row
        known = history
        if chain.condition == "segment+initial":
            known = jnp.concatenate([history, start[None]])
        x = run(
            lambda x, t: denoise(x, known, t, i),
            rows,
            history[0],
            None if noise is None else lambda k: noise(i * calls + k),
            keep,
            path,
        )
        x, states = x if path else (x, None)
        return jnp.concatenate([x[None], history[:-1]]), (x, states)

    count = jnp.arange(segments, dtype=jnp.int32)
    _, (frames, states) = jax.lax.scan(segment, first, (count, tables))
    frames = jnp.concatenate([start[None], frames])
    return (frames, states) if path else frames
