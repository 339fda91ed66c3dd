import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from lm.languages import build, hmm
from lm.languages.hmm import HMM, NGram
from tests.lm.languages import brute

PI, A, B = brute.sparse_hmm()


def test_the_structured_transition_is_the_dense_one():
    for n in (2, 3, 4):
        table = hmm.check(NGram(*brute.sparse_ngram(n)))
        with jax.enable_x64(True):
            ours = hmm.on_device(table, jnp.float64)
            plain = hmm.on_device(hmm.dense(table), jnp.float64)
            rng = np.random.default_rng(n)
            message = jnp.asarray(rng.random((5, 3 ** (n - 1))))
            for move in (hmm.forward, hmm.backward, hmm.symbols):
                np.testing.assert_allclose(
                    move(ours, message), move(plain, message), atol=1e-14
                )
            x = jnp.array([0, 1, 2, 3])
            np.testing.assert_array_equal(hmm.emission(ours, x), hmm.emission(plain, x))
        assert hmm.states(table) == 3 ** (n - 1)
        assert (hmm.vocab(table), hmm.order(table)) == (3, n)


def test_dense_moves_a_context_by_one_token():
    start, table = brute.sparse_ngram(3)
    found = hmm.dense(NGram(start, table))
    assert found.A[1 * 3 + 2, 2 * 3 + 0] == pytest.approx(table[1, 2, 0])
    assert found.A[1 * 3 + 2, 0 * 3 + 0] == 0
    assert found.B[1 * 3 + 2].tolist() == [0, 0, 1]
    assert found.pi[1 * 3 + 2] == pytest.approx(start[1, 2])


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p * 1.001, "must be 1 within"),
        (lambda p: np.where(p == p.max(), -p, p), "must be a finite number from 0 up"),
        (lambda p: np.where(p == p.max(), np.nan, p), "is nan"),
        (lambda p: p[..., None], "shape"),
        (lambda p: p.astype(str), "dtype"),
        (lambda p: p[:0], "shape"),
    ],
)
def test_bad_tables_are_refused(at, change, said):
    tables = [PI, A, B]
    tables[at] = change(tables[at])
    with pytest.raises(UserError, match=said) as error:
        hmm.check(HMM(*tables))
    assert f"config.language.{HMM._fields[at]}" in str(error.value) or "shape" in said


def test_what_is_wrong_is_pointed_at():
    wrong = A.copy()
    wrong[2, 1] = -0.25
    with pytest.raises(UserError, match=r"language.A\[2, 1\] is -0.25"):
        hmm.check(HMM(PI, wrong, B))
    wrong = B.copy()
    wrong[3] *= 1.5
    with pytest.raises(UserError, match=r"language.B\[3\].sum\(\) is 1.5"):
        hmm.check(HMM(PI, A, wrong))
    with pytest.raises(UserError, match=r"\(V, ..., V\)"):
        hmm.check(NGram(np.ones(3) / 3, np.ones((3, 2)) / 2))
    with pytest.raises(UserError, match=r"language.start.shape"):
        hmm.check(NGram(np.ones(4) / 4, np.ones((3, 3)) / 3))


def test_sums_within_the_tolerance_are_made_exact():
    found = hmm.check(HMM(PI * (1 + 5e-7), A * (1 - 5e-7), B))
    for table in found:
        np.testing.assert_allclose(table.sum(axis=-1), 1, atol=1e-15)
        assert table.dtype == np.float64
    np.testing.assert_allclose(found.A, A, atol=1e-15)


def test_a_probability_that_float32_has_not_is_refused():
    rare = np.array([[1 - 1e-60, 1e-60], [0.5, 0.5]])
    with pytest.raises(UserError, match=r"language.A\[0, 1\] is 1e-60"):
        hmm.on_device(HMM(np.ones(2) / 2, rare, np.eye(2)))
    with jax.enable_x64(True):
        assert hmm.on_device(HMM(np.ones(2) / 2, rare, np.eye(2)), jnp.float64).A[0, 1] > 0


def test_files_come_back(tmp_path):
    for language in (HMM(PI, A, B), NGram(*brute.sparse_ngram(3))):
        hmm.save(tmp_path / "a.npz", language)
        found = hmm.load(tmp_path / "a.npz")
        assert type(found) is type(language)
        for ours, given in zip(found, language, strict=True):
            np.testing.assert_allclose(ours, given, atol=1e-15)


def test_files_that_hold_no_language_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(UserError, match="readable"):
        hmm.load(path)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match="readable"):
        hmm.load(path)
    hmm.save(path, HMM(PI, A, B))
    whole = path.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="readable"):
            hmm.load(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 255
    path.write_bytes(bytes(damaged))
    with pytest.raises(UserError):
        hmm.load(path)
    np.savez(path, pi=PI, A=A)
    with pytest.raises(UserError, match=r"an \.npz with pi, A and B"):
        hmm.load(path)
    np.savez(path, pi=PI, A=np.array([[{}]]), B=B)
    with pytest.raises(UserError, match=r"readable \.npz of numbers"):
        hmm.load(path)
    np.savez(path, pi=PI, A=A.astype(str), B=B)
    with pytest.raises(UserError, match="real numbers"):
        hmm.load(path)
    np.save(tmp_path / "b.npy", A)
    with pytest.raises(UserError, match="npz"):
        hmm.load(tmp_path / "b.npy")


def test_the_stationary_law_stays():
    found = hmm.stationary(HMM(np.ones(2) / 2, np.array([[0.9, 0.1], [0.3, 0.7]]), np.eye(2)))
    np.testing.assert_allclose(found, [0.75, 0.25], atol=1e-15)
    table = build.random_ngram(np.random.default_rng(0), 3, 4)
    law = hmm.stationary(table)
    np.testing.assert_allclose(law @ hmm.dense(table).A, law, atol=1e-15)
    assert law.sum() == pytest.approx(1)


def test_a_large_chain_is_iterated_to_the_same_law(monkeypatch):
    table = build.random_ngram(np.random.default_rng(0), 3, 4)
    solved = hmm.stationary(table)
    monkeypatch.setattr(hmm, "DENSE", 0)
    np.testing.assert_allclose(hmm.stationary(table), solved, atol=1e-13)


def chain(edges, count):
    a = np.zeros((count, count))
    for before, after in edges:
        a[before, after] = 1
    a /= a.sum(axis=1, keepdims=True)
    return HMM(np.ones(count) / count, a, np.ones((count, 1)))


def test_classes_and_periods():
    found = hmm.classes(chain([(0, 1), (1, 0), (1, 2), (2, 3), (3, 4), (4, 2)], 5))
    assert [one.states.tolist() for one in found] == [[0, 1], [2, 3, 4]]
    assert [one.period for one in found] == [2, 3]
    assert [one.closed for one in found] == [False, True]
    ring = [(i, (i + 1) % 6) for i in range(6)]
    assert [one.period for one in hmm.classes(chain(ring, 6))] == [6]
    assert [one.period for one in hmm.classes(chain([*ring, (0, 3)], 6))] == [2]
    assert hmm.is_ergodic(chain([*ring, (0, 2)], 6))
    alone = hmm.classes(chain([(0, 1), (1, 1)], 2))
    assert [one.period for one in alone] == [0, 1]


def test_periods_are_those_of_powers():
    # The period is the gcd of all lengths of returns, by boolean powers.
    for seed in range(30):
        rng = np.random.default_rng(seed)
        edges = [(i, (i + 1) % 8) for i in range(8)]
        edges += [(int(s), int((s + 2 * rng.integers(4) + 1) % 8)) for s in rng.choice(8, 2)]
        edges += [(0, int(rng.integers(8)))] * (seed % 2)
        language = chain(edges, 8)
        power, returns = np.eye(8, dtype=bool), []
        for step in range(1, 65):
            power = (power.astype(int) @ (language.A > 0)) > 0
            if power[0, 0]:
                returns.append(step)
        assert hmm.classes(language)[0].period == np.gcd.reduce(returns)


def test_stationarity_of_a_reducible_or_periodic_chain_is_refused():
    reducible = chain([(0, 1), (1, 0), (1, 2), (2, 2)], 3)
    with pytest.raises(UserError) as error:
        hmm.stationary(reducible)
    assert "{0, 1} (left for ever, period 2), {2} (closed, period 1)" in str(error.value)
    with pytest.raises(UserError, match=r"\{0, 1\} \(closed, period 2\)"):
        hmm.stationary(chain([(0, 1), (1, 0)], 2))
    with pytest.raises(UserError, match="more"):
        hmm.stationary(chain([(i, i) for i in range(20)], 20))
