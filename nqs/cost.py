"""The arithmetic of one step in floating-point operations: two per multiply-add, all
devices together."""


def forward(ansatz, n_sites: int, n_electrons: int) -> float:
    """FLOPs of one log_psi of the transformer, its determinants included."""
    d, n_layers, k = ansatz.d_model, ansatz.n_layers, ansatz.n_det
    dense = 2 * n_sites * 5 * d * d * n_layers
    attention = 4 * n_sites**2 * d * n_layers
    head = 2 * n_sites * d * 2 * k * n_electrons
    return dense + attention + head + k * 2 * n_electrons**3 / 3


def parameters(ansatz, n_sites: int, n_electrons: int) -> int:
    """Of the transformer: 4d + Nd + L(5d^2 + d) + (d + 1) 2K N_e."""
    d = ansatz.d_model
    blocks = ansatz.n_layers * (5 * d * d + d)
    return (4 + n_sites) * d + blocks + (d + 1) * 2 * ansatz.n_det * n_electrons


def flops(config, system) -> dict[str, float]:
    """Part -> FLOPs of one step; empty for an ansatz other than the transformer."""
    if config.ansatz.name != "transformer":
        return {}
    n, b = system.n_sites, config.sampler.n_walkers
    one = forward(config.ansatz, n, system.n_electrons)
    p = parameters(config.ansatz, n, system.n_electrons)
    # Hops allowed on average if electrons were placed at random.
    share = sum(m / n * (1 - m / n) for m in (system.n_up, system.n_dn))
    connected = 2 * len(system.bonds) * share
    return {
        "sampling": b * round(config.sampler.sweep_factor * n) * one,
        "local energies": b * connected * one,
        "scores": b * 3 * one,
        "Gram matrix": 2.0 * b * b * p,
        "solve": b**3 / 3,
    }
