"""Runs of the two experiments: texts, likelihoods, sampling, resuming, devices, bad configs."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import config as configs
from common import mesh as meshes
from common import runner
from common.errors import UserError
from lm import masked_diffusion, masked_theory
from lm.languages import build, evaluate, hmm, theory
from lm.masked import curve, known, parts, rows, settings, sweep, texts

pytestmark = pytest.mark.xdist_group("masked-runs")
PATH = "configs/masked_diffusion.py:test"


def setting(**changes):
    made = configs.load(PATH)
    configs.apply(made, changes)
    return made


def variant(name, **changes):
    """The config of one run of the file."""
    made = setting()
    configs.apply(made, made.runs[name])
    configs.apply(made, changes)
    made.mesh.data = 1
    return made


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat and the dog sat too. " * 40)
    return str(path)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "many.txt"
    path.write_text("\f".join(["abc", "abcdefghijkl", "ab", "abcde"] * 6))
    return str(path)


def text_config(path, **changes):
    made = variant("mdm-pairs", language=dict(kind=""), data=dict(path=path, holdout=0.3))
    configs.apply(made, changes)
    return made


def read(source, batch):
    """Texts of a batch, as a step reads them."""
    return source.texts(jax.tree.map(jnp.asarray, batch))


def test_texts_of_a_language_are_numbers():
    config = variant("mdm-pairs", language=dict(texts=20), length=6)
    source = texts.of_language(config)
    first, free = read(source, source.batch(0))
    again, _ = read(source, source.batch(0))
    np.testing.assert_array_equal(first, again)
    assert free.all()
    assert np.all(np.asarray(first)[:, ::2] == np.asarray(first)[:, 1::2])
    numbers = np.concatenate([source.batch(i)["text"] for i in range(5)])
    assert sorted(numbers[:20]) == list(range(20))
    assert sorted(numbers[20:40]) == list(range(20))
    assert not np.array_equal(numbers[:20], numbers[20:])
    config.seed = 1
    other = texts.of_language(config)
    assert not np.array_equal(read(other, other.batch(0))[0], first)
    here = next(source.held_out(8, 8))
    np.testing.assert_array_equal(
        read(source, here)[0], read(other, next(other.held_out(8, 8)))[0]
    )
    assert not np.array_equal(
        read(source, here)[0], read(source, {**here, "part": 0 * here["part"]})[0]
    )


def test_new_texts_do_not_repeat():
    source = texts.of_language(variant("mdm-pairs"))
    numbers = np.concatenate([source.batch(i)["text"] for i in range(4)])
    assert len(set(numbers.tolist())) == 32


def test_windows_of_a_corpus(corpus_file):
    source = parts.source_of(text_config(corpus_file))
    x, _ = read(source, source.batch(3))
    assert x.shape == (8, 8)
    assert source.vocab == 256
    assert not source.ragged
    whole = bytes(np.asarray(source.train.tokens, np.uint8))
    assert all(bytes(np.asarray(row, np.uint8)) in whole for row in x)
    held = list(source.held_out(16, 8))
    assert sum(int(read(source, one)[1].sum()) for one in held) == 16 * 8
    prompted = parts.source_of(text_config(corpus_file, objective=dict(prompt=3)))
    assert not read(prompted, prompted.batch(3))[1][:, :3].any()


def test_documents_as_rows_end_in_what_nobody_sees(documents):
    config = text_config(documents, data=dict(pack=False))
    source = parts.source_of(config)
    assert source.ragged
    x, free = (np.asarray(a) for a in read(source, source.batch(0)))
    assert np.all((x == 257) == ~free)
    lengths = {bytes(r[k].astype(np.uint8)).strip(b"\f") for r, k in zip(x, free, strict=True)}
    assert lengths <= {b"abc", b"abcdefgh", b"ab", b"abcde"}
    found = parts.parts_of(config)
    assert found.fields["vocab"] == 258
    params = found.model.init(jax.random.key(0))
    one = found.denoiser.hidden(params, jnp.asarray(x))
    other = found.denoiser.hidden(params, jnp.where(free, x, 257))
    np.testing.assert_array_equal(one, other)
    learnt = parts.source_of(
        text_config(documents, data=dict(pack=False), objective=dict(pad_loss=True))
    )
    x, free = read(learnt, learnt.batch(0))
    assert free.all()
    assert np.asarray(x).max() < 256


def test_the_likelihood_of_ragged_texts_is_unbiased(documents):
    """With a model that says nothing each token costs log V, whatever is drawn."""
    config = text_config(documents, data=dict(pack=False), eval=dict(texts=6, draws=2))
    made = parts.parts_of(config)
    params = jax.tree.map(jnp.zeros_like, made.model.init(jax.random.key(0)))
    found = masked_diffusion._count(config, made, params)
    assert found["nats"] == pytest.approx(np.log(256), rel=1e-5)
    assert found["nats_error"] < 1e-4


def test_the_curve_of_a_model_that_says_nothing():
    config = variant("mdm-pairs", eval=dict(texts=64, draws=2))
    made = parts.parts_of(config)
    params = jax.tree.map(jnp.zeros_like, made.model.init(jax.random.key(0)))
    found = masked_diffusion._curve(config, made, params)
    entropy = np.log(3) / 2
    assert found["nats"] == pytest.approx(np.log(3), rel=1e-5)
    assert found["entropy"] == pytest.approx(entropy, rel=1e-5)
    np.testing.assert_allclose(found["h"], np.log(3) - entropy, rtol=1e-4)
    # A masked token is known if its other half is visible.
    h = 1 - np.arange(8) / 7
    assert np.all(
        np.abs(found["exact"] + entropy - h * np.log(3)) < 5 * found["exact_error"] + 1e-5
    )
    assert abs(found["gap"] - entropy) < 5 * found["gap_error"] + 1e-5


def test_prompts_are_taken_off_the_entropy():
    config = variant("mdm-pairs", objective=dict(prompt=1), eval=dict(texts=64))
    made = parts.parts_of(config)
    params = jax.tree.map(jnp.zeros_like, made.model.init(jax.random.key(0)))
    found = masked_diffusion._curve(config, made, params)
    # The first of seven tokens is known, the others are three pairs.
    assert found["entropy"] == pytest.approx(3 * np.log(3) / 7, rel=1e-5)
    assert len(found["h"]) == 7


def test_the_likelihood_of_an_autoregressive_model():
    config = variant("ar-pairs", eval=dict(texts=32))
    made = parts.parts_of(config)
    params = jax.tree.map(jnp.zeros_like, made.model.init(jax.random.key(0)))
    found = masked_diffusion._likelihood(config, made, params)
    assert found["nats"] == pytest.approx(np.log(3), rel=1e-5)
    assert found["gap"] == pytest.approx(np.log(3) / 2, rel=1e-5)


def test_losses_of_both_kinds_by_hand():
    """Per token or per text, and cut texts count what is left."""
    nats, tokens = jnp.array([2.0, 9.0]), jnp.array([2, 3])
    assert masked_diffusion._mean(nats, tokens, "token") == pytest.approx(11 / 5)
    assert masked_diffusion._mean(nats, tokens, "text") == pytest.approx(2.0)
    config = variant("mdm-pairs", objective=dict(cut=1.0))
    made = parts.parts_of(config)
    assert (made.pad, made.fields["vocab"]) == (4, 5)
    params = jax.tree.map(jnp.zeros_like, made.model.init(jax.random.key(0)))
    loss = masked_diffusion._mdm_loss(config, made)
    x = jnp.zeros((64, 8), jnp.int32)
    found = [float(loss(params, x, x == 0, jax.random.key(i))) for i in range(6)]
    assert np.mean(found) == pytest.approx(np.log(3), rel=0.2)


def test_a_sweep_draws_the_same_texts_in_any_batches():
    found = []
    for size in (4, 8):
        config = variant("mdm-pairs", eval=dict(batch_size=size, samples=8))
        made = parts.parts_of(config)
        params = made.model.init(jax.random.key(0))
        one = settings.settings(kind="ancestral", steps=4)
        found.append(sweep.drawn(config, made, params, one, 8))
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_array_equal(found[0].calls, found[1].calls)


def test_a_sweep_gives_the_prompts_that_training_gave():
    config = variant("mdm-pairs", objective=dict(prompt=3), eval=dict(samples=8, steps=(4,)))
    made = parts.parts_of(config)
    params = made.model.init(jax.random.key(0))
    prompt = sweep.prompts(config, made)
    assert np.all(prompt[:, 0] == prompt[:, 1])
    assert np.all((prompt == made.mask) == (np.arange(8) >= 3))
    one = settings.settings(kind="ancestral", steps=4)
    found = sweep.drawn(config, made, params, one, 8, prompt)
    np.testing.assert_array_equal(found.tokens[:, :3], prompt[:, :3])
    assert np.all((found.when < 0) == (np.arange(8) < 3))
    right = np.array([[0, 0, 1, 1, 2, 2, 0, 0]] * 2)
    score = sweep.scores(made.source.language, right, 3, 3)
    # Of five tokens the first is known, the others are two pairs.
    assert score["ter"] == pytest.approx(2 * np.log(3) / 5, rel=1e-5)
    assert sweep.measured(config, made, params)["calls_ancestral"][0] <= 4


def test_samplers_of_a_sweep_are_those_that_differ():
    config = variant("mdm-pairs", eval=dict(steps=(2, 8, 16, 32)))
    steps = lambda kind: [made.steps for made in sweep.variants(config, kind, 3)]
    assert steps("ancestral") == [2, 8, 16, 32]
    assert steps("count") == [2, 8]  # Clamped to L.
    assert len(steps("first_hitting")) == 1


def test_scores_count_what_is_wrong():
    language = hmm.on_device(build.pairs(3))
    tokens = np.array([[0, 0, 1, 1], [0, 1, 2, 2], [2, 2, 2, 2], [1, 1, 0, 2]])
    found = sweep.scores(language, tokens, 3)
    assert (found["ser"], found["unsupported"]) == (0.5, 0.5)
    assert found["ter"] == pytest.approx(np.log(3) / 2, rel=1e-5)
    assert "ser" not in sweep.scores(None, tokens, 3)


@pytest.fixture(scope="module")
def exact():
    """A run of the exact denoiser on pairs, and its last figures."""
    config = variant(
        "exact", batch_size=64, steps=32, theory=dict(lengths=(8,), steps=(2, 4, 8))
    )
    samplers = ("ancestral", "count", "first_hitting")
    configs.apply(config, dict(theory=dict(samplers=samplers)))
    return config, *play(config, 32)


def play(config, steps, state=None, first=0):
    """The state after some steps, and the figures of its evaluation."""
    experiment = runner.make(config)
    with jax.set_mesh(meshes.make(**config.mesh)):
        state = jax.jit(experiment.init)(jax.random.key(0)) if state is None else state
        step = jax.jit(experiment.step)
        for i in range(first, first + steps):
            state, values = step(
                state, experiment.batch(i), jax.random.fold_in(jax.random.key(7), i)
            )
            assert all(np.isfinite(v) for v in jax.device_get(values).values())
        return state, experiment.evaluate(state, jax.random.key(0))


def test_the_exact_denoiser_has_the_closed_forms(exact):
    config, _, found = exact
    row = {"split": "eval", "step": 32} | {k: np.asarray(v).tolist() for k, v in found.items()}
    made = rows.one_run(runner.Run("exact-seed0", config, [row], {}, lambda: None))
    gaps = {(r["sampler"], r["steps"]): (r["gap"], r["gap_error"]) for r in made}
    for i, steps in enumerate((2, 4, 8)):
        want = theory.pairs_ser(8, 3, np.full(steps, 1 / steps))
        got, error = found["ser_ancestral_8"][i], found["ser_error_ancestral_8"][i]
        assert abs(got - want) < 4.5 * max(error, 0.01)
        calls = known.calls(config, 8, steps)
        # Of 2,048 texts, whose calls have a spread of 0.9 at most.
        assert found["calls_ancestral_8"][i] == pytest.approx(calls, rel=0.02)
        tie = np.log(3) / 2 / steps  # A tie costs the second of a pair log V.
        gap, error = gaps["ancestral", steps]
        assert abs(gap - tie) < 4.5 * error
        assert error < 0.15 * tie
    assert gaps["count", 8] == pytest.approx((0, 0), abs=1e-12)
    # Both of a pair among the four that come first, or the four that come last: 3/7.
    gap, error = gaps["count", 2]
    assert abs(gap - 3 / 7 * np.log(3) / 2) < 4.5 * error
    assert all(r["ser"] <= rows.ser_bound([r]) + 3 * r["ser_error"] + 0.02 for r in made)
    assert found["ser_count_8"][-1] == 0
    assert found["ser_first_hitting_8"] == 0
    assert found["calls_first_hitting_8"] == 8
    assert rows.ser_bound([r for r in made if r["sampler"] == "first_hitting"]) == 0
    assert found["calls_count_8"].tolist() == [2, 4, 8]
    np.testing.assert_allclose(found["ter_count_8"], np.log(3) / 2, rtol=1e-5)
    assert abs(found["nelbo_8"]) < 4.5 * found["nelbo_error_8"]
    assert found["entropy_8"] == pytest.approx(np.log(3) / 2, rel=1e-5)
    np.testing.assert_allclose(
        found["exact_ser"],
        [theory.pairs_ser(2, 3, np.full(n, 1 / n)) for n in (1, 2)],
        atol=1e-9,
    )


def test_sums_go_on_where_they_stopped(exact):
    config, whole, _ = exact
    half, _ = play(config, 16)
    rest, _ = play(config, 16, half, 16)
    chex.assert_trees_all_equal(rest, whole)


def test_eight_devices_measure_what_one_does(exact):
    config, whole, _ = exact
    shared = config.copy_and_resolve_references()
    shared.mesh.data = 8
    found, _ = play(shared, 32)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(whole), rtol=1e-5)


def test_eight_devices_train_and_sample_as_one():
    config = variant("mdm-pairs", model=dict(dtype="float32"), steps=3)
    one, figures = play(config, 3)
    config.mesh.data = 8
    many, others = play(config, 3)
    chex.assert_trees_all_close(
        jax.device_get(one.params), jax.device_get(many.params), atol=2e-5
    )
    assert figures["nats"] == pytest.approx(others["nats"], abs=1e-4)
    params, found = jax.device_get(parts.judged_params(one)), []
    for devices in (1, 8):
        config.mesh.data = devices
        with jax.set_mesh(meshes.make(**config.mesh)):
            made = parts.parts_of(config)
            sampler = settings.settings(kind="ancestral", steps=4)
            found.append(sweep.drawn(config, made, params, sampler, 16).tokens)
    np.testing.assert_array_equal(*found)


def test_a_masked_model_learns_pairs():
    """A small one takes a good part of the gap that a random model has, and none too many."""
    config = variant("mdm-pairs", language=dict(vocab=2), length=4, steps=150, ema=0.9)
    configs.apply(config, dict(batch_size=64, optim=dict(learning_rate=1e-2)))
    configs.apply(config, dict(model=dict(dim=16, mlp=32, depth=1, unroll=1)))
    configs.apply(config, dict(eval=dict(texts=256, samples=64, steps=(8,))))
    _, found = play(config, 150)
    assert found["gap_error"] < 0.02
    assert -3 * found["gap_error"] < found["gap"] < 0.6 * np.log(2) / 2
    assert found["ser_ancestral"][0] < 0.7


def test_rows_know_bound_and_gap():
    config = variant("mdm-pairs", steps=2)
    h = np.linspace(0.5, 0.1, 8)
    row = {
        "split": "eval", "step": 2, "nats": 0.9, "nats_error": 0.02, "entropy": 0.6,
        "gap": 0.3, "gap_error": 0.01,
        "h": h.tolist(), "h_error": [0.0] * 8, "steps_ancestral": [2, 8],
        "ser_ancestral": [0.5, 0.25], "ter_ancestral": [0.7, float("nan")],
    }  # fmt: skip
    run = runner.Run("mdm-pairs-seed0", config, [row], {}, lambda: None)
    made = rows.one_run(run)
    assert [r["steps"] for r in made] == [2, 8]
    for one in made:
        want = curve.ancestral(8, np.full(one["steps"], 1 / one["steps"])) @ h
        assert one["gap"] == pytest.approx(want)
        assert one["ter_bound"] == pytest.approx(want + 0.6)
    assert made[1]["ter"] is None
    assert made[0]["variant"] == "mdm-pairs"
    assert len({rows.digest(config), rows.digest(variant("mdm-pairs", steps=3))}) == 2


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("mdm-pairs", dict(kind="masked"), "config.kind is 'masked'"),
        ("mdm-pairs", dict(batch_size=0), "config.batch_size is 0"),
        ("mdm-pairs", dict(length=0), "config.length is 0"),
        ("mdm-pairs", dict(ema=1.0), "config.ema is 1.0"),
        ("mdm-pairs", dict(objective=dict(prompt=8)), "config.objective.prompt is 8"),
        ("mdm-pairs", dict(objective=dict(cut=2.0)), "config.objective.cut is 2.0"),
        ("mdm-pairs", dict(objective=dict(per="row")), "config.objective.per is 'row'"),
        ("mdm-pairs", dict(eval=dict(texts=0)), "config.eval.texts is 0"),
        ("mdm-pairs", dict(eval=dict(samplers=("best",))), "sampler.kind is 'best'"),
        ("mdm-pairs", dict(eval=dict(steps=(0,))), "sampler.steps is 0"),
        ("mdm-pairs", dict(language=dict(texts=-1)), "config.language.texts is -1"),
        ("mdm-pairs", dict(language=dict(kind=""), vocab=100), "config.vocab is 100"),
        ("exact", dict(language=dict(kind="")), "config.language.kind is ''"),
        ("exact", dict(theory=dict(lengths=())), "config.theory.lengths is ()"),
        ("exact", dict(theory=dict(exact=-1)), "config.theory.exact is -1"),
        ("exact", dict(theory=dict(exact_steps=(0,))), "config.theory.exact_steps is (0,)"),
        ("exact", dict(theory=dict(ratios=(-1.0,))), "config.theory.ratios is (-1.0,)"),
        ("exact", dict(theory=dict(draws=0)), "config.theory.draws is 0"),
        ("exact", dict(theory=dict(draws=1, lengths=(64,))), "config.theory.draws is 1"),
        ("mdm-pairs", dict(language=dict(kind=""), length=100_000), "config.length is 100000"),
        ("mdm-pairs", dict(sampler=dict(top_k=4)), "sampler.top_k is 4"),
        ("mdm-pairs", dict(eval=dict(texts=15)), "config.eval.texts is 15"),
        ("mdm-pairs", dict(objective=dict(floor=0.0)), "config.objective.floor is 0.0"),
        ("exact", dict(theory=dict(samplers=("best",))), "sampler.kind is 'best'"),
        ("exact", dict(theory=dict(steps=(9,), samplers=("count",))), "theory.steps is"),
    ],
)
def test_what_cannot_be_is_refused_before_training(name, changes, said):
    config = variant(name)
    configs.apply(config, changes)
    with pytest.raises(UserError) as error:
        runner.make(config)
    assert said in str(error.value)


def test_only_draws_from_f_itself_have_a_bound():
    """Colder or cut draws have another law, which can be worse than NELBO_T says."""
    config = variant("mdm-pairs")
    for changes in (
        dict(temperature=0.5), dict(top_k=2), dict(top_p=0.9), dict(final="greedy"),
    ):  # fmt: skip
        configs.apply(config, dict(sampler=changes))
        assert rows.excess(config, "ancestral", 8, 4) is None
        assert known.token_gap(config, 8, np.array([4])) is None
        assert known.sequence_error(config, 8, np.array([4])) is None
        assert known.gap_bound(config, 0.5, 4) is None
        ar = rows.excess(config, rows.AR, 8, 8)
        assert (ar is None) == ("final" not in changes)
        config = variant("mdm-pairs")
    assert known.gap_bound(config, 0.5, 4) == pytest.approx(0.125)


def test_a_small_text_does_not_silently_stand_in_for_a_large_one():
    config = variant("mdm-pairs", language=dict(kind=""), vocab=50_257)
    with pytest.warns(UserWarning, match=r"config\.data\.path is '': a small text"):
        runner.make(config)


def test_uneven_steps_have_a_larger_bound():
    """Pairs, T = 8, alpha = 1 - t^4: a gap above (h(0) - h(1)) / T."""
    config = variant("mdm-pairs", language=dict(vocab=8), sampler=dict(schedule="poly4"))
    drop = np.subtract(*known.ends(config, 8))
    gap = known.token_gap(config, 8, np.array([8]))[0]
    assert drop / 8 < gap < known.gap_bound(config, drop, 8)


def test_a_file_that_changes_under_a_run_is_refused(tmp_path):
    rng = np.random.default_rng(3)
    one, two = (build.random_hmm(rng, 4, 3, 2, 1) for _ in range(2))
    hmm.save(tmp_path / "mine.npz", one)
    config = variant("exact", language=dict(path=str(tmp_path / "mine.npz")))
    state, _ = play(config, 1)
    hmm.save(tmp_path / "mine.npz", two)
    with pytest.raises(UserError, match=r"config\.language\.path is .*it has changed"):
        play(config, 0, state)


def test_the_law_of_a_users_language(tmp_path):
    """pi, A and B of a file: TER, SER and the exact law by the ordinary command."""
    path = tmp_path / "mine.npz"
    rng = np.random.default_rng(3)
    hmm.save(path, build.random_hmm(rng, 4, 3, 2, 1))
    config = variant("exact", language=dict(path=str(path)), theory=dict(lengths=(6,), exact=3))
    _, found = play(config, 2)
    assert 0 <= found["ser_ancestral_6"][0] <= 1
    run = runner.Run("exact", config, [], {}, lambda: None)
    said = runner.make(config).actions["law"](run, tmp_path)
    with np.load(tmp_path / "law.npz") as law:
        np.testing.assert_allclose(law["p"].sum(axis=1), 1, atol=1e-9)
        wrong = law["p"][:, law["q"] == 0].sum(axis=1)
        every = law["texts"]
    np.testing.assert_allclose(found["exact_ser"], wrong, atol=1e-12)
    assert f"{len(every)} texts of 3 tokens" in said
    x = evaluate.draw(jax.random.key(0), hmm.on_device(hmm.load(path)), 50, 3)
    code = np.asarray(x) @ 3 ** np.arange(2, -1, -1)
    with np.load(tmp_path / "law.npz") as law:
        assert np.all(law["q"][code] > 0)
    assert masked_theory.exact(config, hmm.load(path)).q.sum() == pytest.approx(1)
    config.theory.exact = 50
    assert masked_theory.exact_length(config, 3) == 8
    assert masked_theory.exact_length(config, 20) == 3
    assert json.dumps(configs.to_dict(config))
