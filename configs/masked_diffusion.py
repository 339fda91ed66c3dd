"""Masked diffusion of text: when parallel writing is efficient, and when it is wrong.

    python main.py --config=configs/masked_diffusion.py            # languages, minutes
    python main.py --config=configs/masked_diffusion.py:text       # bytes of Shakespeare
    python main.py --config=configs/masked_diffusion.py:language --config.language.path=MY.npz
    python main.py --config=configs/masked_diffusion.py:text --do=sample

arXiv:2502.09622. Sizes for a CPU: test; small, a little of everything; e1, token errors of the
exact denoiser against steps; e2, its sequence errors; samplers, all of them on a sparse HMM;
e3, learned n-grams; e4, learned pairs, parity and sums; hmm, a learned sparse HMM; e5, speed
beside an autoregressive model; text (E6), bytes of a real text; language, any pi, A and B of an
.npz. Of the paper and of others: paper, formal languages at 25 M parameters; paper_theory,
lengths to 2048; owt, MDLM's OpenWebText at 130 M; lm1b; llada, 8 B. Their text is a STORE of
`python -m lm.prepare`, --config.data.path.
"""

from configs.base import at_size, base


def get_config(size: str = "small"):
    config = base("lm.masked_diffusion")
    config.steps = 2000
    config.log_every = 50
    config.save_every = 500
    config.batch_size = 64
    config.kind = "mdm"  # mdm or ar, of lm.masked_diffusion.
    config.length = 32  # L
    config.vocab = 0  # V of a corpus; 0: of its tokenizer.
    config.fsdp = False  # Parameters split over the data axis, too.
    # What is written: a formal language, or where its kind is "" the text of `data`.
    config.language = dict(
        kind="ngram",  # ngram, hmm, pairs, parity, running_sum, or "" for text
        path="",  # An .npz with pi [S], A [S, S], B [S, V] in the place of all below.
        vocab=8,  # ngram, hmm, pairs
        n=2,  # ngram
        states=32,  # hmm
        successors=2,  # hmm: of each state
        emitted=2,  # hmm: symbols of each state
        concentration=0.5,  # ngram: Dirichlet rows; 0: softmax of normal logits
        softmax_scale=1.5,
        support_k=0,  # ngram: largest entries kept in each row; 0: all
        group=4,  # parity
        modulus=5,  # running_sum
        start="stationary",  # ngram, hmm: or uniform
        seed=0,  # of the table
        texts=0,  # in the training set; 0: always new ones
    )
    # As in configs/alphadecay.py: a token store, text files, or "" for tinyshakespeare.
    config.data = dict(
        path="",
        valid="",
        holdout=0.1,
        limit=0,
        tokenizer="",
        pack=True,
        end_cut=False,
        order_seed=0,
    )
    config.model = dict(
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
        absolute=True,  # Learned positions beside the rotary ones.
    )
    config.optim = dict(
        name="adamw",
        learning_rate=3e-3,
        warmup=0.05,
        final=0.0,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        clip=1.0,
        weight_decay=0.01,
        rule="uniform",
        independent=False,
        decay_rest="base",
        matched=0.0,
        ratios=dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 0.0),
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
    config.ema = 0.99  # Decay of the average that is judged and sampled; 0: none.
    config.objective = dict(
        kind="continuous",  # continuous, finite (of steps) or count
        schedule="linear",  # linear, cosine, poly2, ...
        grid="uniform",  # of finite: or cosine
        steps=32,
        floor=1e-3,  # Smallest t of continuous.
        stratify=True,  # Low-discrepancy times.
        prompt=0,  # Tokens at the start that stay visible and are not predicted.
        cut=0.0,  # Share of steps whose texts are cut at a random length, as LLaDA's.
        pad_loss=False,  # Whether what follows the end of a document is to be predicted, too.
        per="token",  # Loss per token of the batch; text: each text by its own length.
    )
    # Likelihood: `texts` held-out ones, each at `draws` numbers of masked tokens; of a language
    # `draws` times as many texts.
    # Sampling, at the end: `samples` texts by every sampler at every number of steps.
    config.eval = dict(
        texts=1024,
        draws=8,
        batch_size=128,
        samples=512,
        steps=(1, 2, 4, 8, 16, 32),
        samplers=("ancestral",),
    )
    # Of every sampler of `eval`, `theory` and `--do=sample`; kind and steps are theirs.
    config.sampler = dict(
        kind="ancestral",
        steps=32,
        schedule="linear",
        grid="uniform",
        block=0,  # Left to right in blocks of so many tokens; 0: the whole text.
        cache="none",  # of keys and values outside of the block: prefix or dual
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        candidate="sample",  # confidence, ...: or argmax
        final="sample",  # Tokens left at the last step: or greedy.
        tau=0.9,  # threshold
        gamma=0.1,  # entropy_bound
        per_call=1,  # first_hitting
        remask="cap",  # remask: or rescale, conf, loop
        eta=0.02,
        t_on=0.55,
        t_off=0.05,
        alpha_on=0.9,
        rows=0,  # Positions of a text in one call of the head; 0: by their shapes.
        allow_clamp=True,
    )
    config.guidance = 0.0  # w of --do=sample with a prompt.
    # Runs of lm.masked_theory: the exact denoiser, `batch_size` texts a step. Steps are
    # `steps` and `ratios` times L.
    config.theory = dict(
        lengths=(64, 128, 256),
        steps=(1, 2, 4, 8, 16, 32, 64, 128),
        ratios=(),
        samplers=("ancestral",),
        curve=True,  # The information curve, too, of `draws` times as many texts.
        draws=16,
        exact=4,  # Most tokens of the texts whose law is enumerated; 0: none.
        exact_steps=(1, 2, 4),
    )
    # Texts a second, measured by the report: batch sizes, steps of the samplers; (): not.
    config.speed = dict(batches=(), steps=(8, 32), repeats=3)
    config.sample = dict(count=4, animate=True)
    return at_size(config, size, _sizes())


def _exact(language: dict, batch: int = 64, rounds: int = 16, **theory) -> dict:
    """A run of the exact denoiser: batch * rounds texts."""
    return dict(
        experiment="lm.masked_theory",
        steps=rounds,
        log_every=max(1, rounds // 8),
        save_every=max(1, rounds // 4),
        batch_size=batch,
        language=language,
        theory=theory,
    )


def _both(name: str, language: dict, **more) -> dict:
    """A masked and an autoregressive run of one language."""
    return {
        f"{kind}-{name}": dict(kind=kind, language=language) | more for kind in ("mdm", "ar")
    }


def _sizes() -> dict:
    gram = lambda n, vocab=8: dict(kind="ngram", n=n, vocab=vocab)
    pairs, parity = dict(kind="pairs"), dict(kind="parity")
    hmm, sums = dict(kind="hmm"), dict(kind="running_sum")
    ratios = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)
    powers = (1, 2, 4, 8, 16, 32, 64, 128)
    sequence = dict(steps=(), ratios=ratios, draws=2)
    everything = (
        "ancestral", "count", "first_hitting", "confidence", "margin", "entropy",
        "threshold", "entropy_bound", "remask",
    )  # fmt: skip
    large = dict(
        log_every=100,
        save_every=2000,
        model=dict(dtype="bfloat16", unroll=1, remat=True),
        ema=0.9999,
        eval=dict(texts=10_000, draws=1, batch_size=256, samples=2000),
    )
    open_text = dict(
        large,
        language=dict(kind=""),
        vocab=50_257,
        batch_size=512,
        length=1024,
        model=dict(large["model"], absolute=False, dim=768, mlp=2048, heads=12, depth=12),
        optim=dict(learning_rate=3e-4, warmup=0.0025, final=1.0, weight_decay=0.0),
        eval=dict(
            texts=5000, draws=1, batch_size=64, samples=256,
            steps=(16, 32, 64, 128, 256, 512, 1024), samplers=("ancestral", "remask"),
        ),
        speed=dict(batches=(1, 16, 256), steps=(64, 256)),
        steps=1_000_000,
        save_every=10_000,
        runs=dict(mdm=dict(kind="mdm"), ar=dict(kind="ar")),
    )  # fmt: skip
    return {
        "test": dict(
            steps=4,
            log_every=2,
            save_every=2,
            batch_size=8,
            length=8,
            language=dict(kind="pairs", vocab=3),
            model=dict(dim=16, mlp=24, heads=2, depth=2, unroll=2),
            eval=dict(texts=16, draws=1, batch_size=8, samples=16, steps=(2, 8)),
            theory=dict(lengths=(4, 8), steps=(2, 4), ratios=(), exact=2, exact_steps=(1, 2)),
            runs={
                "exact": _exact(dict(kind="pairs", vocab=3), batch=8, rounds=4),
                **_both("pairs", dict(kind="pairs", vocab=3)),
            },
        ),
        "small": dict(
            theory=dict(lengths=(64, 128, 256)),
            speed=dict(batches=(1, 16, 128)),
            runs={
                "exact-2gram": _exact(gram(2), rounds=8),
                "exact-pairs": _exact(pairs, **sequence),
                "exact-parity": _exact(parity, **sequence),
                **_both("2gram", gram(2)),
                **_both("pairs", pairs),
            },
        ),
        "e1": dict(
            runs={
                f"{n}gram": _exact(gram(n, vocab), rounds=32, steps=powers, draws=64)
                for n, vocab in ((2, 8), (3, 8), (4, 4))
            },
        ),
        "e2": dict(
            runs={
                name: _exact(language, batch=128, rounds=32, **sequence)
                for name, language in (("pairs", pairs), ("parity", parity), ("hmm", hmm))
            },
        ),
        "samplers": dict(
            runs={
                "hmm": _exact(
                    hmm, batch=128, rounds=16, lengths=(64,), steps=(8, 16, 32, 64),
                    samplers=everything, curve=True,
                ),
                "hmm-argmax": dict(
                    _exact(
                        hmm, batch=128, rounds=16, lengths=(64,), steps=(8, 16, 32, 64),
                        samplers=("count", "confidence", "margin", "entropy", "threshold"),
                        curve=True,
                    ),
                    sampler=dict(candidate="argmax"),
                ),
            },
        ),
        "e3": dict(
            n_seeds=2,
            steps=3000,
            length=64,
            eval=dict(texts=2048, samples=1024, steps=(1, 2, 4, 8, 16, 32, 64)),
            runs=_both("2gram", gram(2)) | _both("3gram", gram(3))
            | {"mdm-2gram-32": dict(kind="mdm", language=gram(2), length=32)},
        ),
        "e4": dict(
            steps=3000,
            eval=dict(
                texts=2048, samples=2048, steps=(2, 4, 8, 16, 32, 64, 128),
                samplers=("ancestral", "count"),
            ),
            runs=_both("pairs", pairs)
            | _both("parity", dict(kind="parity", group=3), length=30)
            | _both("sums", sums),
        ),
        "hmm": dict(
            steps=20_000,
            log_every=200,
            save_every=2000,
            eval=dict(texts=2048, samples=2048, samplers=("ancestral", "count")),
            runs=_both("hmm", hmm),
        ),
        "e5": dict(
            length=64,
            steps=1000,
            speed=dict(batches=(1, 4, 16, 64, 128), steps=(8, 16, 32, 64), repeats=7),
            eval=dict(steps=(8, 16, 32, 64), samplers=("ancestral", "count", "confidence")),
            runs=_both("2gram", gram(2)),
        ),
        "text": dict(
            language=dict(kind=""),
            length=128,
            steps=3000,
            batch_size=32,
            model=dict(dim=96, mlp=256, absolute=False),
            optim=dict(learning_rate=4e-3, weight_decay=0.1),
            eval=dict(
                texts=800, draws=4, samples=128, steps=(2, 4, 8, 16, 32, 64, 128),
                samplers=("ancestral", "confidence"),
            ),
            sampler=dict(steps=64),
            runs=dict(mdm=dict(kind="mdm"), ar=dict(kind="ar")),
        ),
        "language": dict(
            language=hmm,  # In the place of a path.
            theory=dict(lengths=(32, 64), ratios=ratios, steps=()),
            runs={
                "exact": dict(
                    experiment="lm.masked_theory", steps=16, batch_size=64, log_every=4,
                    save_every=8,
                ),
                "mdm": dict(kind="mdm"),
                "ar": dict(kind="ar"),
            },
        ),
        "paper": dict(
            large,
            steps=77_343,
            batch_size=256,
            length=512,
            # Three matrices of 1376 are two of 2048.
            model=dict(large["model"], dim=512, mlp=1376, heads=8, depth=8),
            optim=dict(learning_rate=3e-4, warmup=0.01),
            eval=large["eval"] | dict(steps=(8, 16, 32, 64, 128, 256, 512, 1024, 2048)),
            speed=dict(batches=(1, 16, 256)),
            runs={
                name: changes
                for title, language in (
                    ("2gram", gram(2)), ("3gram", gram(3)), ("4gram", gram(4)), ("hmm", hmm),
                )
                for name, changes in _both(
                    title, language | dict(texts=990_000)
                ).items()
            },
        ),
        "paper_theory": dict(
            theory=dict(lengths=(128, 256, 512, 1024, 2048), steps=(*powers, 256, 512)),
            runs={
                **{f"{n}gram": _exact(gram(n), rounds=64) for n in (2, 3, 4)},
                **{
                    name: _exact(language, batch=128, rounds=32, **sequence)
                    for name, language in (("pairs", pairs), ("parity", parity), ("hmm", hmm))
                },
            },
        ),
        "owt": open_text,
        "lm1b": open_text | dict(length=128, vocab=30_522, data=dict(pack=False)),
        "llada": open_text | dict(
            length=4096,
            vocab=126_464,
            batch_size=1280,
            fsdp=True,
            steps=450_000,
            data=dict(end_cut=False),
            objective=dict(cut=0.01),
            model=dict(
                large["model"], absolute=False, dim=4096, mlp=12288, heads=32, depth=32,
                rope_base=5e5, norm_eps=1e-5,
            ),
            optim=dict(learning_rate=4e-4, warmup=0.0045, final=0.025, weight_decay=0.1),
            runs=dict(mdm=dict(kind="mdm")),
            eval=open_text["eval"] | dict(
                texts=10_000, steps=(512, 1024, 2048, 4096),
                samplers=("confidence", "threshold"),
            ),
            sampler=dict(kind="confidence", steps=4096, block=32, cache="dual"),
        ),
    }  # fmt: skip
