import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from lm.languages import build, evaluate, hmm
from lm.languages.hmm import HMM, NGram
from tests.lm.languages import brute

FIELDS = dict(
    kind="ngram", path="", vocab=4, n=2, states=8, successors=2, emitted=2, concentration=0.5,
    softmax_scale=1.5, support_k=0, group=3, modulus=3, start="stationary", seed=0,
)  # fmt: skip


def made(**changes):
    return build.language(**FIELDS | changes)


def law(language, length):
    """q of all texts, by the evaluator that test_evaluate holds against brute force."""
    x = jnp.asarray(brute.texts(hmm.vocab(language), length))
    with jax.enable_x64(True):
        return np.exp(evaluate.log_prob(hmm.on_device(language, jnp.float64), x))


def test_pairs_are_equal():
    x = brute.texts(3, 5)
    same = (x[:, 0] == x[:, 1]) & (x[:, 2] == x[:, 3])
    np.testing.assert_allclose(law(build.pairs(3), 5), same / 27, atol=1e-15)


@pytest.mark.parametrize("group", [2, 3, 4])
def test_blocks_of_bits_have_an_even_sum(group):
    language = build.parity(group)
    x = brute.texts(2, 2 * group + 1)
    even = [(x[:, g : g + group].sum(axis=1) % 2 == 0) for g in (0, group)]
    wanted = (even[0] & even[1]) / 2 ** (2 * group - 1)
    np.testing.assert_allclose(law(language, 2 * group + 1), wanted, atol=1e-15)
    assert hmm.states(language) == 4 * (group - 1)


def test_sums_run_on():
    x = brute.texts(3, 5)
    first = x[:, 1] == x[:, 0] % 3
    second = x[:, 3] == (x[:, 1] + x[:, 2]) % 3
    language = build.running_sum(3)
    np.testing.assert_allclose(law(language, 5), (first & second) / 27, atol=1e-15)
    assert hmm.states(language) == 3 + 9


def test_an_ngram_is_its_table():
    start, table = brute.sparse_ngram(3, seed=1)
    language = build.ngram(table, "uniform")
    np.testing.assert_allclose(language.start, np.full((3, 3), 1 / 9))
    np.testing.assert_allclose(
        law(language, 4), brute.of_ngram(np.full((3, 3), 1 / 9), table, 4), atol=1e-15
    )
    assert start.shape == (3, 3)


def test_a_stationary_text_is_a_window():
    language = made(n=3, vocab=3)
    long = law(language, 5).reshape((3,) * 5)
    np.testing.assert_allclose(long.sum(axis=0).reshape(-1), law(language, 4), atol=1e-14)
    np.testing.assert_allclose(long.sum(axis=(2, 3, 4)), language.start, atol=1e-14)


def test_rows_of_random_ngrams():
    many = dict(vocab=8, n=4)
    found = made(**many).table.reshape(-1, 8)
    # Dirichlet(c): variance (1/V)(1 - 1/V) / (V c + 1).
    assert found.var() == pytest.approx(7 / 64 / 5, rel=0.1)
    logits = np.log(made(concentration=0.0, **many).table).reshape(-1, 8)
    assert (logits - logits.mean(axis=1, keepdims=True)).var() == pytest.approx(
        1.5**2 * 7 / 8, rel=0.1
    )
    assert (made(concentration=0.01, **many).table > 0).all()
    hmm.on_device(made(concentration=0.01))


@pytest.mark.parametrize("n", [2, 3])
def test_support_k_keeps_the_largest(n):
    language = made(vocab=6, n=n, support_k=3)
    assert ((language.table > 0).sum(axis=-1) == 3).all()
    # Irreducible and aperiodic: some power has no zero.
    a = (hmm.dense(language).A > 0).astype(int)
    power = a
    for _ in range(10):
        power = (power @ power > 0).astype(int)
    assert power.all()
    assert build.informative(language)


def test_support_k_keeps_what_was_there():
    # With the same numbers drawn: the three largest, divided by their sum.
    for seed in range(20):
        whole = made(vocab=5, seed=seed).table
        kept = made(vocab=5, seed=seed, support_k=4).table
        least = whole == whole.min(axis=1, keepdims=True)
        if not (kept[least] == 0).all():
            continue  # Drawn again.
        wanted = np.where(least, 0, whole)
        np.testing.assert_allclose(kept, wanted / wanted.sum(axis=1, keepdims=True))
        return
    pytest.fail("no table was kept")


def test_random_hmms_are_sparse():
    language = made(kind="hmm", states=12, vocab=5, successors=3, emitted=2)
    assert ((language.A > 0).sum(axis=1) == 3).all()
    assert ((language.B > 0).sum(axis=1) == 2).all()
    assert (language.A[np.arange(12), (np.arange(12) + 1) % 12] > 0).all()
    np.testing.assert_allclose(language.pi @ language.A, language.pi, atol=1e-14)
    uniform = made(kind="hmm", states=12, start="uniform")
    np.testing.assert_allclose(uniform.pi, 1 / 12)
    with pytest.raises(UserError, match="period 8"):
        made(kind="hmm", successors=1)
    made(kind="hmm", successors=1, start="uniform")


def test_a_seed_is_a_table():
    for kind in ("ngram", "hmm"):
        first, again, other = (made(kind=kind, seed=seed)[1] for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - other).max() > 0.1


def test_a_path_wins(tmp_path):
    path = str(tmp_path / "a.npz")
    hmm.save(path, build.pairs(3))
    for kind in ("path", "ngram"):
        found = made(kind=kind, path=path)
        assert isinstance(found, HMM)
        np.testing.assert_array_equal(found.A, build.pairs(3).A)
    with pytest.raises(UserError, match=r"language\.path"):
        made(kind="path")


@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        ("what", "kind", ["what"]),
        ("ngram", "vocab", [1, True]),
        ("ngram", "n", [1, 0, 30]),
        ("ngram", "concentration", [-1.0, float("nan"), float("inf")]),
        ("ngram", "softmax_scale", [-0.5]),
        ("ngram", "support_k", [-1, 5]),
        ("ngram", "start", ["end"]),
        ("ngram", "seed", [-1]),
        ("hmm", "states", [0, 10**5]),
        ("hmm", "successors", [0, 9]),
        ("hmm", "emitted", [0, 5]),
        ("hmm", "start", [""]),
        ("pairs", "vocab", [1]),
        ("parity", "group", [1, 10**5]),
        ("running_sum", "modulus", [1, 10**3]),
    ],
)
def test_fields_out_of_range_are_refused(kind, field, values):
    for value in values:
        with pytest.raises(UserError, match=rf"config\.language\.{field} is "):
            made(**{"kind": kind, field: value})


def test_fields_of_other_kinds_are_not_read():
    made(kind="pairs", n=-1, group=0, states=0, support_k=-1, start="", seed=-1)


def test_no_chain_with_one_successor_is_ergodic(monkeypatch):
    monkeypatch.setattr(build, "TRIES", 20)
    with pytest.raises(UserError, match="support_k is 1"):
        made(support_k=1)


def test_ngrams_without_a_stationary_law_are_refused():
    with pytest.raises(UserError, match="period 2"):
        build.ngram(np.array([[0.0, 1.0], [1.0, 0.0]]))
    with pytest.raises(UserError, match=r"\{0\} \(closed, period 1\)"):
        build.ngram(np.eye(2))
    assert isinstance(build.ngram(np.eye(2), "uniform"), NGram)


def test_full_support_is_not_informative():
    assert not build.informative(made())
    assert not build.informative(hmm.dense(made(n=3)))
    assert not build.informative(HMM([1.0, 0.0], [[0.0, 1.0], [1.0, 0.0]], np.ones((2, 2)) / 2))
    # Zeros that other states make up for: every text has a path.
    covered = HMM([0.5, 0.5], np.full((2, 2), 0.5), np.eye(2))
    assert not build.informative(covered)
    assert build.informative(HMM([1.0, 0.0], np.full((2, 2), 0.5), np.eye(2)))
    for kind in ("pairs", "parity", "running_sum", "hmm"):
        assert build.informative(made(kind=kind))
    zero = np.full((3, 3), 0.5)
    np.fill_diagonal(zero, 0)
    assert build.informative(build.ngram(zero))
