"""Preconditioning, pinned samples and losses against least squares, moments and loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from geometry.graphs import Graph, noise, project
from geometry.matching import (
    OUTPUTS,
    Sums,
    denoised,
    from_target,
    loss,
    objective,
    output,
    pinned,
    scales,
    sums,
    times,
    to_target,
    weight,
)
from geometry.network import Network
from geometry.reference import reference, scaled

REFERENCES = {
    "brownian": reference("brownian", sigma=0.6, end=1.5),
    "ve": reference("ve", sigma_min=0.1, sigma_max=2.0),
    "vp": reference("vp", beta_min=0.1, beta_max=6.0),
}


def graph_of(sizes=(3, 4, 5), fixed=(9, 10), anchored=(2,)):
    """All pairs of a few structures, then two atoms and three edges of padding."""
    owner = np.repeat(np.arange(len(sizes) + 1), [*sizes, 2])
    atoms, graphs = len(owner), len(sizes) + 1
    mask = (owner < len(sizes)).astype(np.float32)
    free = mask.copy()
    free[list(fixed)] = 0
    pairs = [
        (j, i)
        for i in range(atoms)
        for j in range(atoms)
        if i != j and owner[i] == owner[j] and mask[i]
    ]
    pairs += [(atoms - 1, atoms - 1)] * 3
    senders, receivers = np.array(pairs).T
    real = (receivers < atoms - 1).astype(np.float32)
    shifts = np.zeros((len(pairs), 3))
    shifts[5] = (0.5, -1.0, 2.0)
    return Graph(
        numbers=jnp.asarray(6 * mask, jnp.int32),
        mask=jnp.asarray(mask),
        free=jnp.asarray(free),
        owner=jnp.asarray(owner, jnp.int32),
        index=jnp.asarray(np.concatenate([np.arange(n) for n in (*sizes, 2)]), jnp.int32),
        senders=jnp.asarray(senders, jnp.int32),
        receivers=jnp.asarray(receivers, jnp.int32),
        bonds=jnp.asarray(np.arange(len(pairs)) % 3, jnp.int32),
        shifts=jnp.asarray(shifts, jnp.float32),
        edge_mask=jnp.asarray(real),
        centred=jnp.asarray([float(k not in anchored) for k in range(graphs)], jnp.float32),
        ids=jnp.asarray([*range(7, 7 + len(sizes)), -1], jnp.int32),
    )


def ends(graph, seed=0):
    """Two states of which fixed atoms have one position, padding 0; molecules centred."""
    rng = np.random.default_rng(seed)
    start, step = (jnp.asarray(rng.normal(size=(14, 3)), jnp.float32) for _ in range(2))
    moved = project(graph, start)
    start = jnp.where(graph.centred[graph.owner][:, None] > 0, moved, start)
    start = start * graph.mask[:, None]
    return start, start + project(graph, step)


GRAPH = graph_of()
START, END = ends(GRAPH)
T = jnp.asarray([0.0, 0.4, 0.8, 0.0])
SILENT = Network(lambda key: {}, lambda params, graph, inputs: jnp.zeros_like(inputs.x))


def speaking(params, graph, inputs):
    """Something that hears all of its inputs."""
    said = inputs.scale * (1 + inputs.time + 2 * inputs.segment)
    far = inputs.x - inputs.known.mean(0)
    return project(graph, params * said[graph.owner][:, None] * jnp.sin(far))


SPEAKING = Network(lambda key: jnp.float32(0.3), speaking)


@pytest.mark.parametrize(("end", "sigma", "s2"), [(1.0, 0.25, 0.047), (2.0, 0.6, 0.3)])
def test_brownian_preconditioning_is_section_6(end, sigma, s2):
    process = reference("brownian", sigma=sigma, end=end)
    t = np.array([1e-3, 0.1, 0.5, 0.9, 0.999]) * end
    tau, c = t / end, sigma**2 * t * (end - t) / end
    q = tau**2 * s2 + c
    found = scales(process, jnp.asarray(t, jnp.float32), s2)
    np.testing.assert_allclose(found.skip, tau * s2 / q, rtol=1e-4)
    np.testing.assert_allclose(found.out, np.sqrt(s2 * c / q), rtol=1e-4)
    np.testing.assert_allclose(found.into, 1 / np.sqrt(q), rtol=1e-4)
    first = scales(process, jnp.float32(0.0), s2)
    assert float(first.skip) == pytest.approx(s2 / (sigma**2 * end), rel=1e-6)
    assert float(first.out) == pytest.approx(s2**0.5, rel=1e-6)
    assert np.isfinite(first.into)
    last = scales(process, jnp.float32(end), s2)
    assert (float(last.skip), float(last.out)) == (1.0, 0.0)
    for part in range(3):
        slope = jax.grad(lambda t, part=part: scales(process, t, s2)[part])
        assert np.isfinite(slope(jnp.float32(0.0)))


@pytest.mark.parametrize("name", REFERENCES)
def test_preconditioning_is_the_best_linear_estimate(name):
    """Of simulated bridges: the process is integrated step by step, then pinned by hand."""
    process, s2, n = REFERENCES[name], 0.8, 200_000
    rng = np.random.default_rng(1)
    start = rng.normal(size=n)
    u = np.sqrt(s2) * rng.normal(size=n)
    for share in (0.15, 0.7):
        t = share * process.end
        # R_t and R_T from the start, unpinned; then moved to the wanted end.
        free_t = process.rho(0, t) * start + np.sqrt(process.v(0, t)) * rng.normal(size=n)
        later = np.sqrt(process.v(t, process.end)) * rng.normal(size=n)
        free_end = process.rho(t, process.end) * free_t + later
        gain = process.v(0, t) * process.rho(t, process.end) / process.v(0, process.end)
        x = free_t + gain * (start + u - free_end)
        fit, *_ = np.linalg.lstsq(np.stack([x, start], -1), u, rcond=None)
        left = u - fit[0] * x - fit[1] * start
        y = x + fit[1] / fit[0] * start
        found = scales(process, jnp.float32(t), s2)
        error = 4 * left.std() / (y.std() * n**0.5)
        assert float(found.skip) == pytest.approx(fit[0], abs=error)
        assert float(found.out) == pytest.approx(left.std(), rel=4 / n**0.5)
        assert float(found.into) == pytest.approx(1 / y.std(), rel=4 / n**0.5)


def test_weight_is_the_inverse_square_error_down_to_a_floor():
    out = jnp.asarray([0.2, 0.01, 1e-4])
    np.testing.assert_allclose(weight(out, 0.04), [25.0, 1e4, 1 / 0.004**2], rtol=1e-5)
    np.testing.assert_allclose(weight(out, 0.04, 0.1), [25, 2500, 2500], rtol=1e-5)


def test_times_take_every_stratum_once():
    real = np.ones((4, 6), np.float32)
    real[:, -1] = 0
    real[2, 3:] = 0
    draw = jax.jit(lambda key: times(key, jnp.asarray(real), 2.0))
    t = np.asarray([draw(jax.random.key(k)) for k in range(200)])
    assert (t[:, real == 0] == 0).all()
    n = int(real.sum())
    strata = np.sort(t[:, real > 0] / (0.999 * 2.0) * n, -1)
    assert (np.floor(strata + 1e-5) == np.arange(n)).all()
    # One shift for all of a step, uniform over steps.
    shift = strata - np.arange(n)
    np.testing.assert_allclose(shift - shift[:, :1], 0, atol=2e-5)
    assert shift[:, 0].mean() == pytest.approx(0.5, abs=4 / np.sqrt(12 * 200))
    # No place has a stratum of its own.
    place = t[:, real > 0].mean(0)
    assert np.abs(place - 0.999).max() < 4.5 * 2.0 / np.sqrt(12 * 200)
    assert t.max() < 2.0


@pytest.mark.parametrize("name", REFERENCES)
def test_pinned_samples_have_the_pinned_law(name):
    process = REFERENCES[name]
    a = process.v(T, process.end) * process.rho(0.0, T) / process.v(0.0, process.end)
    b = process.v(0.0, T) * process.rho(T, process.end) / process.v(0.0, process.end)
    c = process.v(0.0, T) * process.v(T, process.end) / process.v(0.0, process.end)
    a, b, c = (np.asarray(v)[np.asarray(GRAPH.owner)][:, None] for v in (a, b, c))
    z = noise(jax.random.key(3), GRAPH)
    x = pinned(GRAPH, process, T, START, END, z)
    free = np.asarray(GRAPH.free) > 0
    expected = a * START + b * END + np.sqrt(c) * z
    np.testing.assert_allclose(x[free], expected[free], atol=3e-6)
    np.testing.assert_array_equal(x[~free], START[~free])
    first = np.asarray(GRAPH.owner) == 0
    np.testing.assert_allclose(x[first], START[first], atol=1e-7)  # t = 0
    assert x.dtype == jnp.float32


@pytest.mark.parametrize("name", REFERENCES)
def test_a_silent_network_gives_the_linear_estimate(name):
    process, s2 = REFERENCES[name], 0.5
    x = pinned(GRAPH, process, T, START, END, noise(jax.random.key(4), GRAPH))
    d = denoised(SILENT, process, s2, {}, GRAPH, x, START[None], T)
    a, b, _ = (v[GRAPH.owner][:, None] for v in jnp.broadcast_arrays(*_coefs(process)))
    skip = scales(process, T, s2).skip[GRAPH.owner][:, None]
    expected = START + project(GRAPH, skip * (x - (a + b) * START))
    np.testing.assert_allclose(d, expected, atol=2e-6)
    fixed = np.asarray(GRAPH.free) == 0
    np.testing.assert_array_equal(d[fixed], START[fixed])


def _coefs(process):
    whole = process.v(0.0, process.end)
    return (
        process.v(T, process.end) * process.rho(0.0, T) / whole,
        process.v(0.0, T) * process.rho(T, process.end) / whole,
        T,
    )


def test_the_network_hears_its_inputs_and_is_scaled():
    process, s2 = REFERENCES["brownian"], 0.5
    known = jnp.stack([START, END])
    x = START + 0.1
    d = denoised(SPEAKING, process, s2, 0.3, GRAPH, x, known, 0.45, 0.25)
    scale = scales(process, jnp.float32(0.45), s2)
    said = scale.into * (1 + 0.45 / 1.5 + 2 * 0.25)
    f = 0.3 * said * np.sin(x - (START + END) / 2)
    expected = START + project(GRAPH, scale.skip * (x - START) + scale.out * f)
    np.testing.assert_allclose(d, expected, atol=2e-6)
    each = jnp.full(4, 0.45)
    again = denoised(SPEAKING, process, s2, 0.3, GRAPH, x, known, each, jnp.full(4, 0.25))
    np.testing.assert_allclose(d, again, atol=1e-6)


def test_noise_of_each_structure_is_as_if_it_were_alone():
    """Chains: sigma and s^2 are arrays over the structures."""
    factors, s2 = np.array([0.3, 1.0, 2.0, 1.0]), np.array([0.1, 0.2, 0.3, 1.0])
    unit = REFERENCES["vp"]
    z = noise(jax.random.key(5), GRAPH)
    call = jax.jit(
        lambda factor, s2: (
            pinned(GRAPH, scaled(unit, factor), T, START, END, z),
            denoised(SPEAKING, scaled(unit, factor), s2, 0.3, GRAPH, END, START[None], T),
        )
    )
    together = call(jnp.asarray(factors), jnp.asarray(s2))
    for k in range(3):
        alone = call(jnp.full(4, factors[k]), jnp.full(4, s2[k]))
        own = np.asarray(GRAPH.owner) == k
        for u, v in zip(together, alone, strict=True):
            np.testing.assert_allclose(u[own], v[own], atol=1e-6)


def test_padding_decides_nothing():
    z = noise(jax.random.key(6), GRAPH)

    @jax.jit
    def call(dirt):
        known, end = START[None] + dirt, END - dirt
        return objective(
            SPEAKING, REFERENCES["vp"], 0.5, 0.3, GRAPH, known, end, T, z, auxiliary=True
        )

    dirt = jnp.where(GRAPH.mask[:, None] > 0, 0.0, 1e6)
    np.testing.assert_array_equal(call(0 * dirt), call(dirt))
    nothing = jnp.where(GRAPH.mask[:, None] > 0, END, jnp.nan)
    assert np.isfinite(sums(GRAPH, START, nothing, jnp.ones(4), True)).all()


def test_the_sums_are_those_of_loops():
    w = np.array([0.5, 2.0, 3.0, 7.0])
    found = sums(GRAPH, START, END, jnp.asarray(w, jnp.float32), auxiliary=True)
    start, end = np.float64(START), np.float64(END)
    expected = dict.fromkeys(Sums._fields, 0.0)
    for i in range(14):
        if GRAPH.free[i]:
            expected["error"] += w[GRAPH.owner[i]] * ((start[i] - end[i]) ** 2).sum()
            expected["coordinates"] += 3
    for e in range(len(GRAPH.senders)):
        if GRAPH.edge_mask[e]:
            j, i, shift = GRAPH.senders[e], GRAPH.receivers[e], np.float64(GRAPH.shifts[e])
            off = [np.linalg.norm(x[j] + shift - x[i]) for x in (start, end)]
            bonded = bool(GRAPH.bonds[e])
            for name, count in (("pair", True), ("bond", bonded)):
                expected[name] += count * abs(off[0] - off[1])
                expected[name + "s"] += count
    for name, value in expected.items():
        assert float(getattr(found, name)) == pytest.approx(value, rel=1e-5), name
    assert float(sums(GRAPH, START, END, jnp.asarray(w, jnp.float32)).pairs) == 0
    whole = expected["error"] / expected["coordinates"]
    extra = 0.1 * expected["pair"] / expected["pairs"]
    extra += 0.2 * expected["bond"] / expected["bonds"]
    assert float(loss(found)) == pytest.approx(whole, rel=1e-5)
    assert float(loss(found, 0.1, 0.2)) == pytest.approx(whole + extra, rel=1e-5)


def test_packs_are_summed_before_dividing():
    one, two = (
        Sums(*jnp.asarray([2.0, 6, 0, 0, 1, 1])),
        Sums(*jnp.asarray([30.0, 10, 0, 0, 1, 3])),
    )
    packs = jax.tree.map(lambda *parts: jnp.stack(parts), one, two)
    assert float(loss(packs, 0.0, 1.0)) == pytest.approx(32 / 16 + 2 / 4)


def test_a_fresh_network_has_a_loss_of_one_at_every_time():
    """Of displacements of variance s^2: the weight is the inverse of the error that is left."""
    graph, s2, n = graph_of(fixed=(), anchored=(0, 1, 2)), 0.3, 300
    for process in REFERENCES.values():

        def one(key, t, process=process):
            u, start, z = (noise(jax.random.fold_in(key, k), graph) for k in range(3))
            end = start + s2**0.5 * u
            at = jnp.full(4, t)
            return objective(SILENT, process, s2, {}, graph, start[None], end, at, z)

        call = jax.jit(lambda keys, t: loss(jax.vmap(one, (0, None))(keys, t)))
        for share in (0.0, 0.1, 0.95):
            keys = jax.random.split(jax.random.key(int(100 * share)), n)
            value = float(call(keys, jnp.float32(share * process.end)))
            assert value == pytest.approx(1.0, abs=4 * np.sqrt(2 / (36 * n)))


def test_gradients_are_finite_where_atoms_coincide_and_at_the_start():
    process = REFERENCES["brownian"]
    same = START.at[1].set(START[0])

    z = noise(jax.random.key(7), GRAPH)

    def total(params):
        at = SPEAKING, process, 0.5, params, GRAPH, same[None], same, jnp.zeros(4), z
        return loss(objective(*at, auxiliary=True), 1.0, 1.0)

    assert np.isfinite(jax.jit(jax.grad(total))(jnp.float32(0.3)))
    distances = lambda d: loss(sums(GRAPH, d, END, jnp.ones(4), True), 1.0, 1.0)
    assert np.isfinite(jax.jit(jax.grad(distances))(same)).all()


@pytest.mark.parametrize("name", REFERENCES)
def test_all_outputs_say_the_same_drift(name):
    process, t = REFERENCES[name], 0.37
    rng = np.random.default_rng(2)
    d, x, start = rng.normal(size=(3, 5, 3))
    drift = from_target("drift", process, d, x, start, t)
    for said in OUTPUTS:
        value = from_target(said, process, d, x, start, t)
        back = to_target(said, process, value, x, start, t)
        np.testing.assert_allclose(back, d, atol=1e-12)
        again = from_target("drift", process, back, x, start, t)
        np.testing.assert_allclose(again, drift, atol=1e-11)
        # The same in float32, as a network would say it.
        small = [jnp.asarray(v, jnp.float32) for v in (value, x, start)]
        np.testing.assert_allclose(to_target(said, process, *small, t), d, atol=2e-5)


def test_brownian_outputs_are_those_of_section_2():
    sigma, end, t = 0.6, 1.5, 0.5
    d, x, start = np.random.default_rng(3).normal(size=(3, 5, 3))
    process = REFERENCES["brownian"]
    say = lambda name: from_target(name, process, d, x, start, t)
    c = sigma**2 * t * (end - t) / end
    mean = (1 - t / end) * start + t / end * d
    np.testing.assert_allclose(say("displacement"), d - start)
    np.testing.assert_allclose(say("velocity"), (d - x) / (end - t))
    np.testing.assert_allclose(say("noise"), (mean - x) / c**0.5)
    np.testing.assert_allclose(say("score"), (d - x) / (sigma**2 * (end - t)))
    np.testing.assert_allclose(say("drift"), (d - x) / (end - t))
    flow = (d - x) / (end - t) - sigma**2 / 2 * (mean - x) / c
    np.testing.assert_allclose(say("flow"), flow, atol=1e-13)


def test_unknown_outputs_are_named():
    with pytest.raises(UserError, match=r"output is 'energy'.*target, displacement"):
        output("energy", REFERENCES["vp"], 0.5)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        start, end = (jnp.asarray(v, jnp.float64) for v in (START, END))
        t = jnp.asarray(T, jnp.float64)
        z = noise(jax.random.key(8), GRAPH, jnp.float64)
        process = REFERENCES["vp"]
        known, of = start[None], jax.eval_shape
        x = of(lambda: pinned(GRAPH, process, t, start, end, z))
        d = of(lambda: denoised(SILENT, process, 0.5, {}, GRAPH, end, known, t))
        assert x.dtype == d.dtype == jnp.float64
