"""Figures of a scaling analysis: losses and gaps against compute, fits, residuals.

Every function writes a PNG, whole or not at all, and returns (file name, caption).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from common.errors import reject
from diffusion.power_laws import PowerLaw
from diffusion.scaling import ScalingReport

MOST = 10  # Runs with a name and a colour of their own; more are grey.


def scaling(
    path: Path,
    report: ScalingReport,
    *,
    title: str = "",
    compute: str = "training compute (FLOP)",
    loss: str = "loss",
) -> tuple[str, str]:
    """Loss and gap against compute, with the fits, and their residuals underneath.

    Left: J of all runs, the envelope, J* as a line and the three fits; residuals are of the
    fit without an offset. Right: J - J* and the corrected fit with its residuals.

    Args:
      path: ends in .png.
      report: of `diffusion.scaling.analyse`.
      title: over the figure.
      compute, loss: what F and J are, with units.
    """
    from common.plots import figure

    shape = dict(sharex=True, height_ratios=(3, 1), figsize=(10.2, 5.6))
    with figure(path, 2, 2, **shape) as axes:
        (left, right), below = axes
        _runs(left, report, 0.0)
        dense = _dense(report)
        for fit, style, name in (
            (report.raw, ":", "without offset"),
            (report.free, "--", f"free offset {report.free.offset:.4g}"),
            (report.corrected, "-", f"offset J* = {report.optimum:.4g}"),
        ):
            left.plot(dense, fit.loss(dense), "k", ls=style, lw=1.2, label=name)
        if report.optimum > 0:
            left.axhline(report.optimum, color="#888888", lw=1)
        left.set(yscale="log", ylabel=loss)
        _runs(right, report, report.optimum)
        fit = report.corrected
        right.plot(dense, fit.loss(dense) - fit.offset, "k", lw=1.2, label=_law(fit, "J − J*"))
        right.set(yscale="log", ylabel=f"{loss} − J*")
        for axis, each in zip(below, (report.raw, report.corrected), strict=True):
            axis.axhline(0, color="k", lw=1)
            axis.plot(report.envelope.flops, each.residuals, ".", color="#d1495b")
            axis.set(xscale="log", xlabel=compute)
        # The same scale, since the sizes of the residuals are the point.
        reach = 1.1 * max(np.abs(f.residuals).max() for f in (report.raw, report.corrected))
        for axis in below:
            axis.set_ylim(-reach or -1, reach or 1)
        below[0].set_ylabel("residual, log J")
        below[1].set_ylabel("residual, log gap")
        left.set_title(f"ρ = {report.raw.rho:.4f} without offset")
        right.set_title(f"ρ = {report.corrected.rho:.4f} with J*")
        for axis in (left, right):
            axis.legend(fontsize=7)
        left.figure.suptitle(title)
    caption = "Loss and gap to the optimal loss against compute: runs, envelope, power laws"
    return path.name, caption


def bands(
    path: Path,
    reports: Mapping[str, ScalingReport],
    *,
    compute: str = "training compute (FLOP)",
    columns: int = 3,
) -> tuple[str, str]:
    """Gap against compute in one panel per noise band, with the fit and both rho.

    Args:
      path: ends in .png.
      reports: {name of the band: its report}, one at least.
      compute: what F is, with its unit.
      columns: of panels.

    Raises:
      UserError: there are no bands.
    """
    from common.plots import panels

    if not reports:
        raise reject("scaling.bands", [], "one band or more")
    width, height = min(columns, len(reports)), -(-len(reports) // columns)
    size = (max(4.4, 3.5 * width), 3.2 * height)
    with panels(path, len(reports), columns, figsize=size) as axes:
        for axis, (name, report) in zip(axes, reports.items(), strict=True):
            _runs(axis, report, report.optimum)
            fit, dense = report.corrected, _dense(report)
            axis.plot(dense, fit.loss(dense) - fit.offset, "k", lw=1.2)
            title = f"{name}\nα = {fit.alpha:.3f}, ρ {report.raw.rho:.3f} → {fit.rho:.3f}"
            axis.set_title(title, fontsize=9)
            axis.set(xscale="log", yscale="log", xlabel=compute, ylabel="J − J*")
        axes[0].legend(fontsize=6)
    return path.name, "Gap to the optimal loss against compute by noise band, with power laws"


def exponents(path: Path, reports: Mapping[str, ScalingReport]) -> tuple[str, str]:
    """Exponent and correlation of every band, with and without J*, 95 % intervals.

    Args:
      path: ends in .png.
      reports: {name of the band: its report}, one at least.

    Raises:
      UserError: there are no bands.
    """
    from common.plots import figure

    if not reports:
        raise reject("scaling.bands", [], "one band or more")
    at = np.arange(len(reports))
    with figure(path, 2) as axes:
        for kind, mark, name in (("raw", "o", "without offset"), ("corrected", "s", "with J*")):
            fits = [getattr(r, kind) for r in reports.values()]
            spreads = [getattr(r, f"{kind}_interval") for r in reports.values()]
            for axis, what in zip(axes, ("alpha", "rho"), strict=True):
                value = np.array([getattr(f, what) for f in fits])
                ends = np.array([getattr(s, what) for s in spreads]).T
                # A percentile interval need not contain the value; bars start at it.
                bars = np.nan_to_num(np.maximum([value - ends[0], ends[1] - value], 0))
                shift = 0.12 if kind == "corrected" else -0.12
                axis.errorbar(at + shift, value, bars, fmt=mark, ms=4, capsize=3, label=name)
        for axis, what in zip(axes, ("exponent α", "correlation ρ"), strict=True):
            turned = dict(rotation=30, ha="right") if len(reports) > 4 else {}
            axis.set_xticks(at, list(reports), **turned)
            axis.set_ylabel(what)
        axes[0].legend()
    return path.name, "Exponents and correlations by noise band, 95 % intervals over runs"


def _runs(axis, report: ScalingReport, offset: float) -> None:
    """All measurements above the offset, and the envelope."""
    from common.plots import colour

    many = len(report.runs) > MOST
    for i, (name, (flops, loss)) in enumerate(report.runs.items()):
        shown = np.where(loss > offset, loss - offset, np.nan)
        mark = dict(marker=".", ls="") if len(flops) == 1 else dict(lw=1)
        look = dict(color="#999999") if many else dict(color=colour(i), label=name)
        axis.plot(flops, shown, **mark, **look)
    best = report.envelope
    axis.plot(best.flops, best.loss - offset, "o", ms=4, mfc="none", color="k", label="fitted")


def _dense(report: ScalingReport) -> np.ndarray:
    flops = report.envelope.flops
    return np.geomspace(flops[0], flops[-1], 200)


def _law(fit: PowerLaw, what: str) -> str:
    return f"{what} = {fit.beta:.3g} F^{fit.alpha:.3f}"
