"""Runs of bridges: learning, devices, restarts, the commands, refusals."""

import json

import chex
import jax
import numpy as np
import pytest

from common import config as configs
from common import mesh as meshes
from common import runner
from common.errors import UserError
from geometry import actions, evaluation, figures, parts, report
from geometry.data import structures

KINDS = ("bridge", "chain", "direct")


def variant(kind, **changes):
    config = configs.load("configs/bridge.py:test")
    made = runner.variants(config)[f"{kind}-seed0"]
    configs.apply(made, changes)
    if "mesh" not in changes:
        made.mesh.data = 1
    return made


MADE = {}


def compiled(name, config):
    """The experiment of a config and its programs, compiled once."""
    if name not in MADE:
        experiment = runner.make(config)
        MADE[name] = experiment, jax.jit(experiment.init), jax.jit(experiment.step)
    return MADE[name]


def play(config, steps, state=None, first=0):
    """The state after some steps, their losses, and the experiment."""
    experiment, init, step = compiled(json.dumps(configs.to_dict(config)), config)
    mesh, losses = meshes.make(**config.mesh), []
    with jax.set_mesh(mesh):
        state = init(jax.random.key(0)) if state is None else state
        for i in range(first, first + steps):
            batch = meshes.to_devices(experiment.batch(i), mesh)
            key = jax.random.fold_in(jax.random.key(7), i)
            state, values = step(state, batch, key)
            losses.append(float(values["loss"]))
    return state, losses, experiment


@pytest.fixture(scope="module", params=KINDS)
def trained(request):
    config = variant(request.param)
    return config, *play(config, 4)


def test_a_fresh_network_has_a_loss_near_one(trained):
    _, _, losses, _ = trained
    assert 0.3 < losses[0] < 3


def test_going_on_is_bitwise_the_same(trained):
    config, state, losses, _ = trained
    half, first, _ = play(config, 2)
    again, rest, _ = play(config, 2, half, 2)
    assert first + rest == losses
    chex.assert_trees_all_equal(again, state)


def test_metrics_of_held_out_structures(trained):
    config, state, _, experiment = trained
    found = experiment.evaluate(state, jax.random.key(0))
    calls = {"bridge": [1, 2], "chain": [2], "direct": [1]}[config.kind]
    assert found["calls"].tolist() == calls
    records = evaluation.held_out(config, parts.parts_of(config))
    assert len(records) == 4
    for name in evaluation.POINT:
        assert np.isfinite(found[name]).all()
        assert found[name].shape == (len(calls),)
    assert abs(found["d_mae"][-1] - found["identity_d_mae"]) < 0.1
    if config.kind == "bridge":
        assert found["samples_best_rmsd"] <= found["samples_mean_rmsd"]
        assert found["samples_diversity"] > 0


def test_learning_beats_the_start():
    """200 steps of a small network: the loss falls, and so do the errors of seen structures."""
    config = variant("bridge", steps=200, network=dict(features=16, layers=2, radial=8))
    configs.apply(config, dict(optim=dict(learning_rate=5e-3, warmup=10), ema=0.9))
    configs.apply(config, dict(eval=dict(split="train", samples=0, limit=16, calls=(2,))))
    state, losses, experiment = play(config, 200)
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:5])
    found = experiment.evaluate(state, jax.random.key(0))
    assert found["d_mae"][0] < 0.95 * found["identity_d_mae"]


@pytest.mark.parametrize("kind", ["bridge", "chain"])
def test_eight_devices_are_one(kind):
    def end(devices):
        config = variant(kind, packs=8, batch_size=16, mesh=dict(data=devices, model=1))
        return play(config, 3)[:2]

    (one, losses), (eight, more) = end(1), end(8)
    np.testing.assert_allclose(more, losses, rtol=1e-5)
    chex.assert_trees_all_close(eight.params, one.params, atol=2e-4)


def test_predictions_do_not_depend_on_company(trained):
    """A structure's end is the same alone and among others, up to rounding."""
    config, state, _, _ = trained
    made = parts.parts_of(config)
    records = evaluation.held_out(config, made)
    params, key = evaluation.judged_params(state), jax.random.key(1)
    reach = parts.dataset.reach_of(config)
    together = parts.predict(made, params, records, reach, made.sampler, key)
    alone = parts.predict(made, params, records[:1], reach, made.sampler, key)
    np.testing.assert_allclose(together[0], alone[0], atol=1e-5)
    assert together[0].shape[-2:] == records[0].start.shape
    path = parts.predict(made, params, records, reach, made.sampler, key, path=True)
    np.testing.assert_allclose(path[0][0], records[0].start, atol=1e-5)
    last = together[0][-1] if config.kind == "chain" else together[0]
    np.testing.assert_allclose(path[0][-1], last, atol=1e-5)


def test_a_users_file_is_predicted(trained, tmp_path):
    config, state, _, _ = trained
    (tmp_path / "mine.smi").write_text("CCO ethanol\nCC(=O)N\n")
    run = runner.Run("main", config, [], {}, lambda: state, str(tmp_path / "mine.smi"))
    made = parts.parts_of(config)
    said = actions.predicted(config, made, run, tmp_path)
    assert "2 structures" in said
    assert "| ethanol | 9 |" in said
    for name in ("predicted.extxyz", "predicted.sdf"):
        again = structures.read(tmp_path / name)
        assert [len(r.numbers) for r in again] == [9, 9]
    again = structures.read(tmp_path / "path.extxyz")
    assert len(again) == 2
    actions.animated(config, made, run, tmp_path)
    assert (tmp_path / "bridge.gif").read_bytes().startswith(b"GIF8")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.xyz", "1\n\nXx 0 0 0\n", "a.xyz"),
        ("b.xyz", "1\n\nC 0 0 0\n", "is a single atom"),
        ("c.xyz", "2\n\nC 0 0 0\nO 0 0 0.01\n", "0.1"),
        ("d.xyz", "2\n\nC 0 0 0\nO 0 0 nan\n", "NaN"),
        ("e.xyz", "3\n\nO 0 0 0\nH 0 0 0.096\nH 0 0.093 -0.024\n", "nanometres"),
        ("f.smi", "C1CC\n", "C1CC"),
        ("g.pdb", "", "ends in"),
    ],
)
def test_a_file_that_cannot_be_is_one_sentence(tmp_path, name, text, said):
    config = variant("bridge")
    (tmp_path / name).write_text(text)
    run = runner.Run("main", config, [], {}, lambda: None, str(tmp_path / name))
    with pytest.raises(UserError) as error:
        actions.given(config, run)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(kind="bridges"), "config.kind is 'bridges'"),
        (dict(packs=3), "config.batch_size is 8"),
        (dict(packs=-1), "config.packs is -1"),
        (dict(ema=1.0), "config.ema is 1.0"),
        (dict(loss=dict(last=1.0)), "config.loss.last is 1.0"),
        (dict(reference=dict(sigma=-1.0)), "config.reference.sigma is -1.0"),
        (dict(reference=dict(kappa=0.0)), "config.reference.kappa is 0.0"),
        (dict(reference=dict(name="browne")), "config.reference.name is 'browne'"),
        (dict(sampler=dict(name="heun")), "config.sampler.name is 'heun'"),
        (dict(sampler=dict(steps=0)), "steps"),
        (dict(sampler=dict(noise_mix=2.0)), "config.sampler.noise_mix is 2.0"),
        (dict(network=dict(name="two_frames")), "nearest: two_frame"),
        (dict(data=dict(path="nowhere.npz")), "There is no file nowhere.npz"),
        (dict(data=dict(split="file", target="x_last")), "config.data.target is 'x_last'"),
        (dict(data=dict(atoms=5, edges=1000)), "budget of"),
        (dict(network=dict(species=7)), "H to C"),
    ],
)
def test_what_cannot_be_is_refused_before_training(changes, said):
    config = variant("bridge")
    configs.apply(config, changes)
    with pytest.raises(UserError) as error:
        runner.make(config)
    assert said in str(error.value)


def test_a_report_has_the_tables(trained, tmp_path):
    config, state, _, experiment = trained
    found = experiment.evaluate(state, jax.random.key(0))
    row = {"split": "eval", "step": 4} | {k: np.asarray(v).tolist() for k, v in found.items()}
    run = runner.Run(f"{config.kind}-seed0", config, [row], {}, lambda: state)
    made = report.report({run.name: run}, tmp_path)
    assert "start, relaxed by MMFF94" in made.text
    assert json.dumps(made.summary)
    assert (tmp_path / "calls.png").is_file()
    mean, error = figures.over_seeds([run, run], "d_mae")
    np.testing.assert_allclose(mean, found["d_mae"])
    assert (error >= 0).all()
