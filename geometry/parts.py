"""What training, judging and the actions of a bridge share, made once for a config."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common import mesh as meshes
from common.errors import reject
from geometry import chain, dataset, graphs, matching, samplers
from geometry.data import arrays, batches
from geometry.network import Network
from geometry.networks.choose import network
from geometry.records import Record
from geometry.reference import Reference, reference
from geometry.samplers import Sampler, sampler

KINDS = ("bridge", "chain", "direct")


class Parts(NamedTuple):
    """Attributes:
    sets: of structures.
    train: the training set as arrays.
    batch: step -> `graphs.Batch`, on the host.
    plan: of an epoch.
    network: F.
    reference: of a single bridge; of a chain with unit noise.
    s2: mean square displacement, angstrom^2.
    chain: None but of kind "chain".
    sampler: of the config; of "direct" one call.
    generate: jitted; (params, graph, start, table, key, samples' number) -> the end, or of a
      chain the frames [K + 1, atoms, 3]. Leading axis of packs.
    trace: the same with all states of the grid, [points, packs, atoms, 3].
    """

    sets: dataset.Sets
    train: arrays.Arrays
    batch: Callable
    plan: batches.Plan
    network: Network
    reference: Reference
    s2: float
    chain: chain.Chain | None
    sampler: Sampler
    generate: Callable
    trace: Callable


def parts_of(config) -> Parts:
    """The parts of a config.

    Raises:
      UserError: it asks for what cannot be.
    """
    _check(config)
    found = dataset.sets(config)
    chained = config.kind == "chain"
    train = arrays.prepare(found.train, dataset.reach_of(config), frames=chained)
    data = config.data
    budget = None
    packs = packs_of(config)
    molecules = config.batch_size // packs
    if data.atoms or data.edges:
        budget = arrays.Budget(data.atoms, data.edges, molecules + 1)
    batch, plan = batches.training(train, molecules, packs, config.seed, budget)
    s2 = dataset.mean_square(found.train)
    made, process = None, _process(config, s2)
    if chained:
        c = config.chain
        squares = dataset.segments_of(found.train, c.segments)
        made = chain.chain(process, squares, c.condition, c.history, config.reference.kappa)
    known = 1
    if made is not None:
        known = made.history + (made.condition == "segment+initial")
    lines, atoms = train.edges.sum(), len(train.numbers)
    net = network(
        **config.network, known=known, chained=chained, neighbours=float(max(lines / atoms, 1))
    )
    own = sampler_of(config)
    run = partial(_generate, net, process, s2, made)
    return Parts(
        found, train, batch, plan, net, process, s2, made, own,
        jax.jit(partial(run, path=False)), jax.jit(partial(run, path=True)),
    )  # fmt: skip


def sampler_of(config, calls: int = 0) -> Sampler:
    """The sampler of a config; `calls` instead of its steps (of a chain, in all segments)."""
    fields = dict(config.sampler)
    fields["steps"] = config.chain.steps if config.kind == "chain" else fields["steps"]
    if config.kind == "direct":
        fields |= {"name": "mean", "steps": 1}
    elif calls:
        fields["steps"] = max(
            1, calls // (config.chain.segments if config.kind == "chain" else 1)
        )
    return sampler(**fields)


def table_of(parts: Parts, own: Sampler) -> samplers.Table:
    """The numbers of a sampler, of all segments of a chain."""
    if parts.chain is not None:
        return chain.tables(parts.chain, own)
    return samplers.table(parts.reference, own)


def predict(
    parts: Parts,
    params: Any,
    records: Sequence[Record],
    reach: Any,
    own: Sampler,
    key: jax.Array,
    path: bool = False,
) -> list[np.ndarray]:
    """The end of every record, in its own frame; of a chain its frames, with `path` all states.

    Args:
      records: of any sizes; one program serves them all.
      own: the sampler.
      key: of the noise; a structure's own depends on its place in `records` only.
      path: the states at all points of the grid, [points, atoms, 3].
    """
    made = arrays.prepare(records, reach)
    rows, budget = batches.for_prediction(made)
    table = table_of(parts, own)
    found: dict[int, np.ndarray] = {}
    run = parts.trace if path else parts.generate
    for row in rows:
        batch = arrays.assemble(made, row, budget)
        x = np.asarray(run(params, batch.graph, batch.start, table, key))
        # Frames, if there are some, stand before the packs.
        x = np.moveaxis(x, (-3, -2), (0, 1))
        found |= arrays.unpack(batch, x)
    states = [np.moveaxis(found[k], 0, -2) for k in range(len(records))]
    return [_back(record, x) for record, x in zip(records, states, strict=True)]


def _back(record: Record, x: np.ndarray) -> np.ndarray:
    """Molecules were centred: their own centre again."""
    if dataset.align.centred(record):
        x = x + record.start.mean(axis=0)
    return x


def _generate(net, process, s2, made, params, graph, start, table, key, *, path):
    def one(graph, start):
        keep = samplers.fixed(graph, start)
        noise = lambda k: graphs.noise(jax.random.fold_in(key, k), graph, start.dtype)
        if made is not None:
            denoise = chain.denoiser(net, made, params, graph)
            found = chain.sample(denoise, made, table, start, noise, keep, path)
            if not path:
                return found
            states = found[1][:, 1:].reshape(-1, *start.shape)
            return jnp.concatenate([start[None], states])
        denoise = lambda x, t: matching.denoised(
            net, process, s2, params, graph, x, start[None], t
        )
        found = samplers.run(denoise, table, start, noise, keep, path)
        return found[1] if path else found

    axis = 0 if made is None and not path else 1
    return graphs.each_pack(one, axis)(graph, start)


def _process(config, s2: float) -> Reference:
    r = config.reference
    if not 0 < r.kappa < np.inf:
        raise reject("reference.kappa", r.kappa, "a finite number above 0")
    if r.sigma < 0:
        raise reject("reference.sigma", r.sigma, "0 (from kappa) or a length above 0")
    fields = {
        "brownian": dict(sigma=r.sigma or float(np.sqrt(r.kappa * s2 / r.horizon))),
        "ve": dict(sigma_min=r.sigma_min, sigma_max=r.sigma_max),
        "vp": dict(beta_min=r.beta_min, beta_max=r.beta_max),
    }.get(r.name, {})
    if config.kind == "chain" and r.name == "brownian":
        fields = dict(sigma=1.0)
    return reference(r.name, **fields, end=r.horizon)


def packs_of(config) -> int:
    """Packs of a step: `config.packs`, or one for each device."""
    return config.packs or meshes.make(**config.mesh).shape["data"]


def _check(config) -> None:
    devices = meshes.make(**config.mesh).shape["data"]
    packs = packs_of(config)
    if config.kind not in KINDS:
        raise reject("kind", config.kind, f"one of {', '.join(KINDS)}")
    if packs < 1 or packs % devices:
        allowed = f"0, or a multiple of the {devices} devices of mesh.data"
        raise reject("packs", config.packs, allowed)
    if config.batch_size < packs or config.batch_size % packs:
        raise reject("batch_size", config.batch_size, f"a multiple of the {packs} packs")
    if not 0 < config.loss.last < 1:
        raise reject("loss.last", config.loss.last, "a share between 0 and 1")
    if not 0 <= config.loss.w_min < np.inf:
        raise reject("loss.w_min", config.loss.w_min, "a finite number from 0 up")
    if not 0 <= config.ema < 1:
        raise reject("ema", config.ema, "0 (none), or a decay below 1")
    sampler_of(config)
