"""Languages as tables: hidden Markov models, and n-grams with their structure kept.

    q(x) = sum_s pi(s_0) B(s_0, x_0) prod_i A(s_{i-1}, s_i) B(s_i, x_i)

(section 6 of the specification of arXiv:2502.09622.) An n-gram is one whose state is its last
n - 1 tokens and whose emission is the newest of them. Its transition moves a context c to
(c[1:], v), so a message needs V^n products in the place of V^(2n-2): the oldest axis is
contracted. States of both are numbered 0 ... S - 1; of an n-gram the newest token is the
fastest axis.

What is exact about a language is written once, over a few functions of a message, weights
[B, S] over states. `check` and everything below `stationary` is float64 on the host; the others
are traced.
"""

from math import gcd
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import sparse
from scipy.sparse import csgraph

from common.errors import UserError, reject

TOLERANCE = 1e-6  # of the sum of a row
TURNS = 100_000  # of such iterations
DENSE = 4096  # states up to which a stationary law is solved for, not iterated to
NAMED = 8  # classes that a refusal describes


class HMM(NamedTuple):
    """Attributes:
    pi: [S], law of the state at the first token.
    A: [S, S], from a state to the next.
    B: [S, V], of a state's token.
    """

    pi: Any
    A: Any
    B: Any


class NGram(NamedTuple):
    """Attributes:
    start: [V] * (n - 1), law of the context that ends with the first token, oldest axis first.
    table: [V] * n, P(next token | context); n is at least 2.
    """

    start: Any
    table: Any


Language = HMM | NGram


def vocab(language: Language) -> int:
    """V; the mask is token V."""
    return language[-1].shape[-1]


def states(language: Language) -> int:
    """S."""
    return int(np.prod(language[0].shape))


def order(language: NGram) -> int:
    """n."""
    return language.table.ndim


def initial(language: Language) -> Float[Array | np.ndarray, " states"]:
    """Law of the state at the first token."""
    return language[0].reshape(-1)


def messages(batch: int, message: Float[Array, " states"]) -> Float[Array, "{batch} states"]:
    """One message for every text."""
    return jnp.broadcast_to(message, (batch, len(message)))


def emission(language: Language, x: Int[Array, " batch"]) -> Float[Array, "batch states"]:
    """Probability of a token in every state, 1 where it is masked (V)."""
    v = vocab(language)
    if isinstance(language, NGram):
        newest = jnp.eye(v + 1, v, dtype=language.table.dtype).at[v].set(1)
        return jnp.tile(newest[x], (1, states(language) // v))
    return jnp.concatenate([language.B.T, jnp.ones((1, states(language)), language.B.dtype)])[x]


def forward(
    language: Language, message: Float[Array, "batch states"]
) -> Float[Array, "batch states"]:
    """Weights one token later: m A."""
    if isinstance(language, NGram):
        rows, table = _split(language, message)
        moved = jnp.einsum("bor,orv->brv", rows, table, precision="highest")
        return moved.reshape(message.shape)
    return jnp.matmul(message, language.A, precision="highest")


def backward(
    language: Language, message: Float[Array, "batch states"]
) -> Float[Array, "batch states"]:
    """Weights one token earlier: A m."""
    if isinstance(language, NGram):
        _, table = _split(language, message)
        rows = message.reshape(len(message), *table.shape[1:])
        moved = jnp.einsum("orv,brv->bor", table, rows, precision="highest")
        return moved.reshape(message.shape)
    return jnp.matmul(message, language.A.T, precision="highest")


def symbols(
    language: Language, message: Float[Array, "batch states"]
) -> Float[Array, "batch vocab"]:
    """Weights of the tokens: m B."""
    if isinstance(language, NGram):
        return message.reshape(len(message), -1, vocab(language)).sum(axis=1)
    return jnp.matmul(message, language.B, precision="highest")


def normalised(message: Float[Array, "*batch states"]) -> Float[Array, "*batch states"]:
    """Weights with the sum 1; uniform where all are 0, that is, after an impossible token."""
    total = jnp.sum(message, axis=-1, keepdims=True)
    some = total > 0
    return jnp.where(some, message / jnp.where(some, total, 1), 1 / message.shape[-1])


def choices(language: Language) -> Float[Array, "states choices"]:
    """P(what is drawn next | state): of an HMM the next state, of an n-gram the next token."""
    return language[1].reshape(states(language), -1)


def follow(
    language: Language, state: Int[Array, " batch"], choice: Int[Array, " batch"]
) -> Int[Array, " batch"]:
    """The next state, of what was drawn by `choices`."""
    if isinstance(language, NGram):
        v = vocab(language)
        return state % (states(language) // v) * v + choice
    return choice


def support(language: Language) -> Language:
    """1 where a probability is above 0: its messages count paths, and are exact at 0."""
    return jax.tree.map(lambda p: (p > 0).astype(jnp.float32), language)


def on_device(language: Language, dtype: Any = jnp.float32) -> Language:
    """The checked language in a floating type.

    Raises:
      UserError: it is no language, or has a probability that the type would round to 0.
    """
    language = check(language)
    tiny = float(jnp.finfo(dtype).tiny)
    for name, table in language._asdict().items():
        lost = np.argwhere((table > 0) & (table < tiny))
        if len(lost):
            value, allowed = float(table[tuple(lost[0])]), f"0, or at least {tiny:.3g}"
            raise reject(_entry(name, lost[0]), value, allowed)
    return jax.tree.map(lambda table: jnp.asarray(table, dtype), language)


def check(language: Language) -> Language:
    """The language in float64 on the host, every row divided by its sum.

    Raises:
      UserError: shapes that do not fit, NaN, a negative entry, or a sum off by more than 1e-6.
    """
    tables = {name: _numbers(name, table) for name, table in language._asdict().items()}
    if isinstance(language, NGram):
        v, n = tables["table"].shape[-1:], tables["table"].ndim
        if n < 2 or not tables["table"].size or tables["table"].shape != v * n:
            raise reject("language.table.shape", tables["table"].shape, "(V, ..., V), n >= 2")
        shapes = {"start": v * (n - 1)}
    else:
        s = tables["pi"].shape[:1]
        if tables["pi"].ndim != 1 or not s[0]:
            raise reject("language.pi.shape", tables["pi"].shape, "(S,) of at least one state")
        shapes = {"A": s * 2, "B": s + tables["B"].shape[1:2]}
        if tables["B"].ndim != 2 or not tables["B"].size:
            raise reject("language.B.shape", tables["B"].shape, f"({s[0]}, V)")
    for name, shape in shapes.items():
        if tables[name].shape != shape:
            raise reject(f"language.{name}.shape", tables[name].shape, f"{shape}")
    return type(language)(**{
        name: _rows(name, table, whole=name == "start") for name, table in tables.items()
    })  # fmt: skip


def load(path: str | Path) -> Language:
    """A checked language of an .npz with pi, A and B (or with start and table).

    Raises:
      UserError: there is no such file, it is damaged or pickled, or holds no language.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            for kind in (HMM, NGram):
                if set(kind._fields) <= set(found):
                    return check(kind(**{name: found[name] for name in kind._fields}))
    except (OSError, ValueError, EOFError, BadZipFile, TypeError) as error:
        raise reject("language.path", str(path), "a readable .npz of numbers") from error
    raise reject("language.path", str(path), "an .npz with pi, A and B")


def save(path: str | Path, language: Language) -> None:
    """Writes what `load` reads.

    Raises:
      UserError: it is no language.
    """
    with open(path, "wb") as file:
        np.savez(file, **check(language)._asdict())


def dense(language: Language) -> HMM:
    """The same language with A and B written out, float64 on the host."""
    tables = check(language)
    return HMM(tables[0].reshape(-1), transitions(tables).toarray(), emissions(tables))


def transitions(language: Language) -> sparse.csr_array:
    """A of a checked language, without its zeros, float64 on the host."""
    if isinstance(language, HMM):
        return sparse.csr_array(language.A)
    s, v = states(language), vocab(language)
    before = np.repeat(np.arange(s), v)
    after = before % (s // v) * v + np.tile(np.arange(v), s)
    found = sparse.csr_array((language.table.reshape(-1), (before, after)), shape=(s, s))
    found.eliminate_zeros()
    return found


def emissions(language: Language) -> np.ndarray:
    """B of a checked language, on the host."""
    if isinstance(language, HMM):
        return language.B
    v = vocab(language)
    return np.tile(np.eye(v), (states(language) // v, 1))


def stationary(language: Language) -> Float[np.ndarray, " states"]:
    """The law of the state that a step leaves as it is, float64.

    Raises:
      UserError: the chain of states is reducible or periodic; with its classes.
    """
    language = check(language)
    refuse_non_ergodic(language)
    a, s = transitions(language), states(language)
    if s <= DENSE:
        # pi (1 - A + E) = 1 with E all ones: regular for an irreducible chain.
        found = np.linalg.solve((np.eye(s) - a.toarray() + 1).T, np.ones(s))
    else:
        found, change = np.full(s, 1 / s), 1.0
        for _ in range(TURNS):
            found, old = a.T @ found, found
            change = np.abs(found - old).sum()
            if change < 1e-14:
                break
        else:
            raise UserError(
                f"The chain of {s} states mixes too slowly: after {TURNS} turns its law still "
                f"moves by {change:.1g}."
            )
    found = np.maximum(found, 0)
    return found / found.sum()


class Class(NamedTuple):
    """A communicating class of states.

    Attributes:
      states: ascending.
      period: greatest common divisor of the lengths of its cycles; 0 if there is none.
      closed: no state outside is ever reached.
    """

    states: np.ndarray
    period: int
    closed: bool


def classes(language: Language) -> list[Class]:
    """The communicating classes of a checked language's chain, by their first states."""
    a = transitions(language)
    count, label = csgraph.connected_components(a, connection="strong")
    before, after = a.tocoo().coords
    left = np.unique(label[before[label[before] != label[after]]])
    found = []
    for number in range(count):
        own = np.flatnonzero(label == number)
        found.append(Class(own, _period(a[own][:, own]), number not in left))
    return sorted(found, key=lambda one: one.states[0])


def is_ergodic(language: Language) -> bool:
    """Whether a checked language's chain of states is irreducible and aperiodic."""
    a = transitions(language)
    count = csgraph.connected_components(a, connection="strong", return_labels=False)
    return count == 1 and _period(a) == 1


def refuse_non_ergodic(language: Language) -> None:
    """Refuses a checked language whose chain is reducible or periodic.

    Raises:
      UserError: with the classes, their periods, and which of them are closed.
    """
    if is_ergodic(language):
        return
    found = classes(language)
    said = [
        f"{_listed(one.states)} ({'closed' if one.closed else 'left for ever'}, "
        f"period {one.period or 'none'})"
        for one in found[:NAMED]
    ]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    raise UserError(
        "A stationary start needs a chain of states that is irreducible and aperiodic, but "
        f"the classes of this one are {', '.join(said)}{more}."
    )


def _split(language: NGram, message):
    """A message and the table with the axes (oldest, those between, newest)."""
    v = vocab(language)
    between = states(language) // v
    return message.reshape(len(message), v, between), language.table.reshape(v, between, v)


def _period(a: sparse.csr_array) -> int:
    """gcd over all edges of level(from) + 1 - level(to): levels by breadth-first search."""
    levels = csgraph.shortest_path(a, unweighted=True, indices=0)
    before, after = a.tocoo().coords
    slack = np.abs(levels[before] + 1 - levels[after]).astype(np.int64)
    return gcd(*np.unique(slack).tolist()) if len(slack) else 0


def _listed(own: np.ndarray) -> str:
    shown = ", ".join(str(s) for s in own[:NAMED].tolist())
    return "{" + shown + (f", ... of {len(own)}" if len(own) > NAMED else "") + "}"


def _numbers(name: str, table: Any) -> np.ndarray:
    found = np.asarray(table)
    if found.dtype.kind not in "fiub" and found.dtype != jnp.bfloat16:
        raise reject(f"language.{name}.dtype", str(found.dtype), "of real numbers")
    return found.astype(np.float64)


def _rows(name: str, table: np.ndarray, whole: bool) -> np.ndarray:
    """The table with rows of the sum 1, or as a whole."""
    wrong = np.argwhere(~(np.isfinite(table) & (table >= 0)))
    if len(wrong):
        value = float(table[tuple(wrong[0])])
        raise reject(_entry(name, wrong[0]), value, "a finite number from 0 up")
    total = table.sum(axis=None if whole else -1, keepdims=True)
    off = np.argwhere(np.abs(total - 1) > TOLERANCE)
    if len(off):
        at = off[0][: 0 if whole else table.ndim - 1]
        value = float(total[tuple(off[0])])
        raise reject(f"{_entry(name, at)}.sum()", value, f"1 within {TOLERANCE:.0e}")
    return table / total


def _entry(name: str, at: np.ndarray) -> str:
    where = ", ".join(str(i) for i in at.tolist())
    return f"language.{name}[{where}]" if where else f"language.{name}"
