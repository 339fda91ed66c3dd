"""The optimal loss of diffusion models: diagnosis, schedule, scaling law (arXiv:2506.13763).

    python main.py --config=configs/optimal_loss.py              # digits, minutes
    python main.py --config=configs/optimal_loss.py:cifar10 --config.data.path=FILE.npz
    python main.py --config=configs/optimal_loss.py:estimate --config.data.path=FOLDER
    python main.py --config=configs/optimal_loss.py --do=sample

On the digits: test; small, four formulations and the optimal-loss schedule; unet, the same
with a convolutional network; schedules, all schedules, three seeds; search, constants of the
optimal-loss schedule; ladder, eight widths of a transformer. cifar10: four formulations.
estimate: the optimum alone, of any data. The literature's: cifar10_edm, cifar10_fm,
imagenet64, imagenet64_adm, imagenet64_ladder, imagenet512, imagenet512_ladder,
imagenet256_dit_s (b, l, xl), latent256; paper, CIFAR-10 with the schedule.
"""

from configs.base import at_size, base


def get_config(size: str = "small"):
    config = base("diffusion.optimal_loss")
    config.steps = 4000
    config.log_every = 100
    config.eval_every = 0
    config.save_every = 2000
    config.n_seeds = 3
    config.batch_size = 256
    config.accumulate = 1  # Slices of the batch, one after the other.
    config.fsdp = False  # Parameters split over the data axis, too.
    config.label_drop = 0.0  # Share of labels left out, for guidance.
    config.augment = 0.0  # Probability of each of EDM's transformations.
    config.data_seed = 0  # Of the order of rows, where data.shuffle; all seeds share it.
    # path: "" for the digits; a folder of images; .npz, .npy; gaussian:HxWxC.
    config.data = dict(
        path="",
        scaling="x/127.5-1",
        resolution=0,
        channels=0,
        num_rows=0,
        shuffle=False,
        class_cond=False,
        flip=False,
        cache="",
    )
    config.process = dict(
        name="edm",  # ve, vp, iddpm, ddpm, edm, fm_linear or gvp
        beta_d=19.9,
        beta_min=0.1,
        sigma_min=0.02,  # of ve, with sigma_max
        sigma_max=100.0,
        steps=1000,
        beta_first=1e-4,
        beta_last=0.02,
    )
    config.target = "F"  # x0, eps, score, v, velocity or F
    config.noise_scale = 1000.0  # Of times from 0 to 1, as the network is told them.
    config.model = dict(
        name="mlp",  # a kind below, or a size such as ddpmpp-32; see diffusion/networks.py
        sigma_data=0.5,
        noise_input="log",  # log: ln(s) / 4 for every process; native: as published
        label_dim=0,  # 0: as many as data.class_cond finds
        dropout=0.0,
        remat=False,
        dtype="float32",
        mlp=dict(width=256, layers=3),
        tiny_unet=dict(model_channels=16, num_blocks=1),
        dit=dict(patch=2, dim=32, depth=3, heads=4),
        unet=dict(
            model_channels=64, channel_mult=(1, 2, 2), num_blocks=2, attn_resolutions=(8,)
        ),
        edm2=dict(
            model_channels=64,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(),
            channels_per_head=32,
        ),
    )
    config.schedule = dict(
        kind="edm",  # see diffusion/schedules.py
        p_mean=-1.2,
        p_std=1.2,
        sigma_min=0.002,
        sigma_max=80.0,
        optimal=dict(
            space="F",
            tau=0.01,
            cap=1.0,
            bump=1.0,
            bump_shift=-0.8,
            bump_width=1.0,
            soft_edge=0.0,
            bins=64,
            warm=25_000,
            every=5_000,
            half_life=10_000,
            mix=0.1,
            least_gap=1e-8,
        ),
    )
    config.optim = dict(
        name="adam",
        learning_rate=2e-3,
        rate="cosine",
        warmup=100,
        decay_from=1,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip=1.0,
    )
    config.ema = dict(
        kind="half_life", images=60_000, ramp=0.05, sigma_rel=(0.05, 0.10), decay=0.9999
    )
    config.estimator = dict(
        name="exact",  # exact, dol, cdol, snis, knn or corrected
        form="trcov",
        subset_size=0,
        c_rule="tapered",
        neighbours=0,
        exact_blocks=24,
        antithetic=False,
        precision="",
        tile=4096,
        block=256,
        sigma_min=0.002,
        sigma_max=80.0,
        points=48,
        more=16,
        pilot=4,
        tau=0.01,
    )
    config.sampler = dict(
        # heun, euler, edm, ddim, ddpm, native_euler, native_heun, euler_maruyama, dpm_2m or
        # dpm_3s
        method="heun",
        grid="edm",  # edm, log_uniform, times (of the process) or flow
        n=18,
        sigma_min=0.002,
        sigma_max=80.0,
        rho=7.0,
        shift=1.0,  # of flow
        start="ve",  # what the first state is: ve, vp or flow
        batch_size=256,
        count=64,  # of --do=sample
        label=-1,  # of all samples; -1: as in the data
        guidance=1.0,
        guide_low=0.0,
        guide_high=0.0,  # 0: at all levels
        rescale=0.0,
        # Of single methods; the others refuse them.
        s_churn=0.0,
        s_min=0.0,
        s_max=float("inf"),
        s_noise=1.0,
        eta=0.0,
        variance="posterior",
        path="linear",
        diffusion="sigma",
        norm=1.0,
        last="mean",
        lower_order_final=True,
        inner="grid",
    )
    config.report = dict(scaling=False)
    config.eval = dict(
        sigma_min=0.002,
        sigma_max=80.0,
        points=32,
        draws=1797,
        block=256,
        samples=2048,
        features="local",  # local, inception or dinov2
        weights="",
        neighbours=3,
        local=dict(steps=300, batch_size=128, width=16, dim=64),
    )
    floor = dict(experiment="diffusion.estimate", steps=57, log_every=1, save_every=10)
    formulation = lambda process, target, kind: dict(
        process=dict(name=process), target=target, schedule=dict(kind=kind)
    )
    formulations = dict(
        edm=formulation("edm", "F", "edm"),
        flow=formulation("fm_linear", "velocity", "fm_uniform"),
        ve=formulation("ve", "score", "ve"),
        vp=formulation("vp", "eps", "vp"),
    )
    optimal = lambda seed=0, **changes: dict(
        init_from=f"floor-seed{seed}", schedule=dict(kind="optimal_loss", optimal=changes)
    )
    # The best of `search`, by local Frechet distance, in either space.
    best_f = dict(space="F", cap=0.03, bump=0.3, mix=0.5)
    best_x0 = dict(space="x0", cap=0.1, bump=0.0)
    kinds = ("edm", "edm2", "vp", "ve", "iddpm", "fm_uniform", "fm_logit_normal")
    schedules = {kind: dict(schedule=dict(kind=kind)) for kind in kinds}
    schedules["edm2"]["schedule"] |= dict(p_mean=-0.4, p_std=1.0)  # That of latents.
    # The same density with EDM's weight: what a mere shift to more noise does.
    schedules["edm_shifted"] = dict(schedule=dict(kind="edm", p_mean=-0.4, p_std=1.0))
    # Constants of the schedule, tried on one seed.
    tried = dict(
        default={}, plain=dict(bump=0.0), bump_3=dict(bump=3.0), left=dict(bump_shift=-1.6),
        narrow=dict(bump_width=0.5), mixed=dict(mix=0.5), soft=dict(soft_edge=0.1),
        cap_3=dict(cap=3.0), cap_03=dict(cap=0.3), cap_01=dict(cap=0.1), cap_003=dict(cap=0.03),
        cap_01_plain=dict(cap=0.1, bump=0.0), cap_003_plain=dict(cap=0.03, bump=0.0),
        cap_001_plain=dict(cap=0.01, bump=0.0), cap_003_half=dict(cap=0.03, bump=0.3, mix=0.5),
    )  # fmt: skip
    search = {
        f"{name}_{space.lower()}": optimal(space=space, **changes)
        for space in ("F", "x0")
        for name, changes in tried.items()
    }
    widths = (8, 12, 16, 24, 32, 48, 64, 96)
    ladder = {f"dim{d:02d}": dict(model=dict(dit=dict(dim=d))) for d in widths}
    unet = dict(model=dict(name="tiny_unet"), steps=3000, batch_size=128, n_seeds=1)
    # Sizes of the literature need their data; until data.path names them, random numbers
    # of the same shape let them be compiled and measured.
    edm2 = lambda size, rate, dropout: dict(
        model=dict(name=f"edm2-{size}", dropout=dropout), optim=dict(learning_rate=rate)
    )
    family = dict(
        edm2_l=edm2("l", 0.008, 0.1),
        edm2_m=edm2("m", 0.009, 0.1),
        edm2_s=edm2("s", 0.01, 0.0),
        edm2_xl=edm2("xl", 0.007, 0.1),
        edm2_xs=edm2("xs", 0.012, 0.0),
        edm2_xxl=edm2("xxl", 0.0065, 0.1),
    )
    published = dict(
        n_seeds=1,
        log_every=100,
        save_every=5000,
        estimator=dict(tile=16384, block=1024),
        eval=dict(draws=8192, samples=0, block=64),
    )
    imagenet64 = published | dict(
        data=dict(path="gaussian:64x64x3", class_cond=True, num_rows=64),
        model=dict(
            name="edm2-s", noise_input="native", label_dim=1000, dtype="bfloat16", remat=True
        ),
        schedule=dict(kind="edm2", p_mean=-0.8, p_std=1.6),
        batch_size=2048,
        accumulate=8,
        fsdp=True,
        steps=524_288,
        optim=dict(
            learning_rate=0.01, rate="inverse_sqrt", warmup=4883, decay_from=35_000, b2=0.99,
            clip=0.0,
        ),
        ema=dict(kind="power"),
        runs=dict(edm2_s=dict()),
    )  # fmt: skip
    imagenet512 = imagenet64 | dict(
        # Latents come with unit variance, twice the 0.5 of the paper: so does the noise.
        data=dict(path="gaussian:64x64x4", class_cond=True, num_rows=64),
        model=imagenet64["model"] | dict(sigma_data=1.0),
        schedule=dict(kind="edm2", p_mean=-0.4 + 0.6931, p_std=1.0),
        sampler=dict(sigma_min=0.004, sigma_max=160.0),
        eval=published["eval"] | dict(sigma_min=0.004, sigma_max=160.0),
        steps=1_048_576,
        optim=imagenet64["optim"] | dict(decay_from=70_000),
    )
    adm = imagenet64 | dict(
        model=dict(
            name="adm-64", noise_input="native", label_dim=1000, dtype="bfloat16",
            dropout=0.1, remat=True,
        ),
        schedule=dict(kind="edm"),
        batch_size=4096,
        steps=610_352,
        optim=dict(learning_rate=1e-4, rate="constant", warmup=2441, clip=0.0),
        ema=dict(images=50_000_000),
        runs=dict(adm=dict()),
    )  # fmt: skip
    dit = lambda size: published | dict(
        data=dict(path="gaussian:32x32x4", class_cond=True, num_rows=64),
        model=dict(
            name=f"sit-{size}/2", noise_input="native", label_dim=1000, dtype="bfloat16",
            sigma_data=1.0, remat=True,
        ),
        process=dict(name="fm_linear"),
        target="velocity",
        schedule=dict(kind="fm_uniform"),
        batch_size=256,
        label_drop=0.1,
        fsdp=True,
        steps=7_006_381,  # 1,400 epochs
        optim=dict(name="adamw", learning_rate=1e-4, rate="constant", warmup=0, clip=0.0),
        ema=dict(kind="plain"),
        runs=dict(sit=dict()),
    )  # fmt: skip
    cifar10_edm = published | dict(
        data=dict(path="gaussian:32x32x3", class_cond=True, num_rows=64),
        model=dict(name="ddpmpp-32", dropout=0.13, noise_input="native", label_dim=10),
        batch_size=512,
        augment=0.12,
        steps=390_625,
        optim=dict(learning_rate=1e-3, rate="constant", warmup=19_531, clip=0.0),
        ema=dict(images=500_000),
        schedule=dict(optimal=dict(warm=5_000_000, every=1_000_000, half_life=500_000)),
        runs=dict(edm=dict()),
    )
    sizes = dict(
        test=dict(
            n_seeds=1, steps=4, log_every=2, save_every=2, batch_size=16, optim=dict(warmup=1),
            model=dict(mlp=dict(width=16)),
            estimator=dict(points=8, more=2, pilot=1, block=64),
            eval=dict(
                points=6, draws=64, block=64, samples=32, local=dict(steps=5, width=4)
            ),
            sampler=dict(n=4, batch_size=32),
            runs=dict(
                floor=dict(experiment="diffusion.estimate", log_every=1),
                flow=formulations["flow"],
                optimal=optimal(warm=16, every=16),
            ),
        ),
        small=dict(),
        unet=unet,
        # Other seeds than those of the search.
        schedules=dict(
            seed=1,
            runs=dict(
                floor=floor,
                optimal_f=optimal(1, space="F"),
                optimal_x0=optimal(1, space="x0"),
                best_f=optimal(1, **best_f),
                best_x0=optimal(1, **best_x0),
                **schedules,
            ),
        ),
        search=dict(n_seeds=1, runs=dict(floor=floor, edm=schedules["edm"], **search)),
        ladder=dict(
            model=dict(name="dit"),
            batch_size=128,
            steps=4000,
            eval_every=500,
            n_seeds=1,
            report=dict(scaling=True),
            eval=dict(samples=0),
            runs=dict(floor=floor, **ladder),
        ),
        cifar10=dict(
            data=dict(path="gaussian:32x32x3", class_cond=False),
            model=dict(name="tiny_unet", tiny_unet=dict(model_channels=16)),
            batch_size=64,
            steps=2000,
            n_seeds=1,
            estimator=dict(block=500),
            eval=dict(draws=500, samples=500),
            runs=dict(floor=floor | dict(steps=8, save_every=2), **formulations),
        ),
        estimate=dict(n_seeds=1, runs=dict(floor=dict(experiment=floor["experiment"])))
        | {n: floor[n] for n in ("steps", "log_every", "save_every")},
        cifar10_edm=cifar10_edm,
        cifar10_fm=cifar10_edm | dict(
            process=dict(name="fm_linear"),
            target="velocity",
            schedule=dict(kind="fm_uniform"), runs=dict(flow=dict()),
        ),
        imagenet64=imagenet64,
        imagenet64_adm=adm,
        imagenet256_dit_s=dit("s"),
        imagenet256_dit_b=dit("b"),
        imagenet256_dit_l=dit("l"),
        imagenet256_dit_xl=dit("xl"),
        imagenet64_ladder=imagenet64 | dict(report=dict(scaling=True), runs=family),
        imagenet512=imagenet512,
        imagenet512_ladder=imagenet512 | dict(report=dict(scaling=True), runs=family),
        latent256=published | dict(
            data=dict(path="gaussian:16x16x32", class_cond=True, num_rows=64),
            model=dict(
                name="lightningdit-xl/1", noise_input="native", label_dim=1000,
                dtype="bfloat16", sigma_data=1.0, remat=True,
            ),
            process=dict(name="fm_linear"),
            target="velocity",
            schedule=dict(kind="fm_logit_normal"),
            batch_size=1024,
            label_drop=0.1,
            fsdp=True,
            steps=80_000,
            optim=dict(name="adamw", learning_rate=2e-4, rate="constant", warmup=0, b2=0.95),
            ema=dict(kind="plain"),
            runs=dict(lightningdit=dict()),
        ),
        paper=cifar10_edm | dict(
            runs=dict(
                edm=dict(),
                floor=dict(experiment="diffusion.estimate", steps=48, log_every=1),
                optimal=optimal(space="F"),
            )
        ),
    )  # fmt: skip
    config.runs = dict(floor=floor, **formulations, optimal=optimal(**best_x0))
    return at_size(config, size, sizes)
