"""AlphaDecay: weight decay per module, from the heavy tail of its spectrum (arXiv:2506.14562).

    python main.py --config=configs/alphadecay.py            # byte-level, minutes
    python main.py --config=configs/alphadecay.py:60m --config.data.path=STORE
    python main.py --config=configs/alphadecay.py --do=analyze

Sizes for a CPU: test; small; sweep, uniform decays of many strengths; calibrate, AlphaDecay
alone, for the mean ratios of its controls; comparison, AlphaDecay and all controls at two
decays, six seeds; order, exponents by type on the whole text.
The paper's: 60m, 135m, 350m, 1b, uniform decay and AlphaDecay at 5e-6; 60m_adam, 60m_adamw,
135m_adamw, its tables; paper, its six seeds at 135m. They need a large text, hence a STORE,
a folder of `python -m lm.prepare --source=allenai/c4 --tokenizer=... --out=STORE`.
"""

from configs.base import at_size, base


def get_config(size: str = "small"):
    strengths = {"1e-1": 0.1, "4e-1": 0.4}
    # Time means of AlphaDecay, three seeds of `:calibrate`.
    means = {
        "1e-1": dict(
            matched=2.684,
            ratios=dict(q=1.122, k=1.127, v=1.186, o=1.416, gate=3.350, up=3.543, down=3.347),
        ),
        "4e-1": dict(
            matched=2.824,
            ratios=dict(q=1.112, k=1.098, v=1.652, o=2.076, gate=3.464, up=3.498, down=3.505),
        ),
    }
    config = base("lm.causal")
    config.steps = 1500
    config.log_every = 25
    config.eval_every = 250
    config.save_every = 500
    config.n_seeds = 3
    config.batch_size = 16
    config.accumulate = 1  # Slices of the batch, one after the other.
    config.fsdp = False  # Parameters split over the data axis, too.
    config.pure_bf16 = False  # Weights and moments in bfloat16, too, as in the release.
    config.peak_flops = 0.0  # Of all devices together, for the MFU; 0: as known.
    # path, valid: a token store, text files, or "" for the shipped tinyshakespeare and for
    # the last `holdout` of the first. pack: windows over all documents, or one document a
    # row; end_cut: end cut rows in the end-of-text token.
    config.data = dict(
        path="",
        valid="",
        holdout=0.1,
        limit=200_000,  # Tokens to train on, from the start; 0: all.
        tokenizer="",
        length=64,
        pack=True,
        end_cut=False,
        order_seed=0,
    )
    config.model = dict(
        vocab=256,
        dim=64,
        mlp=172,
        heads=4,
        depth=3,
        kv_heads=0,
        rope_base=1e4,
        norm_eps=1e-6,
        init_std=0.02,
        remat=False,
        unroll=3,
        dtype="float32",
        attention="auto",
        tie=False,
    )
    config.optim = dict(
        name="adamw",  # adamw, adam (coupled L2), lion or muon
        learning_rate=1e-2,
        warmup=0.1,
        final=0.1,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        clip=1.0,
        weight_decay=0.1,
        rule="uniform",  # see optim/pretraining.py
        independent=False,
        decay_rest="base",
        # Of uniform_matched and static_by_type: what AlphaDecay has on average over a run,
        # `ratio_mean` and `ratios` in its summary.json. These are of this size and decay.
        **means["1e-1"],
        shuffle_seed=0,
        rho=1.0,
        awd_factor=1.0,
        alphadecay=dict(
            s1=0.67,
            s2=5.0,
            every=100,
            offset=0,
            min_eigs=50,
            exclude=(),
            fit="median",
            tail=0.5,
            reference="mle",
            assignment="linear",
            score="alpha",
            method="auto",
            quantiles=(0.0, 1.0),
            normalize_mean=False,
            ema=0.0,
            shape_correction="none",
            slip=False,
        ),
    )
    config.eval = dict(tokens=100_000, batch_size=64)
    config.sample = dict(count=2, steps=300, temperature=0.8, top_k=0, top_p=0.95)
    rule = lambda kind, **more: dict(optim=dict(rule=kind, **more))
    sweep = {"3e-2": 0.03, "1e-1": 0.1, "2e-1": 0.2, "4e-1": 0.4, "8e-1": 0.8}
    config.runs = {
        name: rule(name) for name in ("none", "uniform", "uniform_matched", "alphadecay")
    }
    compared = ("uniform", "uniform_matched", "static_by_type", "shuffled", "alphadecay")

    def published(dim, mlp, heads, depth, steps, accumulate, peak=1e-3, **more):
        """The recipe of section 12: Adam with L2, 512 rows of 256 tokens, no packing."""
        unknown = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 0.0)
        return (
            dict(
                steps=steps,
                log_every=50,
                eval_every=5000,
                save_every=1000,
                n_seeds=1,
                batch_size=512,
                accumulate=accumulate,
                data=dict(length=256, pack=False, end_cut=True, limit=0),
                model=dict(
                    vocab=32000,
                    dim=dim,
                    mlp=mlp,
                    heads=heads,
                    depth=depth,
                    remat=dim > 768,
                    unroll=1,
                    dtype="bfloat16",
                ),
                optim=dict(
                    name="adam",
                    learning_rate=peak,
                    weight_decay=5e-6,
                    matched=0.0,
                    ratios=unknown,
                    awd_factor=100.0,
                    alphadecay=dict(every=500),
                ),
                eval=dict(tokens=10_000_000, batch_size=512),
                runs=dict(uniform=rule("uniform"), alphadecay=rule("alphadecay")),
            )
            | more
        )

    def table(decays, names, **optim):
        """All rules of a published table at all its decays: name -> (decay, s2)."""
        return {"none": rule("none", **optim)} | {
            f"{name}_{label}": rule(name, weight_decay=eta, alphadecay=dict(s2=s2), **optim)
            for name in names
            for label, (eta, s2) in decays.items()
        }

    # Sections 13.1 and 13.2.
    tabled = ("uniform", "awd", "adadecay_module", "alphadecay")
    adam = {"1e-5": (1e-5, 3.0), "5e-6": (5e-6, 5.0), "1e-6": (1e-6, 5.0)}
    adamw = {"1e-1": (0.1, 5.0), "5e-2": (0.05, 5.0), "1e-2": (0.01, 5.0)}
    m60 = (512, 1376, 8, 8, 10_000, 4)
    m135 = (768, 2048, 12, 12, 20_000, 8)
    decoupled = table(adamw, tabled, name="adamw")

    sizes = {
        "test": dict(
            steps=6,
            log_every=2,
            eval_every=3,
            save_every=3,
            n_seeds=2,
            batch_size=8,
            data=dict(length=16),
            model=dict(dim=16, mlp=24, heads=2, depth=2),
            optim=dict(alphadecay=dict(every=2, min_eigs=8)),
            eval=dict(tokens=500, batch_size=8),
            sample=dict(count=1, steps=20),
            runs=dict(uniform=rule("uniform"), alphadecay=rule("alphadecay")),
        ),
        "small": dict(),
        "sweep": dict(
            runs={"none": rule("none")}
            | {
                f"uniform_{name}": rule("uniform", weight_decay=eta)
                for name, eta in sweep.items()
            },
        ),
        "comparison": dict(
            n_seeds=6,
            runs={"none": rule("none")}
            | {
                f"{name}_{label}": rule(name, weight_decay=eta, **means[label])
                for name in compared
                for label, eta in strengths.items()
            },
        ),
        "calibrate": dict(
            runs={
                f"alphadecay_{name}": rule("alphadecay", weight_decay=eta)
                for name, eta in strengths.items()
            },
        ),
        # The spec's small model on the whole text: decay has no time to act, exponents do.
        "order": dict(
            steps=600,
            eval_every=50,
            data=dict(limit=0),
            optim=dict(learning_rate=3e-3, weight_decay=0.1),
            runs={"uniform": rule("uniform"), "alphadecay": rule("alphadecay")},
        ),
        "60m": published(*m60),
        "60m_adam": published(*m60, runs=table(adam, tabled)),
        "60m_adamw": published(*m60, runs=decoupled),
        "135m": published(*m135),
        "135m_adamw": published(*m135, runs=decoupled),
        "350m": published(1024, 2736, 16, 24, 60_000, 16),
        "1b": published(2048, 5461, 32, 24, 90_000, 32, peak=6e-4),
        "paper": published(*m135, runs=table(adam, tabled), n_seeds=6, seed=5),
    }
    return at_size(config, size, sizes)
