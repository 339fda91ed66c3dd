"""Tables, their checks, entropies, curves and closed forms against enumeration."""

from itertools import product

import jax
import numpy as np
import pytest

from common.errors import UserError
from lm.languages import build, hmm, information, theory
from lm.languages.oracle import oracle
from lm.masked import enumeration
from tests.lm.languages.small import LANGUAGES, LENGTH, law, texts

FIELDS = dict(
    kind="ngram", path="", vocab=4, n=2, states=6, successors=2, emitted=2, concentration=0.5,
    softmax_scale=1.5, support_k=0, group=4, modulus=3, start="stationary", seed=0,
)  # fmt: skip


def made(**fields):
    return build.language(**FIELDS | fields)


def test_pairs_parity_and_sums_are_what_they_say():
    for text, p in zip(texts(3), law(build.pairs(3)), strict=True):
        assert p == pytest.approx(1 / 9 if all(text[::2] == text[1::2]) else 0)
    for text, p in zip(texts(2), law(build.parity(4)), strict=True):
        assert p == pytest.approx(1 / 8 if text.sum() % 2 == 0 else 0)
    for text, p in zip(texts(3), law(build.running_sum(3)), strict=True):
        right = text[1] == text[0] and text[3] == (text[1] + text[2]) % 3
        assert p == pytest.approx(1 / 9 if right else 0)


@pytest.mark.parametrize("kind", ["ngram", "hmm", "pairs", "parity", "running_sum"])
def test_every_kind_is_a_law_and_the_same_every_time(kind):
    one, two = hmm.check(made(kind=kind)), made(kind=kind)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert build.informative(one) == (kind != "ngram")
    if kind in ("ngram", "hmm"):
        assert not np.array_equal(one[1], made(kind=kind, seed=1)[1])
        a = hmm.dense(one)
        np.testing.assert_allclose(a.pi @ a.A, a.pi, atol=1e-12)


def test_random_tables_have_the_wanted_zeros():
    table = made(n=3, support_k=2).table
    assert np.all((table > 0).sum(axis=-1) == 2)
    assert hmm.classes(hmm.dense(made(n=3, support_k=2)).A).count == 1
    found = made(kind="hmm", states=9, successors=3, emitted=2)
    assert np.all((found.A > 0).sum(axis=1) == 3)
    assert np.all((found.B > 0).sum(axis=1) == 2)
    assert np.all(found.A[np.arange(9), (np.arange(9) + 1) % 9] > 0)
    assert np.all(made(concentration=0.0).table > 0)
    assert np.all(made(start="uniform", n=3).start == 1 / 16)
    large = made(vocab=12, n=4)  # 1728 contexts, by iterating.
    step = np.einsum("ok,okv->kv", large.start.reshape(12, -1), large.table.reshape(12, -1, 12))
    np.testing.assert_allclose(step.reshape(-1), large.start.reshape(-1), atol=1e-12)


def test_a_file_is_a_language(tmp_path):
    language = LANGUAGES["hmm"]
    path = tmp_path / "mine.npz"
    hmm.save(path, language)
    found = made(kind="path", path=str(path))
    assert all(np.array_equal(a, b) for a, b in zip(found, language, strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(pi=[0.5, 0.6]), "pi sums to 1.1"),
        (dict(A=[[0.5, 0.5], [0.1, 0.8]]), "A row 1 sums to 0.9"),
        (dict(B=[[2.0, -1.0], [0.5, 0.5]]), "B has the negative value -1"),
        (dict(A=[[np.nan, 1], [0, 1]]), "A has a value that is not finite"),
        (dict(A=[[1.0, 0.0]]), "A has the shape"),
        (dict(pi=["a", "b"]), "pi must hold real numbers"),
        (dict(B=None), "lacks B"),
    ],
)
def test_a_file_that_is_no_language_is_refused(tmp_path, change, said):
    tables = dict(pi=[0.5, 0.5], A=[[0.5, 0.5], [0.2, 0.8]], B=[[1.0, 0.0], [0.0, 1.0]])
    tables = {k: np.array(v) for k, v in (tables | change).items() if v is not None}
    path = tmp_path / "mine.npz"
    np.savez(path, **tables)
    with pytest.raises(UserError, match=said):
        made(path=str(path))


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    path = tmp_path / "mine.npz"
    with pytest.raises(UserError, match="language.path is"):
        made(path=str(path))
    path.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match="damaged or no .npz"):
        made(path=str(path))
    np.savez(path, pi=np.array([{}], object), A=np.eye(1), B=np.eye(1))
    with pytest.raises(UserError, match="damaged or no .npz"):
        made(path=str(path))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(kind="bigram"), "language.kind is 'bigram'"),
        (dict(kind="path"), "language.kind is 'path'"),
        (dict(vocab=1), "language.vocab is 1"),
        (dict(n=1), "language.n is 1"),
        (dict(vocab=300, n=4), "language.n is 4"),
        (dict(support_k=5), "language.support_k is 5"),
        (dict(support_k=1), "language.support_k is 1"),
        (dict(concentration=-1.0), "language.concentration is -1.0"),
        (dict(start="zero"), "language.start is 'zero'"),
        (dict(kind="hmm", successors=7), "language.successors is 7"),
        (dict(kind="hmm", emitted=0), "language.emitted is 0"),
        (dict(kind="hmm", successors=1), "language.successors is 1"),
        (dict(kind="parity", group=1), "language.group is 1"),
        (dict(kind="running_sum", modulus=1), "language.modulus is 1"),
    ],
)
def test_what_cannot_be_is_refused(fields, said):
    with pytest.raises(UserError, match=said):
        made(**fields)


def test_reducible_and_periodic_chains_name_their_classes():
    reducible = np.array([[1.0, 0, 0], [0.5, 0, 0.5], [0, 0, 1.0]])
    with pytest.raises(UserError, match="3 classes: 1 state"):
        hmm.stationary(reducible)
    with pytest.raises(UserError, match="1 class: 3 states .closed, period 3"):
        hmm.stationary(np.roll(np.eye(3), 1, axis=1))
    with pytest.raises(UserError, match="period 2"):
        build.ngram(np.array([[0.0, 1.0], [1.0, 0.0]]))
    transient = np.array([[0.5, 0.5, 0], [0, 0.4, 0.6], [0, 0.7, 0.3]])
    law = hmm.stationary(transient)
    np.testing.assert_allclose(law @ transient, law, atol=1e-12)
    assert law[0] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", sorted(LANGUAGES))
@pytest.mark.parametrize("length", [1, 2, 4])
def test_entropies_against_enumeration(name, length):
    q = law(LANGUAGES[name], length)
    want = -np.sum(q[q > 0] * np.log(q[q > 0]))
    found = information.entropy(LANGUAGES[name], length)
    exact = isinstance(LANGUAGES[name], hmm.NGram)
    assert (found.error == 0) or not exact
    assert abs(found.value - want) < 4.5 * found.error + (1e-12 if exact else 1e-5)


def h_by_enumeration(q, vocab, length, a):
    """h(a) by all subsets, with entropies of marginals of q."""
    every = texts(vocab, length)

    def entropy(places):
        code = every[:, places] @ vocab ** np.arange(len(places))
        p = np.bincount(code, weights=q)
        return -np.sum(p[p > 0] * np.log(p[p > 0]))

    found = 0.0
    for i, seen in product(range(length), product([False, True], repeat=length)):
        if not seen[i]:
            places = np.flatnonzero(seen)
            one = entropy(np.append(places, i)) - entropy(places)
            found += a ** len(places) * (1 - a) ** (length - 1 - len(places)) * one
    return found / length


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_the_exact_curve_of_first_order_chains(length):
    language = LANGUAGES["2gram"]
    a = np.array([0.0, 0.3, 0.7, 1.0])
    q = law(language, length)
    want = [h_by_enumeration(q, 4, length, share) for share in a]
    np.testing.assert_allclose(
        information.exact_curve(language, length, a), want, atol=1e-12
    )
    identity = hmm.HMM(language.start, language.table, np.eye(4))
    np.testing.assert_allclose(information.exact_curve(identity, length, a), want, atol=1e-12)


def test_only_stationary_first_order_chains_have_an_exact_curve():
    known = [name for name in LANGUAGES if information.first_order(LANGUAGES[name])]
    assert sorted(known) == ["2gram", "sparse"]
    with pytest.raises(UserError, match="not stationary"):
        information.exact_curve(made(start="uniform"), 4, np.array([0.5]))


def test_the_curve_integrates_to_the_entropy():
    points, w = np.polynomial.legendre.leggauss(40)
    h = information.exact_curve(LANGUAGES["2gram"], 24, (points + 1) / 2)
    assert np.all(np.diff(h) < 1e-12)
    want = information.entropy(LANGUAGES["2gram"], 24).value / 24
    assert w @ h / 2 == pytest.approx(want, abs=1e-10)


def tabulated_law(language, length, w):
    with jax.enable_x64(True):
        device = hmm.on_device(language, np.float64)
        return enumeration.law(oracle(hmm.vocab(language)), device, length, w)


@pytest.mark.parametrize("w", [theory.uniform(1), theory.uniform(3), np.array([0.2, 0.1, 0.7])])
def test_closed_forms_against_exact_laws(w):
    for vocab, length in ((2, 4), (3, 4)):
        q, p = law(build.pairs(vocab), length), tabulated_law(build.pairs(vocab), length, w)
        want = enumeration.sequence_errors(q, p)
        assert theory.pairs_ser(length, vocab, w) == pytest.approx(want, abs=1e-12)
        gap = enumeration.kl(q, p) / length
        assert theory.pairs_token_gap(vocab, w) == pytest.approx(gap, abs=1e-12)
        assert theory.pairs_bound_gap(vocab, w) >= gap
        # Tight: log-probabilities of all right texts are the same.
        assert theory.ser_bound(length, gap) == pytest.approx(want, abs=1e-12)
    for group, length in ((2, 4), (4, 4), (3, 6)):
        language = build.parity(group)
        q, p = law(language, length), tabulated_law(language, length, w)
        want = enumeration.sequence_errors(q, p)
        assert theory.parity_ser(length, group, w) == pytest.approx(want, abs=1e-12)


def test_the_examples_of_the_specification():
    assert theory.pairs_ser(4, 2, theory.uniform(2)) == pytest.approx(0.4375, abs=1e-15)
    assert theory.parity_ser(4, 4, theory.uniform(2)) == pytest.approx(0.375, abs=1e-15)
    assert theory.parity_ser(4, 4, theory.uniform(4)) == pytest.approx(0.21875, abs=1e-15)
    assert theory.pairs_ser(10**6, 8, theory.uniform(10**6)) == pytest.approx(0.354, abs=1e-3)
    for length in (64, 256, 1024):
        assert theory.pairs_steps(length, 8, 0.1) / length == pytest.approx(4.15, rel=0.01)
        assert theory.parity_steps(length, 4, 0.1) / length == pytest.approx(2.37, rel=0.01)
    assert theory.calls(1024, theory.uniform(5000)) == pytest.approx(926, abs=1)
    assert theory.calls(1024, theory.uniform(5000), 16) == pytest.approx(4811, abs=1)
    assert theory.calls(8, theory.uniform(1)) == 1
    assert theory.break_even(64, 2.0, 4.0) == 32
    assert theory.gap_bound(2.0, 1.0, 4) == 0.25


def test_steps_invert_sequence_errors():
    steps = theory.parity_steps(64, 4, 0.3)
    ser = [theory.parity_ser(64, 4, theory.uniform(t)) for t in (steps - 1, steps)]
    assert ser[0] > 0.3 >= ser[1]
    assert theory.parity_steps(4, 4, 0.99) == 1
    with pytest.raises(UserError, match="ser is 0"):
        theory.pairs_steps(64, 8, 0)


def test_gaps_shrink_as_the_bound_says():
    language, length = LANGUAGES["2gram"], 64
    entropy = information.entropy(language, length).value / length
    h = information.exact_curve(language, length, np.array([0.0, 1.0]))
    for steps in (1, 2, 8, 32, 128):
        w = theory.uniform(steps)
        visible = np.arange(steps) / steps
        gap = w @ information.exact_curve(language, length, visible) - entropy
        assert gap <= theory.gap_bound(*h, steps) + 1e-12
        if steps >= 8:
            assert steps * gap == pytest.approx((h[0] - h[1]) / 2, rel=0.02)


def test_lengths_of_one():
    assert LENGTH == 4
    assert information.exact_curve(LANGUAGES["2gram"], 1, np.array([0.5])) > 0
