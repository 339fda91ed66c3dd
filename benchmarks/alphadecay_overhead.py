"""What AlphaDecay costs a training step: AdamW with masked constant decay against it.

    uv run python -m benchmarks.alphadecay_overhead [DIM [MLP [HEADS [DEPTH [VOCAB
        [BATCH [LENGTH [REPEATS]]]]]]]]

The default is small; `512 1376 8 8 32000 512 256` is the 60M model with the paper's batch.
Both train the same decoder on the same random tokens and decay the same matrices.

    AdamW                 `optax.add_decayed_weights` with a mask
    AlphaDecay            `optim.alphadecay` inline, on steps that are no refreshes
    AlphaDecay, refresh   the same compiled step on a state whose step is 0: it refreshes

What a refresh adds is spread over the T = 500 steps from one to the next. Every step is
traced once, refresh or not; the run fails otherwise.
"""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from benchmarks.timing import alternately, table
from lm.transformer import transformer
from optim.alphadecay import AlphaDecayState, alphadecay
from optim.modules import Dims, dotted

EVERY, DECAY, RATE, BLOCK = 500, 0.1, 1e-3, 10


class Training(NamedTuple):
    params: optax.Params
    opt: optax.OptState


def main(
    dim: str = "128",
    mlp: str = "344",
    heads: str = "4",
    depth: str = "4",
    vocab: str = "1024",
    batch: str = "16",
    length: str = "64",
    repeats: str = "40",
) -> None:
    """Prints the comparison as Markdown, then the shares of a step."""
    if not 0 < int(repeats) < EVERY - 1:
        raise SystemExit(f"REPEATS is {repeats}, but must be from 1 to {EVERY - 2}.")
    sizes = dict(dim=int(dim), mlp=int(mlp), heads=int(heads), depth=int(depth))
    model = transformer(vocab=int(vocab), **sizes)
    shape = (int(batch), int(length) + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, int(vocab))
    few = min(50, sizes["dim"])
    rules = {
        "AdamW": optax.add_decayed_weights(DECAY, mask=matrix_mask),
        "AlphaDecay": alphadecay(
            DECAY, modules=modules, every=EVERY, decay_rest="none", min_eigs=few
        ),
    }
    traces = dict.fromkeys(rules, 0)
    steps = {name: step(model, rule, name, traces) for name, rule in rules.items()}
    start = lambda name: begin(model, rules[name])
    seconds = {name: [] for name in (*rules, "AlphaDecay, refresh")}
    # Fresh states every few rounds: where buffers come to lie is worth some per cent.
    for block in range(0, int(repeats), BLOCK):
        functions = {name: loop(steps[name], start(name), tokens) for name in rules}
        found = alternately(functions, min(BLOCK, int(repeats) - block))
        refresh = loop(steps["AlphaDecay"], start("AlphaDecay"), tokens, rewind)
        found |= alternately({"AlphaDecay, refresh": refresh}, len(found["AdamW"]))
        for name, values in found.items():
            seconds[name] += values
    if set(traces.values()) != {1}:
        raise SystemExit(f"Compiled again: {traces}.")

    count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    print(f"{count / 1e6:.1f}M parameters, {shape[0]} x {length} tokens, ", end="")
    print(f"{jax.devices()[0].device_kind}; each step traced once\n")
    print(table(seconds, "AdamW"))
    plain, ours, fresh = map(np.asarray, seconds.values())
    gap = stats.bootstrap((ours / plain - 1,), np.median, rng=np.random.default_rng(0))
    low, high = gap.confidence_interval
    each, quick = np.median(ours / plain - 1), [np.quantile(t, 0.1) for t in (ours, plain)]
    print(f"\nA step without refresh: {100 * each:+.2f} % (median over rounds; 95 % interval")
    print(f"{100 * low:+.2f} to {100 * high:+.2f}), ", end="")
    print(f"{100 * (quick[0] / quick[1] - 1):+.2f} % between the fastest tenths.")
    refresh = np.median(fresh - ours) / np.median(plain)
    print(f"One refresh: {refresh:.2f} steps, {100 * refresh / EVERY:.3f} % at T = {EVERY}")


def modules(path, leaf):
    """The seven matrices of each block, stacked over blocks."""
    del leaf
    return Dims() if path.startswith("blocks.") and path.endswith(".kernel") else None


def matrix_mask(params):
    """`modules` as the tree of booleans that Optax takes."""
    chosen = lambda path, leaf: modules(dotted(path), leaf) is not None
    return jax.tree_util.tree_map_with_path(chosen, params)


def chain(rule):
    return optax.chain(optax.scale_by_adam(), rule, optax.scale_by_learning_rate(RATE))


def begin(model, rule) -> Training:
    params = model.init(jax.random.key(0))
    return Training(params, chain(rule).init(params))


def step(model, rule, name, traces):
    """A jitted training step that counts how often it is traced."""
    tx = chain(rule)

    def loss(params, tokens):
        xent = optax.softmax_cross_entropy_with_integer_labels
        return xent(model.apply(params, tokens[:, :-1]), tokens[:, 1:]).mean()

    def train(training, tokens):
        traces[name] += 1
        gradient = jax.grad(loss)(training.params, tokens)
        updates, opt = tx.update(gradient, training.opt, training.params)
        return Training(optax.apply_updates(training.params, updates), opt)

    return jax.jit(train, donate_argnums=0)


def loop(train, training, tokens, prepare=lambda training: training):
    """() -> the next state, one step further at every call."""
    holder = [training]

    def advance():
        holder[0] = train(prepare(holder[0]), tokens)
        return holder[0]

    return advance


def rewind(training):
    """The same training at a step that refreshes."""
    ours = lambda x: isinstance(x, AlphaDecayState)
    zero = lambda x: x._replace(count=jnp.zeros((), jnp.int32)) if ours(x) else x
    return Training(training.params, jax.tree.map(zero, training.opt, is_leaf=ours))


if __name__ == "__main__":
    main(*sys.argv[1:])
