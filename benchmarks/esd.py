"""One refresh of AlphaDecay: the exponents of all matrices of a network, ours and others'.

    uv run python -m benchmarks.esd [DEPTH [DIM [MLP [REPEATS]]]]

The default is the 60M model of the paper, 8 layers of four 512 x 512 and three 512 x 1376.
All compute the `mle` exponent of each matrix, which is compared first. Ours are jitted and
decompose all matrices together; the others go matrix by matrix, as their users do.

    auto, tridiagonal, gram, svd   `optim.spectra.eigenvalues`, the upper half
    torch svdvals                  `torch.linalg.svdvals`, what the released code calls
    numpy svd, numpy eigvalsh      singular values, or eigenvalues of the Gram matrix
    WeightWatcher                  `analyze()`, with its own fit on top

torch and WeightWatcher are no dependencies; where they are missing, that is said:

    uv run --with torch --with weightwatcher python -m benchmarks.esd

Three kinds of weights: a fresh network, normal(0, 0.02); Student's t with two degrees of
freedom; and a Pareto spectrum so steep that float32 Gram matrices lose its tail, so that
`auto` falls back on singular values (`tridiagonal` and `gram` are not exact there).
"""

import contextlib
import importlib
import importlib.util
import io
import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import alternately, table
from optim import exponents, spectra
from optim.modules import Dims, matrices, select

METHODS = ("auto", "tridiagonal", "gram", "svd")


def main(depth: str = "8", dim: str = "512", mlp: str = "1376", repeats: str = "5") -> None:
    """Prints one comparison per kind of weights as Markdown."""
    print(f"{jax.devices()[0].device_kind}, {missing()}")
    for kind in ("normal", "student", "pareto"):
        params = weights(kind, int(depth), int(dim), int(mlp))
        leaves = select(params, lambda path, leaf: Dims())
        each = [np.asarray(m) for a in leaves for m in matrices(a, params[a.name])]
        functions = {m: ours(leaves, params, m) for m in METHODS} | others(each)
        compare(functions, kind)
        print(f"\n{kind}: {len(each)} matrices\n")
        print(table(alternately(functions, int(repeats)), "auto"), flush=True)


def weights(kind: str, depth: int, dim: int, mlp: int) -> dict[str, jax.Array]:
    """Stacked float32 matrices of a decoder's blocks, inputs by outputs."""
    rng = np.random.default_rng(0)

    def leaf(n, m):
        if kind == "normal":
            return 0.02 * rng.normal(size=(depth, n, m))
        if kind == "student":
            return 0.02 * rng.standard_t(2, size=(depth, n, m))
        r = min(n, m)  # Singular values of a Pareto law's quantiles, exponent 1.3.
        values = ((np.arange(r) + 0.5) / r) ** (-0.5 / 0.3)
        left, right = (np.linalg.qr(rng.normal(size=(depth, k, r)))[0] for k in (n, m))
        return left * values @ right.mT

    shapes = dict.fromkeys(("q", "k", "v", "o"), (dim, dim))
    shapes |= dict(gate=(dim, mlp), up=(dim, mlp), down=(mlp, dim))
    return {name: jnp.asarray(leaf(*s), jnp.float32) for name, s in shapes.items()}


def ours(leaves, params, method):
    """() -> exponents in the order of the leaves."""
    first = exponents.tail_start

    @jax.jit
    def refresh(params):
        values = spectra.eigenvalues(leaves, [params[a.name] for a in leaves], method, first)
        fitted = [exponents.tail_alpha(v, v[..., 0]) for v in values]
        return jnp.concatenate([alpha.ravel() for alpha in fitted])

    return lambda: refresh(params)


def others(each):
    """Name -> () -> exponents, of the peers that are installed."""

    def fit(values, log=np.log):
        tail = values[exponents.tail_start(len(values)) :]
        return float(1 + len(tail) / log(tail / tail[0]).sum())

    def numpy_svd():
        return [fit(np.linalg.svd(w, compute_uv=False)[::-1] ** 2) for w in each]

    def numpy_eigvalsh():
        grams = (w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w for w in each)
        # Below rounding eigenvalues of a Gram matrix can be negative.
        values = (np.linalg.eigvalsh(gram) for gram in grams)
        return [fit(np.maximum(v, 1e-7 * v[-1])) for v in values]

    found = {"numpy svd": numpy_svd, "numpy eigvalsh": numpy_eigvalsh}
    if there("torch"):
        torch = importlib.import_module("torch")
        tensors = [torch.from_numpy(w.copy()) for w in each]

        def torch_svdvals():
            values = (torch.linalg.svdvals(w).square().flip(0) for w in tensors)
            return [fit(v, torch.log) for v in values]

        found["torch svdvals"] = torch_svdvals
    if there("torch") and there("weightwatcher"):
        found["WeightWatcher"] = weight_watcher(torch, tensors)
    return found


def weight_watcher(torch, tensors):
    """() -> its own exponents, not `mle` of the upper half."""
    ww = importlib.import_module("weightwatcher")
    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    layers = [torch.nn.Linear(w.shape[0], w.shape[1], bias=False) for w in tensors]
    for layer, w in zip(layers, tensors, strict=True):
        layer.weight.data = w.T.contiguous()
    model = torch.nn.Sequential(*layers)

    def analyze():
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            return ww.WeightWatcher(model=model).analyze()["alpha"].to_numpy()

    return analyze


def there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing() -> str:
    """Which peers are installed."""
    say = lambda p: f"{p} {'installed' if there(p) else 'not installed'}"
    return ", ".join(say(p) for p in ("torch", "weightwatcher"))


def compare(functions, kind):
    """All exponents, against NumPy's singular values."""
    want = np.asarray(functions["numpy svd"]())
    for name, function in functions.items():
        got = np.asarray(function())
        if got.shape != want.shape:
            raise SystemExit(f"{name} gives {got.size} exponents of {want.size} matrices.")
        exact = name in ("auto", "svd", "torch svdvals")
        if name != "WeightWatcher" and (exact or kind != "pareto"):
            np.testing.assert_allclose(got, want, rtol=1e-3, err_msg=f"{name}, {kind}")


if __name__ == "__main__":
    main(*sys.argv[1:])
