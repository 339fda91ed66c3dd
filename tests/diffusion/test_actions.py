"""What is done with finished runs: curves, diagnoses, a user's denoiser, samples."""

import re

import jax
import numpy as np
import pytest

from common import config as configs
from common import mesh as meshes
from common import runner
from common.errors import UserError
from common.experiment import Run
from diffusion import curve
from tests.diffusion.test_training import EXACT, started, trained


@pytest.fixture(scope="module")
def runs():
    """Finished runs of either kind, and their experiments."""
    found = {}
    for name, many, given in (
        ("floor", 6, EXACT),
        ("flow", 4, dict(process=dict(name="fm_linear"), target="velocity")),
    ):
        c, state, *_ = trained(many, **given)
        with jax.set_mesh(meshes.make(**c.mesh)):
            made = started(c)[0]
        found[name] = (made, c, lambda state=state: state)
    return found


def act(runs, name, action, folder, given=""):
    made, c, state = runs[name]
    with jax.set_mesh(meshes.make(**c.mesh)):
        return made.actions[action](Run(f"{name}-seed0", c, [], {}, state, given), folder)


def test_the_curve_again(runs, tmp_path):
    text = act(runs, "floor", "evaluate", tmp_path)
    assert "|" in text
    (saved,) = tmp_path.glob("*.npz")
    loss, record = curve.load(saved)
    assert float(loss.variance) == pytest.approx(18.773105, rel=1e-4)
    assert record["estimator"]["name"] == "exact"
    assert list(tmp_path.glob("*.csv"))


def test_study(runs, tmp_path):
    assert "C0" in act(runs, "floor", "study", tmp_path)
    assert (tmp_path / "study.png").exists()


def changed(runs, action, folder, given="", **changes):
    """An action on the estimation run, with other settings than it had."""
    _, c, state = runs["floor"]
    c = c.copy_and_resolve_references()
    configs.apply(c, changes)
    with jax.set_mesh(meshes.make(**c.mesh)):
        action = runner.make(c).actions[action]
        return action(Run("floor-seed0", c, [], {}, state, given), folder)


@pytest.mark.parametrize("action", ["diagnose", "study"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("draws", 0),
        ("draws", 1),
        ("points", 1),
        ("sigma_min", 0.0),
        ("sigma_max", 1e-4),
        ("block", 0),
        ("block", -3),
    ],
)
def test_settings_that_cannot_be_are_named(runs, users, tmp_path, action, field, value):
    with pytest.raises(UserError, match=rf"^config\.eval\.{field} is .*, but must be "):
        changed(runs, action, tmp_path, f"{users}:linear", eval={field: value})


@pytest.mark.parametrize("other", [dict(num_rows=1000), dict(path="{}"), dict(flip=True)])
@pytest.mark.parametrize(("action", "given"), [("evaluate", ""), ("study", ""), ("size", "1")])
def test_a_curve_is_not_signed_with_other_data(runs, tmp_path, action, given, other):
    folder, path = tmp_path / "page", tmp_path / "other.npy"
    folder.mkdir()
    np.save(path, np.float32(np.random.default_rng(0).normal(size=(40, 8, 8, 1))))
    other = {n: str(path) if n == "path" else v for n, v in other.items()}
    with pytest.raises(UserError, match=r"^config\.data\.path '.*', .* means other data than"):
        changed(runs, action, folder, given, data=other)
    assert not list(folder.iterdir())
    changed(runs, "evaluate", folder, data=dict(cache=""))


def test_what_has_no_subsets_is_not_studied(runs, tmp_path):
    path = tmp_path / "one.npy"
    np.save(path, np.zeros((1, 8, 8, 1), np.float32))
    with (
        pytest.warns(UserWarning, match="one row"),
        pytest.raises(UserError, match=r"^config\.data\.path '.*' has one row, .* to study\.$"),
    ):
        changed(runs, "study", tmp_path, data=dict(path=str(path)))
    with pytest.raises(UserError, match=r"^config\.data\.class_cond is True, but .* False"):
        changed(runs, "study", tmp_path, data=dict(class_cond=True))


def test_evaluate_and_diagnose(runs, tmp_path):
    text = act(runs, "flow", "evaluate", tmp_path)
    assert "edm_gap" in text
    text = act(runs, "flow", "diagnose", tmp_path)
    assert "gap" in text
    assert list(tmp_path.glob("*.png"))
    for action in ("diagnose", "evaluate", "sample"):
        with pytest.raises(UserError, match=r"--input=.* must be 'power'"):
            act(runs, "flow", action, tmp_path, "mine.py:f")
    with pytest.raises(UserError, match=r"--input=0\.1 is for training runs"):
        act(runs, "floor", "evaluate", tmp_path, "0.1")


def test_samples(runs, tmp_path):
    text = act(runs, "flow", "sample", tmp_path)
    assert "nearest row" in text
    with np.load(tmp_path / "samples_flow-seed0.npz") as found:
        assert found["images"].shape == (64, 8, 8, 1)
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.fixture
def users(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import jax.numpy as jnp\n"
        "def linear(x, sigma):\n"
        "    s = sigma.reshape(-1, 1, 1, 1)\n"
        "    return 0.29 / (0.29 + s**2) * x\n"
        "def flat(x, sigma):\n"
        "    return x[..., 0]\n"
        "def oracle(x, sigma):\n"
        "    return jnp.full_like(x, jnp.nan)\n"
        "number = 3\n"
        "import numpy as np\n"
        "def of_numpy(x, sigma):\n"
        "    s = np.reshape(sigma, (-1, 1, 1, 1))\n"
        "    return np.float32(0.29) / (np.float32(0.29) + np.square(s, dtype=float)) * x\n"
        "def one(x):\n"
        "    return x\n"
    )
    return path


def test_a_users_denoiser_is_held_against_the_optimum(runs, users, tmp_path):
    text = act(runs, "floor", "diagnose", tmp_path, f"{users}:linear")
    assert "|" in text
    assert list(tmp_path.glob("*.png"))


def test_a_function_of_numpy_is_one_of_jax(runs, users, tmp_path):
    texts = [
        act(runs, "floor", "diagnose", tmp_path, f"{users}:{name}").replace(name, "")
        for name in ("linear", "of_numpy")
    ]
    numbers = [re.findall(r"\d+\.\d+", text) for text in texts]
    assert len(numbers[0]) > 20
    np.testing.assert_allclose(*(np.array(n, float) for n in numbers), rtol=0.02, atol=0.02)


def test_a_model_of_another_target_is_the_denoiser_that_it_means(runs, users, tmp_path):
    """A VP model of eps, on the host and by JAX, against the same model as x_0."""
    users.write_text(
        users.read_text() + "from diffusion.users_models import denoiser_of\n"
        "def eps(x_t, t):\n"
        "    xp = np if isinstance(x_t, np.ndarray) else jnp\n"
        "    t = t.reshape(-1, 1, 1, 1)\n"
        "    log = -0.25 * 19.9 * t**2 - 0.5 * 0.1 * t\n"
        "    alpha, sigma = xp.exp(log), xp.sqrt(-xp.expm1(2 * log))\n"
        "    return sigma / (0.29 * alpha**2 + sigma**2) * x_t\n"
        "of_jax = denoiser_of(eps, process='vp', target='eps')\n"
        "host = lambda x, t: eps(np.asarray(x), np.asarray(t))\n"
        "on_host = denoiser_of(host, process='vp', target='eps')\n"
    )
    found = []
    for name in ("linear", "of_jax", "on_host"):
        act(runs, "floor", "diagnose", tmp_path, f"{users}:{name}")
        found.append(np.genfromtxt(tmp_path / "diagnosis.csv", delimiter=",", names=True))
    for other in found[1:]:
        for field in ("loss", "gap", "distance"):
            np.testing.assert_allclose(other[field], found[0][field], rtol=2e-3, atol=1e-6)
    assert (found[0]["distance"] > 1e-6).any()


def test_the_curve_is_sized(runs, tmp_path):
    text = act(runs, "floor", "size", tmp_path, "0.05")
    assert re.search(r"^(exact|corrected).* reaches an error of 0\.05 max", text)
    measured = float(re.search(r"measured ([\d.e-]+),", text)[1])
    assert measured <= 0.05
    draws = int(re.search(r"of (\d+) draws", text)[1])
    assert "| exact | 512 |" in text
    assert "| corrected (subset_size 224, exact_draws 512) | 2048 |" in text
    (saved,) = tmp_path.glob("*.npz")
    loss, record = curve.load(saved)
    assert int(loss.num_draws) == draws
    error = loss.stderr / np.maximum(loss.value, 0.01 * loss.variance)
    assert error.max() == pytest.approx(measured, rel=0.01)
    assert record["sized"]["accuracy"] == 0.05
    # The levels are those of the run, and so is the curve.
    act(runs, "floor", "evaluate", folder := tmp_path / "run")
    mine, _ = curve.load(folder / "optimal_loss.npz")
    np.testing.assert_allclose(loss.sigmas, mine.sigmas)
    bar = np.hypot(loss.stderr, mine.stderr) + 1e-6
    assert (np.abs(loss.value - mine.value) <= 5 * bar).all()


def test_a_budget_that_ends_it_is_said(runs, tmp_path):
    text = act(runs, "floor", "size", tmp_path, "1e-5,2e11")
    assert "does not reach, within the FLOPs allowed, an error of 1e-05" in text
    with pytest.raises(
        UserError, match=r"^--input allows 1e\+03 FLOPs, .* FLOPs from .* up\.$"
    ):
        act(runs, "floor", "size", tmp_path, "0.01,1000")


@pytest.mark.parametrize(
    "given", ["", "fine", "0", "-1", "nan", "inf", "0.1,", "0.1,0", "1,2,3"]
)
def test_what_is_no_accuracy_is_refused(runs, tmp_path, given):
    with pytest.raises(UserError, match=r"^--input is .* ACCURACY,FLOPS, .* such as 0\.01\.$"):
        act(runs, "floor", "size", tmp_path, given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "must be FILE.py:FUNCTION"),
        ("nowhere.py:f", "not there"),
        ("{path}:none", "no function 'none'"),
        ("{path}:number", "no function 'number'"),
        ("{path}:flat", "shape"),
        ("{path}:oracle", "not finite"),
        ("{path}:one", "TypeError"),
    ],
)
def test_a_users_mistake_is_named(runs, users, tmp_path, given, said):
    with pytest.raises(UserError, match=said):
        act(runs, "floor", "diagnose", tmp_path, given.format(path=users))


def test_a_users_file_that_fails_is_named(runs, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match="ModuleNotFoundError"):
        act(runs, "floor", "diagnose", tmp_path, f"{path}:f")
