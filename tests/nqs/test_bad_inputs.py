"""What a config must not hold is refused in one sentence; legal oddities run."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import config as configs
from common.errors import UserError
from nqs import hubbard
from nqs.sampler import scatter
from tests.nqs.clusters import config

BAD = [
    # field, value, what the sentence says is allowed
    ("lattice.Lx", "0", "a whole number from 1 up"),
    ("lattice.Ly", "-3", "a whole number from 1 up"),
    ("lattice.Lx", "2.5", "a whole number"),
    ("lattice.bc_x", "helical", "one of open, periodic, antiperiodic"),
    ("lattice.bc_y", "PBC", "one of open, periodic, antiperiodic"),
    ("lattice.bc_y", "antiperiodic", "open or periodic where the lattice is two sites wide"),
    ("model.n_up", "7", "a whole number from 0 to 6"),
    ("model.n_dn", "-1", "a whole number from 0 to 6"),
    ("model.n_up", "1.5", "a whole number"),
    ("model.n_dn", "True", "a whole number"),
    ("model.U", "nan", "a finite number"),
    ("model.U", "inf", "a finite number"),
    ("model.t", "nan", "a finite number"),
    ("model.tp", "-inf", "a finite number"),
    ("model.U", "strong", "a number"),
    ("pinning.h", "nan", "a finite number"),
    ("pinning.pattern", "checkers", "one of none, neel, stripe"),
    ("pinning.period", "0", "a whole number from 1 up"),
    ("ansatz.name", "rbm", "one of transformer, nnb, tensor, slater"),
    ("ansatz.n_heads", "3", "a divisor of d_model"),
    ("ansatz.n_heads", "0", "a divisor of d_model"),
    ("ansatz.n_layers", "-1", "a whole number from 0 up"),
    ("ansatz.n_det", "0", "a whole number from 1 up"),
    ("ansatz.d_model", "0", "a whole number from 1 up"),
    ("ansatz.d_model", "-8", "a whole number from 1 up"),
    ("sampler.n_walkers", "1", "at least 2"),
    ("sampler.n_walkers", "0", "at least 2"),
    ("sampler.n_walkers", "12", "a multiple of the 8 devices"),
    ("sampler.sweep_factor", "0", "above 0"),
    ("sampler.sweep_factor", "nan", "above 0"),
    ("sampler.sweep_factor", "inf", "above 0"),
    ("sampler.thermalize", "-1", "0 or more"),
    ("eloc.chunk", "0", "at least 1"),
    ("eloc.score_chunk", "-2", "at least 1"),
    ("eloc.clip", "-1.0", "a number from 0"),
    ("eloc.clip", "nan", "a number from 0"),
    ("eloc.clip", "inf", "number from 0"),
    ("eval.blocks", "4", "at least 8"),
    ("eval.sweeps", "0", "at least 1"),
    ("eval.thermalize", "-1", "0 or more"),
    ("optim.name", "sr", "one of march, spring, minsr, adam, sgd"),
    ("optim.damping", "0.0", "above 0"),
    ("optim.damping", "-0.001", "above 0"),
    ("optim.damping", "nan", "above 0"),
    ("optim.mu", "1.0", "at least 0 and below 1"),
    ("optim.mu", "-0.1", "at least 0 and below 1"),
    ("optim.beta", "1.0", "at least 0 and below 1"),
    ("optim.beta", "-0.5", "at least 0 and below 1"),
    ("optim.eps", "-1.0", "at least 0"),
    ("optim.max_norm", "0.0", "above 0"),
    ("optim.norm_mode", "clip", "'cap' or 'fixed'"),
    ("optim.decay_scale", "0.0", "above 0"),
    ("optim.decay_start", "-1", "at least 0"),
    ("optim.warmup", "-1", "at least 0"),
    ("optim.difference", "both", "'raw' or 'momentum'"),
    ("optim.decay", "none", "'sum' or 'ema'"),
    ("optim.preconditioner", "cube", "'sqrt' or 'quarter'"),
    ("precision.net", "bfloat16", "float32 or float64"),
    ("precision.linalg", "double", "float32 or float64"),
    ("precision.determinants", "bfloat16", "float32 or float64"),
    ("mesh.data", "9", "from 1 to 8"),
    ("mesh.model", "3", "a divisor of the 8 devices"),
]


def make_with(field, value):
    made = config()
    configs.override(made, field, value)
    return hubbard.make(made)


def refusal(function, *arguments):
    """The sentence of the `UserError` that it raises."""
    with jax.enable_x64(True), pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


def is_one_sentence(text):
    return text.startswith("config.") and text.endswith(".") and "\n" not in text


@pytest.mark.parametrize(("field", "value", "allowed"), BAD, ids=lambda a: str(a)[:24])
def test_bad_values_are_refused_by_name_value_and_remedy(field, value, allowed):
    sentence = refusal(make_with, field, value)
    assert is_one_sentence(sentence)
    assert re.match(rf"config\.{re.escape(field)} is '?{re.escape(value)}", sentence)
    assert allowed in sentence.partition(", but must be ")[2]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (dict(lattice=dict(Lx=1, bc_x="periodic")), "lattice.bc_x"),
        (dict(lattice=dict(Ly=1, bc_y="antiperiodic")), "lattice.bc_y"),
        (dict(model=dict(n_up=0, n_dn=0)), "model.n_up"),
        (dict(pinning=dict(h=0.05)), "pinning.pattern"),
        (dict(pinning=dict(pattern="neel")), "pinning.h"),
        (dict(ansatz=dict(name="nnb", mlp_hidden=0)), "ansatz.mlp_hidden"),
        (dict(ansatz=dict(name="nnb", mlp_layers=0)), "ansatz.mlp_layers"),
        (dict(optim=dict(name="adam", learning_rate=0.0)), "optim.learning_rate"),
        (dict(optim=dict(name="adam", learning_rate=float("nan"))), "optim.learning_rate"),
    ],
    ids=lambda a: str(a)[:48],
)
def test_bad_combinations_are_refused(changes, field):
    sentence = refusal(hubbard.make, config(**changes))
    assert is_one_sentence(sentence)
    assert sentence.startswith(f"config.{field} is ")
    assert ", but must be " in sentence


FIELDS = ("net", "determinants", "linalg")


@pytest.mark.parametrize("field", FIELDS)
def test_float64_without_x64_is_refused(field):
    made = config(precision={f: "float64" if f == field else "float32" for f in FIELDS})
    with pytest.raises(UserError, match=rf"config\.precision\.{field} is 'float64'.*x64"):
        hubbard.make(made)


@pytest.mark.parametrize(
    "changes",
    [dict(lattice=dict(Lx=2, bc_x="periodic")), dict(lattice=dict(bc_y="periodic"))],
    ids=str,
)
def test_two_periodic_sites_warn(changes):
    with jax.enable_x64(True), pytest.warns(UserWarning, match="every bond counts once"):
        hubbard.make(config(**changes))


ODD = {
    "attractive, in a field, a full spin": dict(
        model=dict(U=-4.0, n_up=6), pinning=dict(h=0.1, pattern="stripe", period=2)
    ),
    "no up electrons, no hopping": dict(model=dict(n_up=0, t=0.0)),
    "a full band": dict(model=dict(n_up=6, n_dn=6)),
    "a chain, no clipping, no warm-up, chunks that do not fit": dict(
        lattice=dict(Lx=6, Ly=1),
        eloc=dict(clip=0.0, chunk=7, score_chunk=5),
        optim=dict(warmup=0),
    ),
    "one site": dict(
        lattice=dict(Lx=1, Ly=1, bc_x="open"),
        model=dict(n_up=1, n_dn=1),
        ansatz=dict(name="transformer"),
    ),
    "no layers": dict(ansatz=dict(name="transformer", n_layers=0)),
}


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_legal_oddities_take_a_finite_step(changes):
    c = config(**(dict(ansatz=dict(name="tensor")) | changes))
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        experiment = hubbard.make(c)

        @jax.jit
        def run(key):
            start, key = jax.random.split(key)
            return experiment.step(experiment.init(start), (), key)

        after, values = jax.device_get(run(jax.random.key(0)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, values)))
    assert values["bad_samples"] == values["skipped"] == 0
    n_up, n_dn = (part.sum(axis=1) for part in np.split(after.walkers, 2, axis=1))
    assert (n_up == c.model.n_up).all()
    assert (n_dn == c.model.n_dn).all()
    if c.model.n_up == c.model.n_dn == c.lattice.Lx * c.lattice.Ly:
        assert values["acceptance"] == 0
        assert values["energy"] == pytest.approx(c.model.U * c.model.n_up, rel=1e-12)
        assert values["variance"] == pytest.approx(0, abs=1e-12)
    else:
        assert values["acceptance"] > 0


def test_samples_on_a_node_are_counted_and_spoil_nothing():
    """With a row of orbitals gone, every walker on that mode is on a node."""
    c = config(ansatz=dict(name="slater", n_det=1), sampler=dict(sweep_factor=0.1))
    with jax.enable_x64(True):
        experiment = hubbard.make(c)
        state = jax.jit(experiment.init)(jax.random.key(0))
        orbitals = state.params["orbitals"].at[:, 0].set(0.0)
        x = np.zeros((c.sampler.n_walkers, 12), np.int8)
        x[:, [0, 1, 6, 7]] = 1  # Those that move leave mode 0, or stay on the node.
        state = state._replace(params={"orbitals": orbitals}, walkers=jnp.asarray(x))
        after, values = jax.jit(experiment.step)(state, (), jax.random.key(1))
        state, after, values = jax.device_get((state, after, values))
    nodes = after.walkers[:, 0] == 1
    assert 0 < nodes.sum() < len(nodes)
    assert values["bad_samples"] == nodes.sum()
    assert values["acceptance"] == 1  # A walker on a node takes whatever it is offered.
    assert np.isfinite(values["energy"])
    # Too many are bad: there is no step, and neither optimizer nor parameters hold NaN.
    assert values["update_norm"] == 0
    assert values["skipped"] == after.skipped == 1
    np.testing.assert_array_equal(after.params["orbitals"], state.params["orbitals"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def a_state_of(c):
    """Its experiment, and a state with proper walkers and the shapes of everything else."""
    experiment = hubbard.make(c)
    shapes = jax.eval_shape(experiment.init, jax.random.key(0))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sites, model = c.lattice.Lx * c.lattice.Ly, c.model
    key = jax.random.key(1)
    walkers = scatter(key, c.sampler.n_walkers, sites, model.n_up, model.n_dn)
    return experiment, state._replace(walkers=walkers)


@pytest.mark.parametrize(
    "changes",
    [
        dict(lattice=dict(Lx=4)),
        dict(model=dict(n_up=3)),
        dict(model=dict(n_up=3, n_dn=1)),  # As many electrons, but in another sector.
        dict(ansatz=dict(d_model=16)),
        dict(ansatz=dict(name="tensor")),
        dict(sampler=dict(n_walkers=64)),
    ],
    ids=str,
)
def test_weights_of_another_cluster_or_network_are_not_adopted(changes):
    with jax.enable_x64(True):
        here, fresh = a_state_of(config(init_from="runs/other"))
        _, donor = a_state_of(config(**changes))
    sentence = refusal(here.adopt, fresh, donor)
    assert sentence.startswith("config.init_from is 'runs/other', but must be a run with")


def test_weights_of_another_interaction_are_adopted_and_the_optimizer_starts_anew():
    with jax.enable_x64(True):
        here, fresh = a_state_of(config(init_from="runs/other"))
        _, donor = a_state_of(config(model=dict(U=4.0), optim=dict(name="adam")))
        donor = donor._replace(params=jax.tree.map(lambda a: a + 1, donor.params))
        got = here.adopt(fresh, donor)
    assert got.opt is fresh.opt
    assert got.params is donor.params
    assert got.walkers is donor.walkers
