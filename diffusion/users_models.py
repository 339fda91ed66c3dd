"""Models of users: any target of any process as one denoiser, on JAX or not, from a file.

Codes differ in what a network predicts and what it is given. `denoiser_of` says it in a line:

    from diffusion.users_models import denoiser_of

    denoise = denoiser_of(my_eps, process="vp", target="eps", beta_d=19.9, beta_min=0.1)

after which `--do=diagnose --input=FILE.py:denoise` holds it against the optimum. With the names
of `processes` and `predictions`, x_t = alpha x_0 + sigma eps = alpha x and s = sigma / alpha,

    x0_hat = c_skip(s) x + c_out(s) function(x_t, t(s))
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import Unfit, UserError
from diffusion.preconditioning import expand, preconditioning
from diffusion.predictions import coefficients
from diffusion.processes import process as process_of


def denoiser_of(
    function: Callable,
    process: str,
    target: str,
    *,
    sigma_data: float = 0.5,
    data_at: str = "0",
    **constants: float,
) -> Callable:
    """A model in its own coordinates as denoise(x [B, ...], sigma [B]) -> x0_hat [B, ...].

    Args:
      function: (x_t [B, ...], t [B]) -> the target [B, ...], where x_t = alpha x_0 + sigma eps
        and t is the process's time: s for edm, 0 to 1 for ve, vp, fm_linear and gvp, 0 to
        steps - 1 for ddpm and iddpm, in between where a level lies between two times. More
        arguments of denoise, such as classes, come after t. It may be of JAX; or it is called
        on the host with NumPy float32 arrays and returns an array or a torch tensor.
      process: a name in `processes`.
      target: what it predicts, one of `predictions.TARGETS`; score is that of x_t.
      sigma_data: of the target F.
      data_at: "1" where data are at t = 1 and noise at t = 0, as in many codes of flow
        matching; the function then gets their time, and its velocity is d x_t / dt of it.
      constants: of the process, keyword arguments of `processes.process`.

    At levels beyond those of a process the function gets times beyond its ends, or the ends
    where time is discrete.

    Raises:
      UserError: an unknown name, a constant out of range, a velocity in discrete time, data_at
        that is not for this process; and of denoise, a function that returns another shape.
    """
    made = process_of(process, **constants)
    wrap = preconditioning(made, target, sigma_data)
    coefficients(target, made, jnp.float32(0.5 * (made.first + made.last)), sigma_data)
    turned = _turned(data_at, made)
    call = traceable(function)

    def denoise(x, sigma, *told):
        x = jnp.asarray(x)
        s = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        of = lambda values: expand(values.astype(x.dtype), x)
        alpha, t = made.scale(s), made.time(s)
        out = call(of(alpha) * x, 1 - t if turned else t, *told)
        if out.shape != x.shape:
            raise UserError(f"The model returns the shape {out.shape} for images {x.shape}.")
        if target == "score":  # The preconditioning is that of sigma times it.
            out = of(s * alpha) * out
        if target == "velocity" and turned:
            out = -out
        return of(wrap.c_skip(s)) * x + of(wrap.c_out(s)) * out

    return denoise


def _turned(data_at, made) -> bool:
    if data_at not in ("0", "1"):
        raise UserError(
            f"data_at is {data_at!r}, but must be '0' or '1', the time of the data."
        )
    if data_at == "1" and (made.steps or made.name == "edm"):
        raise UserError(f"data_at is '1', but the times of {made.name} are not from 0 to 1.")
    return data_at == "1"


def traceable(function: Callable) -> Callable:
    """(x, *more) -> function(x, *more) in the dtype of x, within JAX's programs, too.

    As it is where JAX can trace it. NumPy and torch know no tracers: such a function is called
    on the host, with NumPy arrays of its own, and may return an array or a torch tensor.
    """

    def on_host(x, *more):
        out = function(*(np.array(a) for a in (x, *more)))
        if hasattr(out, "detach"):
            out = out.detach().cpu()
        return np.asarray(out, x.dtype)

    def call(x, *more):
        given = (x, *more)
        try:
            jax.eval_shape(function, *given)
        except Exception:  # Whatever the user's function does.
            if not any(isinstance(a, jax.core.Tracer) for a in given):
                return jnp.asarray(on_host(*given))
            return jax.pure_callback(on_host, jax.ShapeDtypeStruct(x.shape, x.dtype), *given)
        return jnp.asarray(function(*given), x.dtype)

    return call


def denoiser_in(given: str, shape: tuple[int, ...], conditional: bool) -> Callable:
    """The denoiser that `--input=FILE.py:NAME` names, tried on two images.

    Args:
      given: the flag.
      shape: of an image.
      conditional: whether it is told classes [B], a third argument.

    Raises:
      UserError: there is no such function, it fails, or it returns another shape. `Unfit`: the
        flag names no function of a file.
    """
    function = traceable(_loaded(given))
    x, s = jnp.zeros((2, *shape), jnp.float32), jnp.ones(2, jnp.float32)
    told = (jnp.zeros(2, jnp.int32),) if conditional else ()
    try:
        shown = function(x, s, *told).shape
    except UserError:
        raise
    except Exception as error:  # Whatever the user's function does.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{given} fails on two images {x.shape}: {reason}.") from error
    if shown != x.shape:
        raise UserError(f"{given} returns the shape {shown} for images {x.shape}.")
    return function


def _loaded(given: str) -> Callable[..., Any]:
    path, _, name = given.rpartition(":")
    if not path:
        raise Unfit(f"--input is {given!r}, but must be FILE.py:FUNCTION, a denoiser.")
    if not Path(path).is_file():
        raise UserError(f"--input names the file {path}, which is not there.")
    spec = importlib.util.spec_from_file_location("users_denoiser", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--input names {path}, which is no Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:  # Whatever the user's file does.
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"The file {path} cannot be loaded: {reason}.") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"The file {path} has no function {name!r}.")
    return getattr(module, name)
