"""Languages as tables: hidden Markov models, and n-grams without their dense transitions.

    HMM(pi [S], A [S, S], B [S, V])           s_0 ~ pi, x_i ~ B[s_i], s_{i+1} ~ A[s_i]
    NGram(start [V] * (n-1), table [V] * n)   s_i: the last n - 1 tokens, x_i the newest,
                                              s_{i+1} = s_i[1:] + (v,) with table[s_i, v]

(Section 6 of the specification of arXiv:2502.09622.) A window of an n-gram starts with a whole
context, of which only the newest token is part of the text. Tables are built and checked on the
host in float64 and used on the device. States of an n-gram are numbered with the newest token
fastest, so both kinds are vectors of S to all that use `start`, `emission`, `forward`,
`backward` and `marginal`, which are all that messages need.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.sparse import csgraph

from common.errors import UserError, reject

PRECISE = jax.lax.Precision.HIGHEST
TOLERANCE = 1e-6
DENSE = 4096  # States of which `dense` makes a matrix.


class HMM(NamedTuple):
    """Start law, transitions, emissions; rows sum to 1."""

    pi: Any
    A: Any
    B: Any


class NGram(NamedTuple):
    """Law of the first context, and of the next token given each context."""

    start: Any
    table: Any


Language = HMM | NGram


def vocab(language: Language) -> int:
    """V."""
    last = language.B if isinstance(language, HMM) else language.table
    return last.shape[-1]


def states(language: Language) -> int:
    """S; of an n-gram V^(n-1)."""
    return language.pi.size if isinstance(language, HMM) else language.start.size


def on_device(language: Language, dtype: Any = jnp.float32) -> Language:
    """The tables as arrays of JAX, rows made to sum to 1 in float64 before they are rounded."""

    def put(table):
        wide = np.asarray(table, np.float64)
        # A start law sums to 1 as a whole.
        axis = -1 if table is not language[0] else None
        return jnp.asarray(wide / wide.sum(axis=axis, keepdims=True), dtype)

    return type(language)(*(put(table) for table in language))


def start(language: Language) -> Float[Array, " states"]:
    """The law of the first state."""
    return language[0].reshape(-1)


def emission(language: Language, x: Int[Array, " batch"]) -> Float[Array, "batch states"]:
    """B[s, x_b]; tokens must be below V."""
    if isinstance(language, HMM):
        return language.B.T[x]
    v, dtype = vocab(language), language.table.dtype
    newest = jnp.arange(states(language)) % v
    return (newest == x[:, None]).astype(dtype)


def forward(
    language: Language, message: Float[Array, "batch states"]
) -> Float[Array, "batch states"]:
    """sum_s m(s) A[s, s']."""
    if isinstance(language, HMM):
        return jnp.matmul(message, language.A, precision=PRECISE)
    table = language.table
    v = table.shape[-1]
    m = message.reshape(len(message), v, -1)  # The oldest token, the others.
    p = table.reshape(v, -1, v)
    return jnp.einsum("bok,okv->bkv", m, p, precision=PRECISE).reshape(message.shape)


def backward(
    language: Language, message: Float[Array, "batch states"]
) -> Float[Array, "batch states"]:
    """sum_s' A[s, s'] m(s')."""
    if isinstance(language, HMM):
        return jnp.matmul(message, language.A.T, precision=PRECISE)
    table = language.table
    v = table.shape[-1]
    m = message.reshape(len(message), -1, v)  # All but the newest, the newest.
    p = table.reshape(v, -1, v)
    return jnp.einsum("bkv,okv->bok", m, p, precision=PRECISE).reshape(message.shape)


def marginal(
    language: Language, message: Float[Array, "batch states"]
) -> Float[Array, "batch vocab"]:
    """sum_s m(s) B[s, v]."""
    if isinstance(language, HMM):
        return jnp.matmul(message, language.B, precision=PRECISE)
    return message.reshape(len(message), -1, vocab(language)).sum(axis=1)


def dense(language: Language) -> HMM:
    """An n-gram as an HMM, float64 on the host.

    Raises:
      UserError: it has too many states.
    """
    if isinstance(language, HMM):
        return language
    count, v = states(language), vocab(language)
    if count > DENSE:
        raise UserError(f"An n-gram of {count} states is too large for a dense matrix.")
    a = np.zeros((count, count))
    table = np.asarray(language.table, np.float64).reshape(count, v)
    for s in range(count):
        a[s, s * v % count : s * v % count + v] = table[s]
    return HMM(
        np.asarray(language.start, np.float64).reshape(-1),
        a,
        np.tile(np.eye(v), (count // v, 1)),
    )


def check(language: Language, field: str = "language") -> Language:
    """The language, if its tables are laws.

    Raises:
      UserError: a table has another shape, or rows that are no probabilities.
    """
    if isinstance(language, HMM):
        s = np.size(language.pi)
        v = np.shape(language.B)[-1] if np.ndim(language.B) else 0
        shapes = {"pi": (s,), "A": (s, s), "B": (s, v)}
        if not s or not v:
            raise UserError(f"{field} must have pi [S], A [S, S], B [S, V], S and V from 1 up.")
    else:
        n, v = np.ndim(language.table), np.shape(language.table)[-1]
        if n < 2:
            raise UserError(f"{field}.table must have n axes of V tokens, n from 2 up.")
        shapes = {"start": (v,) * (n - 1), "table": (v,) * n}
    for name, shape in shapes.items():
        table = np.asarray(getattr(language, name))
        if table.shape != shape:
            raise UserError(
                f"{field}.{name} has the shape {table.shape}, but must have {shape}."
            )
        if not np.issubdtype(table.dtype, np.number) or np.iscomplexobj(table):
            raise UserError(f"{field}.{name} must hold real numbers.")
        if not np.isfinite(table).all():
            raise UserError(f"{field}.{name} has a value that is not finite.")
        if (table < 0).any():
            raise UserError(f"{field}.{name} has the negative value {table.min():g}.")
        rows = table.sum() if name in ("pi", "start") else table.sum(axis=-1).reshape(-1)
        off = np.abs(np.atleast_1d(rows) - 1)
        if off.max() > TOLERANCE:
            which = "" if off.size == 1 else f" row {int(off.argmax())}"
            total = np.atleast_1d(rows)[off.argmax()]
            raise UserError(f"{field}.{name}{which} sums to {total:.9g}, but must to 1.")
    return language


def load(path: str | Path) -> HMM:
    """The language of an `.npz` with pi, A and B, float64, checked.

    Raises:
      UserError: the file cannot be read, lacks a table, or a table is no law.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in HMM._fields if name not in file.files]
            if missing:
                raise UserError(f"{path} lacks {missing[0]}; a language has pi, A and B.")
            tables = [np.asarray(file[name]) for name in HMM._fields]
    except UserError:
        raise
    except FileNotFoundError as error:
        raise reject("language.path", str(path), "an .npz file with pi, A and B") from error
    except Exception as error:  # NumPy raises several kinds for what is no .npz.
        raise UserError(f"{path} is damaged or no .npz file of numbers.") from error
    for name, table in zip(HMM._fields, tables, strict=True):
        if not np.issubdtype(table.dtype, np.number) or np.iscomplexobj(table):
            raise UserError(f"{path}: {name} must hold real numbers.")
    return check(HMM(*(np.asarray(table, np.float64) for table in tables)), str(path))


def save(path: str | Path, language: HMM) -> None:
    """Writes such a file."""
    np.savez(path, **{k: np.asarray(v, np.float64) for k, v in language._asdict().items()})


class Classes(NamedTuple):
    """How states hang together.

    Attributes:
      count: strongly connected classes of the transition graph.
      label: the class of each state.
      closed: bool [count], those that are never left.
      period: of each class; 0 for a single state without a loop.
    """

    count: int
    label: np.ndarray
    closed: np.ndarray
    period: np.ndarray


def classes(a: Float[np.ndarray, "s s"]) -> Classes:
    """The communicating classes of a transition matrix and their periods."""
    graph = np.asarray(a) > 0
    count, label = csgraph.connected_components(graph, connection="strong")
    leaves = graph & (label[:, None] != label[None, :])
    closed = np.array([not leaves[label == c].any() for c in range(count)])
    period = np.array([_period(graph, np.flatnonzero(label == c)) for c in range(count)])
    return Classes(count, label, closed, period)


def _period(graph: np.ndarray, members: np.ndarray) -> int:
    """The greatest common divisor of all loops: of level(s) + 1 - level(t) over all edges."""
    inside = graph[np.ix_(members, members)]
    level = csgraph.shortest_path(inside, unweighted=True, indices=0)
    s, t = np.nonzero(inside)
    return int(np.gcd.reduce((level[s] + 1 - level[t]).astype(int))) if len(s) else 0


def stationary(a: Float[np.ndarray, "s s"], field: str = "language") -> Float[np.ndarray, " s"]:
    """The law that transitions keep, float64.

    Raises:
      UserError: there is none to which every start comes: the chain is reducible or periodic;
        with its classes.
    """
    found = classes(a)
    if found.closed.sum() != 1 or found.period[found.closed][0] != 1:
        sizes = np.bincount(found.label, minlength=found.count)
        parts = ", ".join(
            f"{size} state{'s' if size > 1 else ''} ({'closed' if c else 'left'}, period {p})"
            for size, c, p in list(zip(sizes, found.closed, found.period, strict=True))[:8]
        )
        raise UserError(
            f"{field} has no stationary start: its states fall into {found.count} "
            f"class{'es' if found.count > 1 else ''}: {parts}."
        )
    count = len(a)
    system = np.concatenate([np.asarray(a, np.float64).T - np.eye(count), np.ones((1, count))])
    right = np.concatenate([np.zeros(count), [1.0]])
    law = np.maximum(np.linalg.lstsq(system, right, rcond=None)[0], 0)
    return law / law.sum()
