"""Averages of other widths than those tracked, against their definition in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import config as configs
from common import mesh as meshes
from common import runner
from common.errors import Unfit, UserError
from common.experiment import Run
from diffusion import averages
from optim import ema
from tests.common.test_loop import Never
from tests.diffusion.test_training import config, started


class State(NamedTuple):
    averages: ema.Averages


def power(**changes):
    return config(ema=dict(kind="power"), **changes)


def profile(width, t):
    """Weights of the parameters after steps 1 ... t, of sigma_rel found by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        g = 0.5 * (low + high)
        above = (g + 1) / ((g + 2) ** 2 * (g + 3)) > width**2
        low, high = (g, high) if above else (low, g)
    edges = (np.arange(t + 1) / t) ** (g + 1)
    return np.diff(edges)


def path(t, seed=0):
    """Parameters [t, 4] that drift and jitter, float64."""
    rng, u = np.random.default_rng(seed), np.arange(1, t + 1)[:, None] / t
    drift = np.concatenate([np.sin(6 * u), u**2, np.log(u + 0.01), 1 - u], 1)
    return drift + 0.1 * rng.normal(size=(t, 4))


def saved(thetas, steps, widths=(0.05, 0.10)):
    """step -> a state with the averages tracked until then."""
    made = {}
    for t in steps:
        trees = tuple(
            {"w": jnp.asarray(profile(w, t) @ thetas[:t], jnp.float32)} for w in widths
        )
        state = State(ema.Averages(jnp.asarray(t, jnp.int32), trees))
        made[t] = lambda state=state: state
    return made


def run_of(kept, given):
    return Run("a-seed0", None, [], {}, list(kept.values())[-1], given, lambda: kept)


@pytest.mark.parametrize("width", [0.05, 0.07, 0.12, 0.2])
def test_an_average_is_that_of_the_definition(width):
    t, thetas = 4000, path(4000)
    kept = saved(thetas, range(250, t + 1, 250))
    state, said = averages.averaged(power(), run_of(kept, f"{width}"))
    want = profile(width, t) @ thetas
    found = np.asarray(state.averages.trees[0]["w"], np.float64)
    np.testing.assert_allclose(found, want, atol=5e-3)
    others = [np.abs(np.asarray(tree["w"]) - want).max() for tree in kept[t]().averages.trees]
    assert width == 0.05 or np.abs(found - want).max() < 0.03 * min(others)
    # The others are as they were.
    np.testing.assert_array_equal(
        state.averages.trees[1]["w"], kept[t]().averages.trees[1]["w"]
    )
    assert "at 16 checkpoints (steps 250, 500, 750, ..., 3500, 3750, 4000)" in said
    assert f"relative width {width:g} at step 4000" in said


def test_two_profiles_of_one_checkpoint_make_a_third():
    """Between its neighbours and nearer to the definition than they are."""
    thetas = path(2000)
    kept = saved(thetas, [2000])
    state, said = averages.averaged(power(), run_of(kept, "0.07"))
    want = profile(0.07, 2000) @ thetas
    off = np.abs(np.asarray(state.averages.trees[0]["w"]) - want).max()
    others = [
        np.abs(np.asarray(tree["w"]) - want).max() for tree in kept[2000]().averages.trees
    ]
    assert off < 0.5 * min(others)
    assert "at 1 checkpoints" not in said
    assert "at 1 checkpoint (step 2000)" in said


def test_the_error_of_the_profile_is_said():
    """Against least squares on a fine grid of times."""
    kept = saved(path(300), [100, 200, 300])
    tau = (np.arange(300_000) + 0.5) / 1000
    of = lambda t, g: np.where(tau < t, (g + 1) * (tau / t) ** g / t, 0.0)
    for width, poor in ((0.12, False), (0.005, True)):
        said = averages.averaged(power(), run_of(kept, f"{width}"))[1]
        columns = [of(t, ema.gamma_of(w)) for t in (100.0, 200.0, 300.0) for w in (0.05, 0.10)]
        rows, want = np.stack(columns, 1), of(300.0, ema.gamma_of(width))
        factors = np.linalg.lstsq(rows, want, rcond=None)[0]
        factors /= factors.sum()
        left = np.linalg.norm(rows @ factors - want) / np.linalg.norm(want)
        number = float(said.partition("off by ")[2].partition(" %")[0]) / 100
        assert number == pytest.approx(left, rel=0.06)
        assert ("keep more checkpoints" in said) == poor


def test_without_input_nothing_changes():
    kept = saved(path(100), [50, 100])
    state, said = averages.averaged(power(), run_of(kept, ""))
    assert state is kept[100]()
    assert said == ""


@pytest.mark.parametrize("given", ["wide", "0", "-0.1", "0.29", "nan", "inf", "1e400", "0.1,"])
def test_what_is_no_width_is_refused(given):
    kept = saved(path(100), [100])
    with pytest.raises(UserError, match=r"^--input is .*above 0 and at most 0\.2887[^.]*\.$"):
        averages.averaged(power(), run_of(kept, given))


def test_other_averages_have_no_width():
    kept = saved(path(100), [100])
    with pytest.raises(
        Unfit, match=r"config\.ema\.kind must be 'power', but it is 'half_life'"
    ):
        averages.averaged(config(), run_of(kept, "0.1"))
    with pytest.raises(Unfit, match=r"--input is 'a\.py:f'"):
        averages.averaged(power(), run_of(kept, "a.py:f"))


def test_the_average_of_a_real_run_is_that_of_its_parameters():
    """Trained by the step itself; parameters of every step against the definition."""
    t, every, c = 60, 10, power(steps=60)
    with jax.set_mesh(mesh := meshes.make(**c.mesh)):
        made, state, step = started(c)
        thetas, kept = [], {}
        for i in range(t):
            batch = meshes.to_devices(made.batch(i), mesh)
            state, _ = step(state, batch, jax.random.key(1), jnp.uint32(i))
            host = jax.device_get(state)
            thetas.append(host.params["net"])
            if (i + 1) % every == 0:
                kept[i + 1] = lambda host=host: host
    found = averages.averaged(c, run_of(kept, "0.15"))[0].averages.trees[0]
    weight = profile(0.15, t)
    mean = lambda *leaves: np.tensordot(weight, np.stack(leaves).astype(np.float64), 1)
    want = jax.tree.map(mean, *thetas)
    off = lambda tree: max(
        np.abs(np.asarray(a) - b).max()
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(want), strict=True)
    )
    assert off(found) < 0.1 * off(host.averages.trees[1])
    assert off(found) < 0.1 * off(host.params["net"])


def command(c, work, do, given=""):
    runner.act(c, work, do, given, ())
    return (work / f"{do}.md").read_text()


def test_the_commands(tmp_path, monkeypatch, capsys):
    """On a workdir with runs of both kinds, where --input is for one of them."""
    monkeypatch.setattr(runner, "Stop", Never)
    c = configs.load("configs/optimal_loss.py:test")
    changes = dict(
        mesh=dict(data=1),
        ema=dict(kind="power"),
        eval=dict(samples=0),
        sampler=dict(count=4, batch_size=4),
    )
    configs.apply(c, changes)
    c.runs = {n: c.runs[n] for n in ("floor", "flow")}
    work = tmp_path / "w"
    runner.run(c, work)
    numbers = lambda text: [line for line in text.splitlines() if line.startswith("|")]
    plain = {do: command(c, work, do) for do in ("evaluate", "diagnose", "sample")}
    assert "sample: flow-seed0" in plain["sample"]
    assert "off by" not in "".join(plain.values())
    capsys.readouterr()
    for do, text in plain.items():
        wide = command(c, work, do, "0.12")
        assert "relative width 0.12 at step 4, from those of the widths 0.05, 0.1 at 2 " in wide
        assert f"# {do}: floor-seed0" not in wide
        if do == "sample":
            assert (work / do / "flow-seed0" / "samples_flow-seed0.npz").exists()
            assert not (work / do / "floor-seed0").exists()
            continue
        assert "note: floor-seed0 is left out: --input" in capsys.readouterr().err
        assert len(numbers(wide)) > 5
        # The width tracked first is what is used without any.
        same = command(c, work, do, "0.05")
        mine = text[text.index(f"# {do}: flow-seed0") :]
        values = [
            np.array([float(x) for line in numbers(page) for x in _plain(line)])
            for page in (same, mine)
        ]
        np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-6)
    with pytest.raises(UserError, match=r"at most 0\.2887"):
        command(c, work, "diagnose", "7")
    with pytest.raises(
        UserError, match=r"no action 'size_'; this .* evaluate, .*size, .*compile"
    ):
        command(c, work, "size_")


def _plain(line):
    """The numbers of a row of a table, without their digits of error."""
    for cell in line.strip("|").split("|"):
        text = cell.strip().partition("(")[0].removesuffix(" %")
        try:
            yield float(text)
        except ValueError:
            continue
