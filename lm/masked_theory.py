"""The exact denoiser of a language against the number of steps: what no training can better.

Feng et al., arXiv:2502.09622, with the learning error set to zero. A step measures
`config.batch_size` new texts of every length written by every sampler of `config.theory` with
every number of steps, for the sequence error (E2), and `theory.draws` times as many along the
information curve, which gives the token error of every number of steps (E1). The state holds
sums, so a run is stopped and gone on with like any other, and more steps are smaller error
bars.

    information curve, NELBO_T, section 5.2         masked/curve.py
    bounds and closed forms, section 5.2            languages/theory.py
    exact law of tiny texts, section 6.3            masked/enumeration.py
"""

import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from common import mesh as meshes
from common.errors import reject
from common.experiment import Experiment, Run
from lm.languages import build, evaluate, hmm
from lm.languages.oracle import oracle
from lm.masked import curve, enumeration, known, report, settings
from lm.masked.denoiser import denoise
from lm.masked.ladder import ladder
from lm.masked.texts import LARGEST, THEORY, keys_of


class Cells(NamedTuple):
    """Sums over the texts of one sampler at one length, by number of steps: float32 [steps].

    Attributes:
      texts: how many.
      wrong: outside of the support.
      scored: inside, and with a log q that float32 can hold.
      log_q: of -log q(x) / L of those inside.
      square: of its square.
      calls: network calls of a text.
      rounds: of a batch.
    """

    texts: Float[Array, " steps"]
    wrong: Float[Array, " steps"]
    scored: Float[Array, " steps"]
    log_q: Float[Array, " steps"]
    square: Float[Array, " steps"]
    calls: Float[Array, " steps"]
    rounds: Float[Array, " steps"]


class State(NamedTuple):
    """Sums so far.

    Attributes:
      curves: one for each length; empty where not wanted.
      entropy: [lengths, 3]: texts, and sums of -log q(x) / L and of its square.
      cells: cells[sampler][length].
      done: steps so far.
      table: CRC-32 of the language: sums of two languages are of none.
    """

    curves: tuple[curve.Curve, ...]
    entropy: Float[Array, "lengths 3"]
    cells: dict[str, tuple[Cells, ...]]
    done: Int[Array, ""]
    table: UInt[Array, ""]


def make(config) -> Experiment:
    """The experiment of runs with `experiment="lm.masked_theory"`.

    Raises:
      UserError: the config asks for what cannot be.
    """
    table, language = _language(config)
    vocab = hmm.vocab(table)
    denoiser = oracle(vocab)
    lengths = tuple(config.theory.lengths)
    ladders = {
        (name, length): rungs(config, name, length, vocab)
        for name in config.theory.samplers
        for length in lengths
    }
    size = config.batch_size

    def init(key):
        del key
        cells = {
            name: tuple(
                Cells(*(jnp.zeros(len(ladders[name, length])) for _ in Cells._fields))
                for length in lengths
            )
            for name in config.theory.samplers
        }
        curves = tuple(curve.empty(n) for n in lengths) if config.theory.curve else ()
        done, which = jnp.zeros((), jnp.int32), jnp.uint32(fingerprint(table))
        return State(curves, jnp.zeros((len(lengths), 3)), cells, done, which)

    def step(state, batch, key):
        del batch
        curves, entropies = [], []
        for i, length in enumerate(lengths):
            of_length = jax.random.fold_in(jax.random.fold_in(key, 0), i)
            entropy, found = _measured(
                of_length, config, denoiser, language, state.done, length
            )
            entropies.append(entropy)
            if config.theory.curve:
                curves.append(curve.added(state.curves[i], found))
        cells, wrong = {}, []
        for j, name in enumerate(config.theory.samplers):
            added = []
            for i, length in enumerate(lengths):
                of_cell = jax.random.fold_in(jax.random.fold_in(key, 1 + j), i)
                one = _cells(of_cell, denoiser, language, size, length, ladders[name, length])
                added.append(jax.tree.map(jnp.add, state.cells[name][i], one))
                wrong.append(jnp.mean(one.wrong) / size)
            cells[name] = tuple(added)
        done = state.done + 1
        values = {"texts": done * size, "entropy": entropies[-1][1] / entropies[-1][0]}
        if wrong:
            values["ser"] = jnp.mean(jnp.stack(wrong))
        entropy = state.entropy + jnp.stack(entropies)
        return State(tuple(curves), entropy, cells, done, state.table), values

    return Experiment(
        init=init,
        step=step,
        evaluate=partial(_evaluate, config, table, ladders),
        report=report.report,
        actions={"law": partial(_law, config, table)},
        headline=lambda row: f"texts {row['texts']:.0f}  SER {row.get('ser', 0):.3f}",
    )


def rungs(config, name: str, length: int, vocab: int) -> list[settings.Settings]:
    """One sampler per number of steps, ascending; those that L does not admit left out.

    Raises:
      UserError: none is left.
    """
    t = config.theory
    wanted = {*t.steps, *(max(1, round(ratio * length)) for ratio in t.ratios)}
    if name in settings.QUOTA:
        wanted = {steps for steps in wanted if steps <= length}
    if not wanted:
        raise reject("theory.steps", tuple(t.steps), f"at most {length} with {name}")
    made = [
        settings.settings(**dict(config.sampler) | {"kind": name, "steps": steps})
        for steps in sorted(wanted)
    ]
    fitted = [settings.fit(one, length, vocab) for one in made]
    return fitted[:1] if name in settings.FREE_RUNNING else fitted


def _measured(
    key, config, denoiser, language, done, length: int
) -> tuple[jax.Array, curve.Curve]:
    """Sums of `theory.draws` batches of new texts: of their entropy [3], and their curve.

    A text counts for two neighbouring h_n at most, whose errors are negatively correlated:
    errors that take them for independent are too large, up to twice for the whole NELBO.
    """
    size, draws = config.batch_size, config.theory.draws if config.theory.curve else 1

    def body(sums, draw):
        first = (done * draws + draw) * size
        keys = keys_of(
            config.language.seed,
            config.seed,
            jnp.full(size, THEORY, jnp.int32),
            first + jnp.arange(size),
        )
        x = meshes.shared(evaluate.draw_each(keys, language, length))
        entropy = -evaluate.log_prob(language, x) / length
        found = jnp.stack([jnp.float32(size), entropy.sum(), (entropy**2).sum()])
        if not config.theory.curve:
            return (sums[0] + found, sums[1]), None
        one = _curve(jax.random.fold_in(key, draw), denoiser, language, x, first, entropy)
        return (sums[0] + found, curve.added(sums[1], one)), None

    none = jnp.zeros(3), curve.empty(length)
    return jax.lax.scan(body, none, jnp.arange(draws))[0]


def _curve(key, denoiser, language, x, first, entropy) -> curve.Curve:
    """The curve of a batch, from all positions.

    The exact denoiser says what a visible token was to be expected to be from the others, too:
    a text with n visible tokens counts for h_n and for h_{n-1}.
    """
    length = x.shape[1]
    noised, visible = curve.prepared(key, x, first, denoiser.mask)
    log_f = denoise(denoiser, language, noised.x)
    loss = -jnp.take_along_axis(log_f, x[..., None], axis=-1)[..., 0]
    mean = lambda where: (
        jnp.sum(jnp.where(where, loss, 0.0), axis=1) / jnp.maximum(jnp.sum(where, axis=1), 1)
    )
    masked = curve.tallied(visible, mean(noised.masked) - entropy, length)
    others = mean(~noised.masked) - entropy
    seen = curve.tallied(jnp.maximum(visible - 1, 0), others, length, visible > 0)
    return curve.added(masked, seen)


def _cells(key, denoiser, language, size, length, made) -> Cells:
    found = ladder(key, denoiser, language, size, length, made)
    steps = len(made)
    x = found.tokens.reshape(steps * size, length)
    right = evaluate.supported(language, x).reshape(steps, size)
    surprise = -evaluate.log_prob(language, x).reshape(steps, size) / length
    # In the support, but by so little that float32 lost it: in no mean either.
    scored = right & jnp.isfinite(surprise)
    surprise = jnp.where(scored, surprise, 0.0)
    return Cells(
        texts=jnp.full(steps, float(size)),
        wrong=jnp.sum(~right, axis=1).astype(jnp.float32),
        scored=jnp.sum(scored, axis=1).astype(jnp.float32),
        log_q=surprise.sum(axis=1),
        square=(surprise**2).sum(axis=1),
        calls=found.calls.sum(axis=1).astype(jnp.float32),
        rounds=found.rounds.astype(jnp.float32),
    )


def _evaluate(config, table, ladders, state: State, key) -> dict:
    """All figures so far; names end in the length.

    Returns:
      entropy_L, entropy_error_L: of the texts drawn, nats per token.
      h_L, h_error_L: h_n less the entropy of the same texts.
      nelbo_L, nelbo_error_L: the same of NELBO / L: zero, up to the error.
      steps_SAMPLER_L, ser_, ser_error_, ter_, ter_error_, unsupported_, calls_, rounds_
      exact_steps, exact_ser, exact_ter, exact_kl: of texts of `theory.exact` tokens.
    """
    del key
    if int(state.table) != fingerprint(table):
        path = config.language.path
        raise reject("language.path", path, "the file that this run began with; it has changed")
    t, found = config.theory, {}
    for i, length in enumerate(t.lengths):
        texts, total, square = np.asarray(state.entropy[i], np.float64)
        found[f"entropy_{length}"] = total / texts
        spread = max(square / texts - (total / texts) ** 2, 0)
        found[f"entropy_error_{length}"] = np.sqrt(spread / texts)
        if t.curve:
            one = jax.device_get(state.curves[i])
            found[f"h_{length}"], found[f"h_error_{length}"] = curve.information(one)
            whole = curve.combined(one, curve.whole(length))
            found[f"nelbo_{length}"], found[f"nelbo_error_{length}"] = whole
        for name in t.samplers:
            made = ladders[name, length]
            one = _rates(jax.device_get(state.cells[name][i]), config.batch_size)
            one["steps"] = np.array([s.steps for s in made])
            found |= {f"{field}_{name}_{length}": value for field, value in one.items()}
    if exact_length(config, hmm.vocab(table)):
        laws = exact(config, table)
        found["exact_length"] = exact_length(config, hmm.vocab(table))
        found["exact_steps"] = np.array(t.exact_steps)
        for name, measure in (("ser", enumeration.sequence_errors), ("kl", enumeration.kl)):
            found[f"exact_{name}"] = np.array([measure(laws.q, p) for p in laws.p])
        ter = [enumeration.token_errors(laws.q, p, found["exact_length"]) for p in laws.p]
        found["exact_ter"] = np.array(ter)
    return found


def _rates(cells: Cells, size: int) -> dict:
    cells = Cells(*(np.asarray(a, np.float64) for a in cells))
    ser, some = cells.wrong / cells.texts, np.maximum(cells.scored, 1)
    ter = cells.log_q / some
    spread = np.maximum(cells.square / some - ter**2, 0)
    return {
        "ser": ser,
        "ser_error": evaluate.share_error(cells.wrong, cells.texts),
        "ter": np.where(cells.scored > 0, ter, np.nan),
        "ter_error": np.sqrt(spread / some),
        "unsupported": 1 - cells.scored / cells.texts,
        "calls": cells.calls / cells.texts,
        "rounds": cells.rounds * size / cells.texts,
    }


class Laws(NamedTuple):
    """Laws of tiny texts: the language's [V^L], and the sampler's at each number of steps."""

    q: np.ndarray
    p: list[np.ndarray]


def exact(config, table: Any) -> Laws:
    """By enumeration, of texts of `theory.exact` tokens, ancestral with `theory.exact_steps`.

    Raises:
      UserError: they are too many.
    """
    vocab = hmm.vocab(table)
    length = exact_length(config, vocab)
    every = enumeration.texts(vocab, length)
    with jax.enable_x64(True):
        wide = hmm.on_device(table, jnp.float64)
        q = np.exp(np.asarray(evaluate.log_prob(wide, jnp.asarray(every)), np.float64))
        p = []
        for steps in config.theory.exact_steps:
            w = known.ancestral(config, steps)
            p.append(enumeration.law(oracle(vocab), wide, length, w))
    return Laws(q, p)


def fingerprint(table: Any) -> int:
    """CRC-32 of a language's tables."""
    return zlib.crc32(
        b"".join(np.asarray(a, np.float64).tobytes() for a in jax.tree.leaves(table))
    )


def exact_length(config, vocab: int) -> int:
    """Tokens of the texts that are enumerated: `theory.exact`, or as many as can be."""
    fitting = [n for n in range(config.theory.exact + 1) if enumeration.fits(vocab, n)]
    return max(fitting)


def _law(config, table, run: Run, folder: Path) -> str:
    """Writes law.npz: all texts of `theory.exact` tokens, q, and p at each number of steps."""
    del run
    length = exact_length(config, hmm.vocab(table))
    vocab = hmm.vocab(table)
    if not length:
        raise reject("theory.exact", 0, "a number of tokens, for the law of such texts")
    laws, steps = exact(config, table), np.array(config.theory.exact_steps)
    every = enumeration.texts(vocab, length)
    np.savez(folder / "law.npz", texts=every, q=laws.q, p=np.stack(laws.p), steps=steps)
    rows = [
        f"| {n} | {enumeration.sequence_errors(laws.q, p):.9f} "
        f"| {enumeration.kl(laws.q, p):.9f} "
        f"| {enumeration.token_errors(laws.q, p, length):.9f} |"
        for n, p in zip(steps, laws.p, strict=True)
    ]
    head = "| steps | SER | KL, nats | log TER, nats |\n|---|---|---|---|"
    return "\n".join([f"{len(every)} texts of {length} tokens.", "", head, *rows])


def _language(config):
    fields = dict(config.language)
    fields.pop("texts")
    if not (config.language.kind or config.language.path):
        raise reject("language.kind", "", "a formal language: a text has no exact denoiser")
    t = config.theory
    if not t.lengths or min(t.lengths) < 1:
        raise reject("theory.lengths", tuple(t.lengths), "whole numbers from 1 up")
    devices = meshes.make(**config.mesh).shape["data"]
    if config.batch_size < 1 or config.batch_size % devices:
        allowed = f"a multiple of the {devices} devices of mesh.data"
        raise reject("batch_size", config.batch_size, allowed)
    if t.draws < 1:
        raise reject("theory.draws", t.draws, "a whole number from 1 up")
    if t.exact < 0:
        raise reject("theory.exact", t.exact, "a whole number from 0 up")
    for steps in t.exact_steps:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise reject("theory.exact_steps", tuple(t.exact_steps), "whole numbers from 1 up")
    if not all(0 < ratio < float("inf") for ratio in t.ratios):
        raise reject("theory.ratios", tuple(t.ratios), "finite numbers above 0")
    texts = config.steps * config.batch_size * (t.draws if t.curve else 1)
    if t.curve and texts < 2 * max(t.lengths):
        allowed = f"more: {texts} texts in all, but two for every number of visible tokens"
        raise reject("theory.draws", t.draws, f"{allowed} of {max(t.lengths)} are needed")
    if texts > LARGEST:
        raise reject("steps", config.steps, f"fewer: {texts} texts have no number each")
    table = build.language(**fields)
    return table, hmm.on_device(table)
