"""Where a structure ends up: a diffusion bridge from the start that is known to the end.

    python main.py --config=configs/bridge.py                  # relaxed molecules, minutes
    python main.py --config=configs/bridge.py --do=predict --input=mine.sdf
    python main.py --config=configs/bridge.py:toy              # a known optimum, minutes
    python main.py --config=configs/bridge.py:qm7 --config.data.path=qm7_etkdg_to_pbe0.npz

arXiv:2410.24220. Sizes for a CPU: test; small, a bridge, a chain of them over trajectories and
direct regression, on 1,327 molecules relaxed by GFN2-xTB; seeds, the same three times; toy, a
coupling in the plane whose optimum is known; qm7, DFT geometries; slabs, adsorbates on metals
that `python -m geometry.prepare` makes. Of the paper: qm9 (also "paper"), molecule3d and oc22,
with --config.data.path=SET of `python -m geometry.prepare`.
"""

from configs.base import at_size, base


def get_config(size: str = "small"):
    config = base("geometry.bridge")
    config.steps = 3000
    config.log_every = 50
    config.save_every = 500
    config.batch_size = 32  # Structures of a step on the average, all packs together.
    config.packs = 0  # Graphs of fixed size that make a step; 0: one for each device.
    config.kind = "bridge"  # bridge; chain, over trajectories; direct: D at t = 0 only
    config.data = dict(
        path="",  # .npz, .extxyz, .xyz, .traj, .db; "": the relax_gfn2 of geometry/data
        stands_for="",  # The set that path should be; a warning says so where it is "".
        target="x_final",  # of .npz: the array with R^T
        split="hash",  # hash (of SMILES), file (what the .npz says), random or scaffold
        split_seed=0,  # of random and scaffold
        limit=0,  # Structures for training; 0: all.
        labels="given",  # or matched: ends relabelled by the nearest symmetry
        mirror="off",  # or closest: mirror images of achiral molecules
        n_full=32,  # Up to so many atoms all pairs are edges; beyond, those within the cutoff.
        cutoff=8.0,  # angstrom
        margin=1.0,  # angstrom, added to it: edges are those of the start.
        max_neighbours=0,  # 0: all
        atoms=0,  # of a pack; 0: what the fullest one needs
        edges=0,
    )
    config.reference = dict(
        name="brownian",  # brownian, ve or vp
        sigma=0.25,  # angstrom; 0: sigma^2 T = kappa times the mean square displacement
        kappa=1.0,  # Of a chain every segment has its own sigma by kappa.
        horizon=1.0,  # T
        sigma_min=0.01,  # ve
        sigma_max=0.5,
        beta_min=0.1,  # vp
        beta_max=6.0,
    )
    config.chain = dict(
        segments=8,  # K
        condition="segment+initial",  # segment, segment+initial or history
        history=2,  # states of history
        steps=2,  # of the sampler in each segment
    )
    config.network = dict(
        name="two_frame",  # two_frame, periodic, equi_transformer, tensor_product or egnn
        features=48,
        layers=3,
        radial=16,
        radius=8.0,  # angstrom, of the last radial function
        species=96,  # the largest atomic number, plus one
        envelope=False,  # Edges fade out at the radius.
        dtype="float32",
        remat=True,
        heads=4,  # equi_transformer
        degree=2,  # tensor_product
    )
    config.loss = dict(
        w_min=0.02,  # of the weight, in units of s
        last=0.999,  # the largest t / T
        distances=0.0,  # 1/angstrom, weight of | |D_ij| - |R^T_ij| | over edges
        bonds=0.0,  # the same over bonds
    )
    config.optim = dict(
        name="adamw",
        learning_rate=2e-3,
        rate="cosine",
        warmup=50,
        decay_from=1,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=1e-4,
        clip=1.0,
    )
    config.ema = 0.999  # Less at first: (1 + i) / (10 + i).
    config.sampler = dict(
        name="mean",  # mean, bridge, posterior, em or pfode
        steps=10,
        noise_mix=0.5,  # bridge
        grid="cosine",  # uniform, cosine or power
        power=2.0,
        eps=1e-3,  # pfode
        drop_last_noise=True,  # em
    )
    # Of geometry.toy_bridge: a perceptron, and paths of each start for table 2.5.
    config.toy = dict(width=256, depth=3, paths=8000)
    # Held-out structures: by so many network calls, and draws of the stochastic bridge.
    config.eval = dict(
        split="test",
        limit=0,
        calls=(1, 2, 5, 10, 20),
        samples=0,
        sample_steps=50,
        pairs="n2",  # or offdiag
        labels="given",  # or matched
        baselines=("identity", "mmff94"),
    )
    return at_size(config, size, _sizes())


def _sizes() -> dict:
    kinds = {
        kind: dict(kind=kind, **more)
        for kind, more in (
            ("bridge", dict(eval=dict(samples=8))),
            ("chain", dict(eval=dict(calls=(8, 16, 32)))),
            ("direct", {}),
        )
    }
    large = dict(
        log_every=200,
        save_every=5000,
        data=dict(cutoff=12.0),
        reference=dict(sigma=0.0),
        network=dict(
            name="equi_transformer", features=256, layers=8, radial=64, radius=12.0, heads=8,
            dtype="bfloat16",
        ),
        optim=dict(learning_rate=2e-4, warmup=10_000, weight_decay=1e-2, clip=5.0),
        ema=0.9999,
    )  # fmt: skip
    qm9 = large | dict(
        steps=300_000, batch_size=256, packs=8, data=large["data"] | dict(stands_for="QM9")
    )
    return {
        "test": dict(
            steps=4,
            log_every=2,
            save_every=2,
            batch_size=8,
            data=dict(limit=16),
            chain=dict(segments=2, steps=1),
            network=dict(features=8, layers=1, radial=4),
            optim=dict(warmup=1),
            eval=dict(limit=4, calls=(1, 2), samples=0, sample_steps=2),
            runs={
                "bridge": dict(kind="bridge", eval=dict(samples=2)),
                "chain": dict(kind="chain"),
                "direct": dict(kind="direct"),
            },
        ),
        "small": dict(runs=kinds),
        "seeds": dict(n_seeds=3, runs=kinds),
        "toy": dict(
            experiment="geometry.toy_bridge",
            steps=6000,
            batch_size=512,
            log_every=200,
            reference=dict(sigma=1.0),
            optim=dict(name="adam", weight_decay=0.0, clip=0.0, warmup=0),
        ),
        # --config.data.path=qm7_etkdg_to_pbe0.npz
        "qm7": dict(
            steps=6000,
            data=dict(target="x_final_matched", stands_for="qm7"),
            reference=dict(sigma=0.6),
            network=dict(features=64, layers=4),
            optim=dict(learning_rate=1e-3),
            runs={name: kinds[name] for name in ("bridge", "direct")},
        ),
        # --config.data.path=SLABS of `python -m geometry.prepare --method=slabs`
        "slabs": dict(
            steps=2000,
            batch_size=16,
            data=dict(cutoff=6.0, n_full=0),
            reference=dict(sigma=0.0),
            network=dict(name="periodic", radius=6.0),
            optim=dict(learning_rate=1e-3),
            eval=dict(baselines=("identity",)),
            runs={name: kinds[name] for name in ("bridge", "chain", "direct")},
        ),
        "paper": qm9,
        "qm9": qm9,
        "molecule3d": large
        | dict(
            steps=1_000_000,
            batch_size=512,
            packs=8,
            data=large["data"] | dict(split="file", stands_for="Molecule3D"),
            network=large["network"] | dict(layers=12),
        ),
        "oc22": large
        | dict(
            steps=200_000,
            batch_size=64,
            packs=8,
            data=large["data"]
            | dict(n_full=0, max_neighbours=20, split="file", stands_for="OC22 IS2RS"),
            network=large["network"] | dict(name="periodic", radial=128),
            optim=large["optim"] | dict(learning_rate=4e-4),
            ema=0.999,
            eval=dict(baselines=("identity",)),
            runs=dict(bridge=dict(kind="bridge"), chain=dict(kind="chain")),
        ),
    }
