"""The figures of a Hubbard run, one function each."""

from pathlib import Path

import numpy as np

from common import metrics, plots
from nqs import observables as obs


def all_figures(system, known, runs, final, folder: Path) -> list[tuple[str, str]]:
    """Draws everything there is data for; returns (file name, caption) pairs."""
    row = next(iter(final.values()))
    drawn = []
    if any(metrics.select(run.rows, "energy")[0].size for run in runs.values()):
        drawn += [
            energy(system, known, runs, folder / "energy.png"),
            variance(system, runs, folder / "variance.png"),
            double_occupancy(system, known, final, folder / "double_occupancy.png"),
        ]
    drawn += [
        chains(runs, final, folder / "chains.png"),
        density(system, row, folder / "density.png"),
        correlations(system, known, final, folder / "correlations.png"),
    ]
    if all(bc != "open" for bc in system.boundary) and min(system.shape) > 1:
        drawn.append(structure(system, row, folder / "structure_factors.png"))
    if "attention" in row:
        drawn.append(attention(system, row, folder / "attention.png"))
    return drawn


def energy(system, known, runs, path: Path) -> tuple[str, str]:
    """Energy per site over training, and its distance from the exact one."""
    exact = known.energy
    n = system.n_sites
    unit, label = abs(exact or 0.0), "|E − E₀| / |E₀|"
    if unit < 1e-8:  # Relative to zero nothing can be.
        unit, label = 1.0, "|E − E₀|  (t)"
    with plots.figure(path, columns=2 if exact is not None else 1) as axes:
        left = axes[0] if exact is not None else axes
        for name, run in runs.items():
            steps, e = metrics.select(run.rows, "energy")
            _, error = metrics.select(run.rows, "energy_error")
            left.errorbar(steps, e / n, error / n, lw=1, elinewidth=0.5, label=name)
            if exact is not None:
                axes[1].plot(steps, np.abs(e - exact) / unit, lw=1, label=name)
        if exact is not None:
            left.axhline(exact / n, color="k", ls="--", lw=1, label="exact")
            axes[1].set(xlabel="step", ylabel=label)
            _log(axes[1])
            low = exact / n
            left.set_ylim(low - 0.05 * (abs(low) or 1), _top(runs, n, low))
        left.set(xlabel="step", ylabel="E / N  (t)")
        left.figure.suptitle(system.label)
        left.legend()
    return path.name, "Energy per site of each training step, with the exact line"


def _top(runs, n, low):
    """Shows the descent, not the first few random energies."""
    ends = [metrics.select(r.rows, "energy")[1] / n for r in runs.values()]
    later = max(np.median(e[len(e) // 10 :]) for e in ends)
    return max(later + 4 * abs(later - low), low + 0.15 * (abs(low) or 1))


def _log(axis):
    """A logarithmic y axis, unless nothing drawn is above zero."""
    if any((np.asarray(line.get_ydata()) > 0).any() for line in axis.lines):
        axis.set_yscale("log")


def variance(system, runs, path: Path) -> tuple[str, str]:
    """Variance and V-score over training."""
    infinite = system.U * system.n_up * system.n_dn / system.n_sites
    with plots.figure(path, columns=2) as (left, right):
        for name, run in runs.items():
            steps, v = metrics.select(run.rows, "variance")
            _, e = metrics.select(run.rows, "energy")
            left.plot(steps, v / system.n_sites, lw=1, label=name)
            score = np.full(len(e), np.nan)
            np.divide(system.n_electrons * v, (e - infinite) ** 2, score, where=e != infinite)
            right.plot(steps, score, lw=1)
        left.set(xlabel="step", ylabel="Var(E_L) / N  (t²)")
        right.set(xlabel="step", ylabel="V-score")
        _log(left)
        _log(right)
        left.legend()
    return path.name, "Variance of the local energy, and V-score; an eigenstate has zero"


def double_occupancy(system, known, final, path: Path) -> tuple[str, str]:
    """Double occupancy per site on the lattice, and per seed against the exact one."""
    row = next(iter(final.values()))
    with plots.figure(path, columns=2) as (left, right):
        _map(left, np.reshape(row["double"], system.shape), "⟨n↑ n↓⟩ by site", "viridis")
        x = np.arange(len(final))
        right.errorbar(
            x,
            [r["double_occupancy"] for r in final.values()],
            [r["double_occupancy_error"] for r in final.values()],
            fmt="o",
            capsize=3,
        )
        if known.observables is not None:
            right.axhline(
                float(known.observables["double_occupancy"]), color="k", ls="--", label="exact"
            )
            right.legend()
        right.set_xticks(x, list(final), rotation=30 if len(final) > 4 else 0)
        right.set(ylabel="double occupancy per site", xlim=(-0.5, len(final) - 0.5))
    return path.name, "Double occupancy"


def chains(runs, final, path: Path) -> tuple[str, str]:
    """Acceptance, autocorrelation and the blocked error."""
    with plots.figure(path, columns=3) as (left, middle, right):
        for name, row in final.items():
            steps, a = metrics.select(runs[name].rows, "acceptance")
            left.plot(steps, a, lw=1, label=f"{name}, R-hat {row['r_hat']:.3f}")
            rho = row["autocorrelation"][:32]
            middle.plot(rho, marker=".", lw=1, label=f"τ = {row['autocorrelation_time']:.2f}")
            levels = row["blocking"]
            right.plot(2 ** np.arange(len(levels)), levels, marker="o", lw=1)
        left.set(xlabel="step", ylabel="acceptance", ylim=(0, 1))
        middle.set(xlabel="lag (measurements)", ylabel="autocorrelation of E_L")
        right.set(xscale="log", xlabel="block length", ylabel="error of the mean energy (t)")
        left.legend()
        middle.legend()
    return path.name, "Health of the chains: acceptance, autocorrelation, blocking"


def density(system, row, path: Path) -> tuple[str, str]:
    """Hole density and staggered spin on the lattice."""
    up, down = (np.reshape(row[f"density_{s}"], system.shape) for s in ("up", "dn"))
    sign = (-1.0) ** np.add.outer(*map(np.arange, system.shape))
    with plots.figure(path, columns=2) as (left, right):
        _map(left, 1 - up - down, "hole density", "viridis")
        _map(right, sign * (up - down) / 2, "staggered spin", "RdBu")
    return path.name, "Hole density and staggered spin by site"


def correlations(system, known, final, path: Path) -> tuple[str, str]:
    """Spin and charge correlations against distance, with the exact ones."""
    g = obs.geometry(system)
    lengths = np.empty(len(g.shift))
    lengths[g.shift] = g.distances[g.shell]
    order = np.argsort(lengths)
    titles = {"spin": "C_s(r) = ⟨Sᶻ Sᶻ⟩", "charge": "C_c(r) = ⟨n n⟩ − ⟨n⟩⟨n⟩"}
    with plots.figure(path, columns=2) as axes:
        for axis, (kind, title) in zip(axes, titles.items(), strict=True):
            for i, (name, row) in enumerate(final.items()):
                value, error = (np.array(row[k]) for k in (kind, f"{kind}_error"))
                shift = 0.03 * (i - (len(final) - 1) / 2)
                axis.errorbar(
                    lengths[order] + shift,
                    value[order],
                    error[order],
                    fmt="o",
                    ms=3,
                    capsize=2,
                    label=name,
                )
            if known.observables is not None:
                true = np.ravel(known.observables[f"{kind}_correlation"])
                axis.plot(lengths[order], true[order], "k_", ms=12, label="exact")
            axis.axhline(0, color="k", lw=0.5)
            axis.set(xlabel="|r|", ylabel=title)
        axes[0].legend()
    return path.name, "Spin and charge correlations against distance"


def structure(system, row, path: Path) -> tuple[str, str]:
    """Spin and charge structure factors over the Brillouin zone."""
    with plots.figure(path, columns=2) as (left, right):
        for axis, kind in ((left, "spin"), (right, "charge")):
            s = obs.structure_factor(row[kind], system.shape)
            _map(axis, np.fft.fftshift(s), f"{kind} structure factor", "magma")
            axis.set(xlabel="q_x index", ylabel="q_y index")
    return path.name, "Structure factors, q = 0 in the middle"


def attention(system, row, path: Path) -> tuple[str, str]:
    """Share of the attention by distance, for every layer and head."""
    uniform = obs.uniform_share(obs.geometry(system))
    share = np.array(row["attention"])
    layers, heads, _ = share.shape
    with plots.figure(path, columns=layers, sharey=True, squeeze=False) as axes:
        for layer, axis in enumerate(axes[0]):
            for head in range(heads):
                spread = row["attention_participation"][layer][head]
                reach = row["attention_distance"][layer][head]
                axis.plot(
                    row["distances"],
                    share[layer, head],
                    marker="o",
                    ms=3,
                    lw=1,
                    label=f"head {head}: {spread:.1f} sites, mean |r| = {reach:.2f}",
                )
            far = uniform @ np.asarray(row["distances"])
            axis.plot(
                row["distances"],
                uniform,
                "k--",
                lw=1,
                label=f"all sites alike: {system.n_sites} sites, mean |r| = {far:.2f}",
            )
            axis.set(xlabel="distance", title=f"layer {layer}")
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14))
        axes[0][0].set_ylabel("share of attention")
    return path.name, (
        "How far each head looks; in the legend how many sites it spreads over, and its mean "
        "distance"
    )


def _map(axis, values, title, colours):
    values = np.atleast_2d(values)
    limit = {}
    if colours == "RdBu":
        top = max(np.abs(values).max(), 1e-9)
        limit = dict(vmin=-top, vmax=top)
    shown = axis.imshow(values.T, origin="lower", cmap=colours, **limit)
    axis.set(title=title, xlabel="x", ylabel="y")
    for each in (axis.xaxis, axis.yaxis):
        each.get_major_locator().set_params(integer=True)
    axis.grid(False)
    axis.figure.colorbar(shown, ax=axis, shrink=0.8)
