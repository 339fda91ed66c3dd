"""Every network: symmetries, padding, what it sees, gradients. two_frame: against loops."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from geometry.network import Network
from geometry.networks.choose import NETWORKS, network
from tests.geometry import graphs_made as made

SMALL = dict(features=8, layers=2, radial=6, radius=5.0, species=10, neighbours=4.0, heads=2)
CELL = np.diag([4.5, 5.0, 0.0])
MOLECULES = [made.structure(k, n) for k, n in enumerate((5, 3, 6))]
# Without those that are another by an option.
DIFFERENT = [name for name in NETWORKS if name != "periodic"]
SLAB = made.structure(7, 5, cell=CELL, cutoff=4.0)._replace(bonds=np.zeros((5, 5), int))


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def drawn(net, seed=0, dtype=np.float64):
    """Parameters of which none is 0, on the host."""
    rng = np.random.default_rng(seed)

    def one(path, shape):
        values = rng.normal(size=shape)
        name = jax.tree_util.keystr(path)
        if "kernel" in name:
            values = values / np.sqrt(shape[-2])
        return (1 + 0.3 * values if "scale" in name else values).astype(dtype)

    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(lambda path, leaf: one(path, leaf.shape), shapes)


class Case(NamedTuple):
    """A network; float64 parameters; what is compiled once: apply, and (output, gradients of
    a loss with respect to parameters and x)."""

    name: str
    net: Network
    params: Any
    apply: Callable
    both: Callable


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    net = network(request.param, **SMALL)

    def both(params, graph, inputs, aim):
        def loss(params, x):
            out = net.apply(params, graph, inputs._replace(x=x))
            return ((out - aim) ** 2).sum(), out

        slopes, out = jax.grad(loss, (0, 1), has_aux=True)(params, inputs.x)
        return out, slopes

    return Case(request.param, net, drawn(net), jax.jit(net.apply), jax.jit(both))


def run(case, structures, dtype=np.float64, **change):
    """Outputs of each structure, [atoms, 3]."""
    with jax.enable_x64(dtype == np.float64):
        graph, inputs = made.batch(structures, dtype=dtype)
        params = jax.tree.map(lambda a: jnp.asarray(a, dtype), case.params)
        inputs = inputs._replace(**change)
        if dtype == np.float64:
            out = case.apply(params, graph, inputs)
        else:
            out, _ = case.both(params, graph, inputs, jnp.zeros_like(inputs.x))
        out = np.asarray(out)
    assert out.dtype == dtype
    cuts = np.cumsum([len(s.numbers) for s in structures])
    *parts, rest = np.split(out, cuts)
    np.testing.assert_array_equal(rest, 0)
    return parts


def close(found, expected, bound):
    for a, b in zip(found, expected, strict=True):
        scale = max(1.0, np.abs(b).max())
        assert np.abs(a - b).max() < bound * scale


BOTH = [(np.float32, 2e-5), (np.float64, 1e-10)]


def test_outputs_are_of_a_size_to_test(case):
    for out in run(case, MOLECULES):
        assert 0.05 < np.abs(out).max() < 100


@pytest.mark.parametrize(("dtype", "bound"), BOTH)
@pytest.mark.parametrize("determinant", [1, -1])
def test_turning_all_states_turns_the_output(case, dtype, bound, determinant):
    q = made.orthogonal(3, determinant)
    expected = [f @ q.T for f in run(case, MOLECULES, dtype)]
    found = run(case, [made.turned(s, q) for s in MOLECULES], dtype)
    close(found, expected, bound)
    assert np.abs(found[0] - run(case, MOLECULES, dtype)[0]).max() > 0.01


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-3), (np.float64, 1e-9)])
def test_moving_all_states_changes_nothing(case, dtype, bound):
    far = [made.turned(s, np.eye(3), (1e3, -500.0, 700.0)) for s in MOLECULES]
    close(run(case, far, dtype), run(case, MOLECULES, dtype), bound)


def test_permuting_atoms_permutes_the_output(case):
    order = [
        np.random.default_rng(k).permutation(len(s.numbers)) for k, s in enumerate(MOLECULES)
    ]
    found = run(case, [made.permuted(s, o) for s, o in zip(MOLECULES, order, strict=True)])
    expected = [f[o] for f, o in zip(run(case, MOLECULES), order, strict=True)]
    close(found, expected, 1e-10)


def test_structures_do_not_feel_the_rest_of_their_batch(case):
    together = run(case, MOLECULES)
    close(run(case, MOLECULES[::-1])[::-1], together, 1e-10)
    close([run(case, [s])[0] for s in MOLECULES], together, 1e-10)


def test_outputs_are_centred_and_fixed_atoms_do_not_move(case):
    molecule, slab = run(case, [MOLECULES[0], SLAB])
    assert np.abs(molecule.sum(0)).max() < 1e-10
    np.testing.assert_array_equal(slab[:2], 0)
    assert np.abs(slab[2:].sum(0)).max() > 1e-3


@pytest.mark.parametrize("content", [1e6, np.nan])
def test_padding_changes_no_bit(case, content):
    """Neither of the output nor of the gradients, whatever stands there."""
    params = jax.tree.map(jnp.float32, case.params)
    graph, inputs = made.batch(MOLECULES)
    clean = case.both(params, graph, inputs, jnp.ones_like(inputs.x))
    padding = np.asarray(graph.mask) == 0
    fill = lambda x: jnp.asarray(np.where(padding[:, None], content, x), jnp.float32)
    no_edge = np.asarray(graph.edge_mask) == 0
    dirty = graph._replace(
        numbers=jnp.asarray(np.where(padding, 7, graph.numbers)),
        bonds=jnp.asarray(np.where(no_edge, 3, graph.bonds)),
        shifts=jnp.asarray(np.where(no_edge[:, None], 1.5, graph.shifts), jnp.float32),
    )
    inputs = inputs._replace(x=fill(inputs.x), known=fill(inputs.known))
    soiled = case.both(params, dirty, inputs, jnp.ones_like(inputs.x))
    jax.tree.map(np.testing.assert_array_equal, soiled, clean)


def test_fresh_parameters_say_exactly_nothing_but_can_learn(case):
    params = jax.jit(case.net.init)(jax.random.key(1))
    graph, inputs = made.batch(MOLECULES)
    out, (slopes, _) = case.both(params, graph, inputs, inputs.x)
    np.testing.assert_array_equal(out, 0)
    assert max(np.abs(a).max() for a in jax.tree.leaves(slopes["head"]["out"])) > 1e-3


def test_gradients_are_finite_where_states_or_atoms_coincide(case):
    """R_t = R^0; two atoms 0.3 angstrom apart; two at the same place."""
    x = np.array(MOLECULES[0].positions[1])
    x[1] = x[0] + [0.3, 0, 0]
    x[3] = x[2]
    s = MOLECULES[0]._replace(positions=np.stack([x, x]))
    graph, inputs = made.batch([s])
    params = jax.tree.map(jnp.float32, case.params)
    out, slopes = case.both(params, graph, inputs, jnp.ones_like(inputs.x))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((out, slopes)))
    assert np.abs(slopes[1]).max() > 1e-4


def test_all_inputs_are_seen(case):
    """States, time, scale, elements and bonds."""
    base = run(case, MOLECULES)[0]
    _, inputs = made.batch(MOLECULES)
    s = MOLECULES[0]
    other = np.array(s.positions)
    other[1, 2] += 0.1
    for changed in (
        s._replace(positions=other),
        s._replace(positions=np.stack([other[1], other[0]])),
        s._replace(numbers=np.append(9, s.numbers[1:])),
        s._replace(bonds=np.where(s.bonds > 0, 5 - s.bonds, 1)),
    ):
        assert np.abs(run(case, [changed, *MOLECULES[1:]])[0] - base).max() > 1e-4
    for name in ("time", "scale"):
        change = {name: np.asarray(getattr(inputs, name)) * 0.9 + 0.05}
        with jax.enable_x64(True):
            change = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), change)
        assert np.abs(run(case, MOLECULES, **change)[0] - base).max() > 1e-4


@pytest.mark.parametrize("name", DIFFERENT)
def test_chains_see_all_known_states_and_the_segment(name):
    net = network(name, **SMALL | dict(known=2, chained=True))
    params = drawn(net, dtype=np.float32)
    graph, inputs = made.batch([made.structure(4, 5, states=3)])
    apply = jax.jit(net.apply)
    base = apply(params, graph, inputs)
    differs = lambda **change: np.abs(
        apply(params, graph, inputs._replace(**change)) - base
    ).max()
    assert differs(known=inputs.known.at[1, 2].add(0.1)) > 1e-4
    assert differs(known=inputs.known[::-1]) > 1e-4
    assert differs(segment=inputs.segment + 0.2) > 1e-4
    with pytest.raises(ValueError, match="2 known states, not 1"):
        net.apply(params, graph, inputs._replace(known=inputs.known[:1]))


def test_a_single_bridge_has_no_segment(case):
    _, inputs = made.batch(MOLECULES)
    later = {"segment": np.asarray(inputs.segment, np.float64) + 0.2}
    found, expected = run(case, MOLECULES, **later), run(case, MOLECULES)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_an_atom_may_be_any_of_its_images(case):
    """Wrapping atoms across a boundary, in all states, changes only edges' shifts."""
    wrap = np.zeros((5, 3))
    wrap[1], wrap[3] = CELL[0], -CELL[1] - 2 * CELL[0]
    wrapped = SLAB._replace(positions=SLAB.positions + wrap)
    same = lambda s: [(i, j, shift - wrap[j] + wrap[i]) for i, j, shift in made.edges_of(SLAB)]
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, case.params)
        expected, found = (
            case.apply(params, *made.batch([s], dtype=np.float64, edges_for=edges))
            for s, edges in ((SLAB, made.edges_of), (wrapped, same))
        )
    shifts = [shift for _, _, shift in made.edges_of(SLAB)]
    assert np.abs(shifts).max() > 1
    close([np.asarray(found)], [np.asarray(expected)], 1e-10)


@pytest.mark.parametrize("name", DIFFERENT)
def test_edges_beyond_the_radius_fade_out(name):
    """With an envelope those beyond it, in all states, are as none, and come in smoothly."""
    settings = SMALL | dict(envelope=True, radius=3.0, layers=1)
    net = network(name, **settings)
    s = made.structure(11, 6)
    # Pushes between the last two, from afar.
    s.positions[:, 5] = s.positions[:, 4] + [[3.5, 0, 0], [3.3, 0, 0]]
    without = lambda s: [(i, j, d) for i, j, d in made.edges_of(s) if {i, j} != {4, 5}]
    apply = jax.jit(net.apply)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, drawn(net))

        def at(d, edges):
            t = s._replace(positions=np.array(s.positions))
            t.positions[0, 5] = t.positions[0, 4] + [d, 0, 0]
            return np.asarray(
                apply(params, *made.batch([t], dtype=np.float64, edges_for=edges))
            )

        gap = lambda d: np.abs(at(d, made.edges_of) - at(d, without)).max()
        assert gap(3.01) < 1e-12
        assert gap(2.9) > 1e-6
        # The third derivative is the first that does not vanish: an eighth at half as far.
        assert gap(2.98) / gap(2.99) == pytest.approx(8, rel=0.1)


def test_hidden_bfloat16_is_near(case):
    if case.name == "periodic":
        pytest.skip("two_frame with an envelope")
    half = network(case.name, **SMALL | dict(dtype="bfloat16"))
    params = jax.tree.map(jnp.float32, case.params)
    found = jax.jit(half.apply)(params, *made.batch(MOLECULES))
    assert found.dtype == jnp.float32
    full = np.concatenate(run(case, MOLECULES, np.float32))
    off = np.abs(found[: len(full)] - full).max() / np.abs(full).max()
    assert 1e-5 < off < 0.1


def test_depth_costs_no_compilation():
    batch = made.batch(MOLECULES)
    lengths = []
    for layers in (2, 5):
        net = network(**SMALL | dict(layers=layers))
        params = jax.eval_shape(net.init, jax.random.key(0))
        lengths.append(len(jax.make_jaxpr(net.apply)(params, *batch).eqns))
    assert lengths[0] == lengths[1]


def test_computing_again_changes_no_gradient(case):
    if case.name != "two_frame":
        pytest.skip("the same code in all of them")
    graph, inputs = made.batch(MOLECULES)
    params = jax.tree.map(jnp.float32, case.params)
    net = network(**SMALL | dict(remat=False))
    loss = lambda p: ((net.apply(p, graph, inputs) - 1) ** 2).sum()
    kept = jax.jit(jax.grad(loss))(params)
    _, (again, _) = case.both(params, graph, inputs, jnp.ones_like(inputs.x))
    scale = max(np.abs(a).max() for a in jax.tree.leaves(kept))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), again, kept)


def test_the_number_of_parameters_is_that_of_the_formulas():
    """The specification's 139,440 has 20 elements and messages with a spare channel of F:
    L (2 (F F + F)) more, in the last layers of both MLPs."""
    net = network(features=48, layers=3, radial=16, species=20)
    spare = 3 * 2 * (48 * 48 + 48)
    assert size(jax.eval_shape(net.init, jax.random.key(0))) == 139_440 - spare


def perceptron(p, x):
    y = x @ p["first"]["kernel"] + p["first"]["bias"]
    return (y / (1 + np.exp(-y))) @ p["last"]["kernel"] + p["last"]["bias"]


def normed(p, h):
    return (h - h.mean()) / np.sqrt(h.var() + 1e-6) * p["scale"] + p["bias"]


def by_loops(p, s, structure, scale, time, segment):
    """two_frame of one molecule, atom by atom and edge by edge, from section 7.1."""
    n, f, known = len(structure.numbers), s["features"], len(structure.positions) - 1
    states = structure.positions
    waves = lambda t: np.concatenate(
        [
            [
                g(2 * np.pi * 0.25 * 64 ** (k / 7) * t)
                for g in (np.sin, np.cos)
                for k in range(8)
            ],
            [t, t**2],
        ]
    )
    features = perceptron(p["atoms"]["time"], np.append(waves(time), waves(segment)))
    h = [p["atoms"]["embedding"][z] + features for z in structure.numbers]
    v = [
        sum(
            np.outer(
                (scale if r == 0 else 1.0) * (states[0, i] - states[1 + r, i]),
                p["atoms"]["states"][r],
            )
            for r in range(known)
        )
        for i in range(n)
    ]
    centres = [s["radius"] * k / (s["radial"] - 1) for k in range(s["radial"])]
    width = centres[1]
    for l in range(s["layers"]):
        q = jax.tree.map(lambda a, l=l: a[l], p["layers"])
        heard_h, heard_v = [np.zeros(f) for _ in h], [np.zeros((3, f)) for _ in h]
        for i in range(n):
            for j in set(range(n)) - {i}:
                d, u = [], []
                for x in states:
                    r = x[j] - x[i]
                    d.append(np.sqrt(r @ r + 1e-8))
                    u.append(r / (d[-1] + 1e-3))
                e = [np.exp(-((a - c) ** 2) / (2 * width**2)) for a in d for c in centres]
                e += [float(structure.bonds[i, j] == k) for k in range(5)]
                e += [d[0] - a for a in d[1:]]
                phi = perceptron(q["filters"], np.array(e))
                phi = phi * perceptron(q["sources"], normed(q["norm"], h[j]))
                m, alpha, *betas = np.split(phi, 3 + known)
                heard_h[i] += m
                heard_v[i] += alpha * v[j]
                for beta, direction in zip(betas, u, strict=True):
                    heard_v[i] += np.outer(direction, beta)
        for i in range(n):
            h[i] = h[i] + heard_h[i] / np.sqrt(s["neighbours"])
            v[i] = v[i] + heard_v[i] / np.sqrt(s["neighbours"])
            unit = v[i] / np.sqrt(1 + (v[i] ** 2).sum(0).mean())
            a, b = np.split(q["update"]["mix"]["kernel"], 2, 1)
            first, second = unit @ a, unit @ b
            long = np.sqrt((second**2).sum(0) + 1e-8)
            own = np.append(normed(q["update"]["norm"], h[i]), long)
            p1, p2, p3 = np.split(perceptron(q["update"]["gates"], own), 3)
            h[i] = h[i] + p1 + p2 * (first * second).sum(0)
            v[i] = v[i] + p3 * first
    out = []
    for i in range(n):
        g = h[i] @ p["head"]["gate"]["kernel"] + p["head"]["gate"]["bias"]
        out.append(v[i] @ (g / (1 + np.exp(-g)) * p["head"]["out"]))
    return np.array(out) - np.mean(out, 0)


def test_two_frame_is_its_formulas():
    settings = SMALL | dict(known=2, chained=True, layers=3)
    net = network(**settings)
    structures = [made.structure(k, n, states=3) for k, n in ((20, 5), (21, 4))]
    with jax.enable_x64(True):
        params = drawn(net)
        graph, inputs = made.batch(structures, dtype=np.float64)
        found = np.asarray(jax.jit(net.apply)(jax.tree.map(jnp.asarray, params), graph, inputs))
    rows = [found[:5], found[5:9]]
    for g, (s, row) in enumerate(zip(structures, rows, strict=True)):
        numbers = [float(getattr(inputs, k)[g]) for k in ("scale", "time", "segment")]
        expected = by_loops(params, settings, s, *numbers)
        assert np.abs(expected).max() > 0.05
        np.testing.assert_allclose(row, expected, atol=1e-10 * np.abs(expected).max())


def test_periodic_is_two_frame_with_an_envelope():
    batch = made.batch([SLAB])
    traced = []
    for make in (partial(network, "periodic"), partial(network, envelope=True), network):
        net = make(**SMALL)
        params = jax.eval_shape(net.init, jax.random.key(0))
        traced.append(str(jax.make_jaxpr(net.apply)(params, *batch)))
    assert traced[0] == traced[1] != traced[2]


def test_attention_is_a_softmax_with_a_silent_neighbour():
    from geometry.networks.equi_transformer import attention

    graph, _ = made.batch(MOLECULES)
    rng = np.random.default_rng(0)
    logits, fade = 40 * rng.normal(size=(110, 2)), rng.uniform(size=110)
    with jax.enable_x64(True):
        found = np.asarray(jax.jit(attention)(graph, jnp.asarray(fade), jnp.asarray(logits)))
    for e in range(int(graph.edge_mask.sum())):
        same = np.asarray(graph.receivers) == int(graph.receivers[e])
        total = np.exp(0) + (fade[same, None] * np.exp(logits[same])).sum(0)
        np.testing.assert_allclose(found[e], fade[e] * np.exp(logits[e]) / total, rtol=1e-9)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(name="two_frames"), "nearest: two_frame"),
        (dict(feature=3), "nearest: features"),
        (dict(features=0), "config.network.features is 0"),
        (dict(layers=True), "config.network.layers is True"),
        (dict(radial=1), "whole number from 2 up"),
        (dict(radius=0.0), "config.network.radius"),
        (dict(neighbours=float("inf")), "config.network.neighbours"),
        (dict(dtype="float16"), "float32, bfloat16"),
        (dict(name="equi_transformer", features=10, heads=4), "a divisor of 10 features"),
        (dict(name="tensor_product", degree=3), "config.network.degree is 3"),
        (dict(name="tensor_product", features=6), "a multiple of 4"),
    ],
)
def test_what_cannot_be_is_told(fields, words):
    with pytest.raises(UserError, match=words):
        network(**fields)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "e3nn_jax", None)
    with pytest.raises(UserError, match="uv sync --extra e3nn"):
        network("tensor_product")
