"""Models of users: every target of every process is one denoiser; with or without tracing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import Unfit, UserError
from diffusion import users_models
from diffusion.users_models import denoiser_of

VAR, MEAN, SD = 0.3, 0.2, 0.5  # Data N(MEAN, VAR); SD of the target F.
VP = dict(beta_d=10.0, beta_min=0.3)


def ddpm(t, steps=1000):
    """alpha, sigma of linear betas; between times log alpha is linear. float64."""
    log_alpha = 0.5 * np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, steps)))
    log = np.interp(t, np.arange(steps), log_alpha)
    return np.exp(log), np.sqrt(-np.expm1(2 * log))


def iddpm(t, steps=1000):
    bar = lambda j: np.sin(0.5 * np.pi * j / (steps * 1.008)) ** 2
    u = np.zeros(steps + 1)
    for j in range(steps, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(bar(j - 1) / bar(j), 1e-3) - 1)
    log_alpha = -0.5 * np.log1p(u[-2::-1] ** 2)
    log = np.interp(t, np.arange(steps), log_alpha)
    return np.exp(log), np.sqrt(-np.expm1(2 * log))


def vp(t):
    log = -0.25 * VP["beta_d"] * t**2 - 0.5 * VP["beta_min"] * t
    return np.exp(log), np.sqrt(-np.expm1(2 * log))


PROCESSES = {
    "edm": lambda t: (np.ones_like(t), t),
    "ve": lambda t: (np.ones_like(t), 0.02 * 5000**t),
    "vp": vp,
    "fm_linear": lambda t: (1 - t, t),
    "gvp": lambda t: (np.cos(0.5 * np.pi * t), np.sin(0.5 * np.pi * t)),
    "ddpm": ddpm,
    "iddpm": iddpm,
}
DISCRETE = ("ddpm", "iddpm")


def x0_of(x, s):
    """The denoiser of Gaussian data in VE coordinates, float64."""
    x, s = np.asarray(x, np.float64), np.asarray(s, np.float64).reshape(-1, 1, 1, 1)
    return MEAN + VAR / (VAR + s**2) * (x - MEAN)


def model(process, target, turned=False):
    """The perfect model of Gaussian data, of NumPy in float64, in its own coordinates."""

    def function(x_t, t):
        assert isinstance(x_t, np.ndarray)
        x_t, t = x_t.astype(np.float64), t.astype(np.float64).reshape(-1, 1, 1, 1)
        t = 1 - t if turned else t
        alpha, sigma = PROCESSES[process](t)
        x0 = MEAN + VAR * alpha / (VAR * alpha**2 + sigma**2) * (x_t - alpha * MEAN)
        eps = (x_t - alpha * x0) / sigma
        h = 1e-5
        ends = [PROCESSES[process](t + d) for d in (h, -h)]
        da, ds = ((ends[0][i] - ends[1][i]) / (2 * h) for i in (0, 1))
        s = sigma / alpha
        root = np.sqrt(s**2 + SD**2)
        out = {
            "x0": x0,
            "eps": eps,
            "score": -eps / sigma,
            "v": alpha * eps - sigma * x0,
            "velocity": (da * x0 + ds * eps) * (-1 if turned else 1),
            "F": (x0 - SD**2 / root**2 * x_t / alpha) * root / (s * SD),
        }[target]
        return out.astype(np.float32)

    return function


def constants(process):
    return VP if process == "vp" else {}


def check(found, want, s):
    """Float32 keeps x to a share of its size, which is s where that is above 1."""
    size = np.maximum(s, 1).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(found / size, want / size, atol=1e-5)


def queries():
    s = np.array([0.05, 0.2, 0.7, 1.5, 4.0, 9.0], np.float32)
    rng = np.random.default_rng(0)
    x = MEAN + VAR**0.5 * rng.normal(size=(6, 4, 4, 3))
    x = x + s[:, None, None, None] * rng.normal(size=x.shape)
    return x.astype(np.float32), s


@pytest.mark.parametrize("target", ["x0", "eps", "score", "v", "velocity", "F"])
@pytest.mark.parametrize("process", list(PROCESSES))
def test_all_targets_and_processes_are_one_denoiser(process, target):
    if target == "velocity" and process in DISCRETE:
        with pytest.raises(UserError, match="continuous time"):
            denoiser_of(model(process, target), process, target)
        return
    denoise = denoiser_of(model(process, target), process, target, **constants(process))
    x, s = queries()
    want = x0_of(x, s)
    for found in (denoise(x, s), jax.jit(denoise)(x, s)):
        check(found, want, s)


@pytest.mark.parametrize("target", ["x0", "eps", "score", "v", "velocity", "F"])
@pytest.mark.parametrize("process", ["ve", "vp", "fm_linear", "gvp"])
def test_data_may_be_at_time_one(process, target):
    given = dict(data_at="1", **constants(process))
    denoise = denoiser_of(model(process, target, turned=True), process, target, **given)
    x, s = queries()
    check(denoise(x, s), x0_of(x, s), s)
    wrong = denoiser_of(model(process, target, turned=True), process, target)
    assert np.abs(np.asarray(wrong(x, s)) - x0_of(x, s)).max() > 0.01


def test_a_function_of_jax_is_traced_and_has_a_gradient():
    seen = []

    def eps(x_t, t):
        seen.append(x_t)
        t = t.reshape(-1, 1, 1, 1)
        return x_t * t / (0.3 * (1 - t) ** 2 + t**2)

    denoise = denoiser_of(eps, process="fm_linear", target="eps")
    x, s = queries()
    found = jax.jit(denoise)(x, s)
    assert all(isinstance(a, jax.core.Tracer) for a in seen)
    v = s.reshape(-1, 1, 1, 1).astype(np.float64) ** 2
    np.testing.assert_allclose(found, 0.3 / (0.3 + v) * x, atol=1e-5)
    slope = jax.grad(lambda x: jnp.sum(denoise(x, s)))(x)
    np.testing.assert_allclose(slope, np.broadcast_to(0.3 / (0.3 + v), x.shape), atol=1e-5)


def test_a_scalar_level_and_classes():
    def of_class(x_t, t, label):
        return np.zeros_like(x_t) + label.reshape(-1, 1, 1, 1)

    denoise = denoiser_of(of_class, process="edm", target="x0")
    x, _ = queries()
    label = np.arange(6)
    found = jax.jit(denoise)(x, 0.5, label)
    np.testing.assert_array_equal(found[:, 0, 0, 0], label)


class Tensor:
    """What a torch tensor that has a gradient lets one do."""

    def __init__(self, value, free=False):
        self.value, self.free = value, free

    def detach(self):
        return Tensor(self.value, True)

    def cpu(self):
        return self

    def __array__(self, dtype=None, copy=None):
        assert self.free, "Can't call numpy() on Tensor that requires grad."
        return np.asarray(self.value, dtype)


def test_functions_on_the_host_own_their_arrays_and_may_return_tensors():
    def of_torch(x, s):
        assert isinstance(x, np.ndarray)
        assert x.flags.writeable  # Or torch.from_numpy warns.
        x *= 2
        return Tensor(x)

    call = users_models.traceable(of_torch)
    x, s = map(jnp.asarray, queries())
    for found in (call(x, s), jax.jit(call)(x, s)):
        np.testing.assert_array_equal(found, 2 * x)
    assert found.dtype == x.dtype


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(process="vq"), "process.name"),
        (dict(target="noise"), "target"),
        (dict(data_at="2"), "data_at is '2'"),
        (dict(process="edm", data_at="1"), "times of edm"),
        (dict(process="ddpm", data_at="1"), "times of ddpm"),
        (dict(beta_d=-1.0), "beta_d"),
        (dict(target="velocity", process="iddpm"), "continuous time"),
    ],
    ids=str,
)
def test_what_cannot_be_is_named(given, said):
    with pytest.raises(UserError, match=said):
        denoiser_of(lambda x, t: x, **dict(process="vp", target="eps") | given)


def test_another_shape_is_refused_though_it_would_broadcast():
    denoise = denoiser_of(lambda x, t: x[..., :1], process="vp", target="eps")
    with pytest.raises(UserError, match=r"shape \(6, 4, 4, 1\) for images \(6, 4, 4, 3\)"):
        denoise(*queries())


def test_files(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from diffusion.users_models import denoiser_of\n"
        "denoise = denoiser_of(lambda x, t: 0 * x, process='edm', target='eps')\n"
        "narrow = denoiser_of(lambda x, t: x[..., 0], process='edm', target='eps')\n"
    )
    found = users_models.denoiser_in(f"{path}:denoise", (4, 4, 3), False)
    x, s = map(jnp.asarray, queries())
    np.testing.assert_array_equal(found(x, s), x)
    with pytest.raises(UserError, match="The model returns the shape"):
        users_models.denoiser_in(f"{path}:narrow", (4, 4, 3), False)
    with pytest.raises(Unfit, match=r"FILE\.py:FUNCTION"):
        users_models.denoiser_in("0.12", (4, 4, 3), False)
    path.write_text(path.read_text().replace("edm", "edn"))
    with pytest.raises(UserError, match=r"process\.name is 'edn'"):
        users_models.denoiser_in(f"{path}:denoise", (4, 4, 3), False)
