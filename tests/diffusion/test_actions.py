"""What is done with finished runs: curves, diagnoses, a user's denoiser, samples."""

import re

import jax
import numpy as np
import pytest

from common import mesh as meshes
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


def test_evaluate_and_diagnose(runs, tmp_path):
    text = act(runs, "flow", "evaluate", tmp_path)
    assert "edm_gap" in text
    text = act(runs, "flow", "diagnose", tmp_path)
    assert "gap" in text
    assert list(tmp_path.glob("*.png"))
    with pytest.raises(UserError, match="--input"):
        act(runs, "flow", "diagnose", tmp_path, "mine.py:f")


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
