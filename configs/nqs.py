"""Transformer quantum states for the doped 2D Hubbard model (Gu et al., arXiv:2507.02644).

    python main.py --config=configs/nqs.py              # eight sites, doped; minutes
    python main.py --config=configs/nqs.py:4x4_doped    # (7,7) on 4x4, periodic
    python main.py --config=configs/nqs.py:paper --do=compile   # 16x16: memory and FLOPs

Sizes: test, small, 4x4, 4x4_doped, paper, paper_tpu (a TPU has no float64 determinants).
Energies are in units of t.
"""

from configs.base import at_size, base


def get_config(size: str = "small"):
    config = base("nqs.hubbard")
    config.x64 = True
    config.steps = 250
    config.log_every = 5
    config.save_every = 50
    config.n_seeds = 3
    # Boundaries: open, periodic or antiperiodic; a cylinder is one of each.
    config.lattice = dict(Lx=4, Ly=2, bc_x="periodic", bc_y="open")
    # H = -t sum_nn - tp sum_nnn + U sum_i n_up n_dn; the cuprate-like tp is -0.2.
    config.model = dict(t=1.0, tp=0.0, U=8.0, n_up=3, n_dn=3)
    # A field h on the spins: none, neel or stripe (with its period along x).
    config.pinning = dict(h=0.0, pattern="none", period=8)
    # name: transformer, nnb, tensor or slater.
    config.ansatz = dict(
        name="transformer",
        d_model=32,
        n_heads=4,
        n_layers=2,
        n_det=8,
        mlp_hidden=256,
        mlp_layers=2,
        embed_scale=0.3,
    )
    # orbitals: random, or mean_field: the lowest Hartree-Fock determinants plus noise, in
    # units of a random start.
    config.start = dict(orbitals="mean_field", noise=0.1)
    # Each walker makes sweep_factor * N proposals per step.
    config.sampler = dict(n_walkers=512, sweep_factor=2.5, thermalize=20)
    # chunk: configurations per forward pass and device; clip: of local energies in the
    # gradient, in mean absolute deviations, 0 for none; score_chunk: gradients at once.
    config.eloc = dict(chunk=2048, clip=5.0, score_chunk=256)
    # name: march, spring, minsr, adam or sgd. max_norm is the length of a step,
    #   max_norm * min((k + 1) / warmup, 1 / (1 + max(k - decay_start, 0) / decay_scale)).
    config.optim = dict(
        name="march",
        mu=0.95,
        beta=0.995,
        damping=1e-2,
        eps=1e-3,
        normalize_v=True,
        difference="raw",  # or momentum
        decay="sum",  # or ema
        preconditioner="sqrt",  # or quarter
        max_norm=0.2,
        norm_mode="cap",  # or fixed
        decay_start=100,
        decay_scale=50.0,
        warmup=10,
        learning_rate=1e-3,  # of adam and sgd alone
    )
    # linalg: the optimizer's. A TPU has no float64 determinants: float32 there.
    config.precision = dict(net="float32", determinants="float64", linalg="float64")
    # blocks measurements, sweeps apart, after thermalize sweeps, parameters frozen.
    config.eval = dict(blocks=128, sweeps=1, thermalize=20)

    four = dict(
        lattice=dict(Lx=4, Ly=4, bc_y="periodic"),
        optim=dict(max_norm=0.4, decay_start=500, decay_scale=300.0),
        steps=1200,
        save_every=100,
        n_seeds=1,
    )
    paper = dict(
        steps=100_000,
        log_every=50,
        save_every=500,
        n_seeds=1,
        lattice=dict(Lx=16, Ly=16, bc_y="periodic"),
        model=dict(n_up=112, n_dn=112),
        ansatz=dict(d_model=256, n_layers=4, n_det=4),
        sampler=dict(n_walkers=4096, thermalize=50),
        eloc=dict(chunk=1024, score_chunk=64),
        optim=dict(
            damping=1e-3,
            max_norm=0.316,
            decay_start=8000,
            decay_scale=8000.0,
            warmup=50,
        ),
        eval=dict(blocks=256, thermalize=50),
    )
    sizes = dict(
        test=dict(
            steps=6,
            log_every=2,
            save_every=3,
            n_seeds=1,
            lattice=dict(Lx=3),
            model=dict(n_up=2, n_dn=2),
            ansatz=dict(d_model=8, n_heads=2, n_layers=1, n_det=2),
            sampler=dict(n_walkers=32, thermalize=2),
            eloc=dict(chunk=64, score_chunk=16),
            eval=dict(blocks=16, thermalize=2),
        ),
        small=dict(),
        **{
            "4x4": four | dict(model=dict(n_up=8, n_dn=8)),
            "4x4_doped": four | dict(model=dict(n_up=7, n_dn=7)),
        },
        paper=paper,
        paper_tpu=paper
        | dict(
            x64=False,
            precision=dict(determinants="float32", linalg="float32"),
        ),
    )
    return at_size(config, size, sizes)
