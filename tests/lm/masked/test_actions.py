"""What is done with a trained run: texts with gaps, exports, speed, pictures, refusals."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import config as configs
from common.errors import UserError
from common.experiment import Run
from lm import llada, weights
from lm.masked import actions, animation, networks, parts, speed
from lm.masked.denoiser import denoise
from lm.masked.sample import Result, frames
from lm.transformer import transformer

pytestmark = pytest.mark.xdist_group("masked-actions")


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat and the dog sat too. " * 40)
    return str(path)


def setting(corpus_file, kind="mdm", **changes):
    made = configs.load("configs/masked_diffusion.py:test")
    configs.apply(made, dict(kind=kind, language=dict(kind=""), length=16))
    configs.apply(made, dict(model=dict(absolute=False)))
    configs.apply(made, dict(data=dict(path=corpus_file), sample=dict(count=2, animate=False)))
    configs.apply(made, dict(sampler=dict(steps=4)) | changes)
    made.mesh.data = 1
    return made


@pytest.fixture(scope="module")
def trained(corpus_file):
    """Parts and states of both kinds, random weights."""
    found = {}
    for kind in ("mdm", "ar"):
        made = parts.parts_of(setting(corpus_file, kind))
        params = jax.jit(made.model.init)(jax.random.key(0))
        found[kind] = made, SimpleNamespace(params=params, average=None)
    return found


def act(name, config, trained, folder, text=None):
    made, state = trained[config.kind]
    given = ""
    if text is not None:
        given = str(folder / "given.txt")
        (folder / "given.txt").write_text(text)
    run = Run("seed0", config, [], {}, lambda: state, given)
    return actions.ALL[name](config, made, run, folder)


def test_gaps_are_filled_and_nothing_else_is_touched(corpus_file, trained, tmp_path):
    config = setting(corpus_file)
    said = act("sample", config, trained, tmp_path, "the ____ sat ___\n")
    rows = np.load(tmp_path / "samples.npy")
    assert rows.shape == (2, 16)
    for row in rows:
        assert bytes(row[:4].astype(np.uint8)) == b"the "
        assert bytes(row[8:13].astype(np.uint8)) == b" sat "
        assert row.max() < 256
    assert not np.array_equal(*rows)
    assert "Network calls of a text" in said
    texts = (tmp_path / "samples.txt").read_text().split("\n\f\n")
    assert len(texts) == 2


def test_a_text_that_is_short_goes_on_and_a_long_one_is_refused(corpus_file, trained, tmp_path):
    config = setting(corpus_file)
    act("sample", config, trained, tmp_path, "the cat")
    assert bytes(np.load(tmp_path / "samples.npy")[0, :7].astype(np.uint8)) == b"the cat"
    with pytest.raises(UserError, match=r"has 17 tokens, but config.length is 16"):
        act("sample", config, trained, tmp_path, "x" * 17)


def test_samplers_with_cache_and_guidance_fill_the_same_gaps(corpus_file, trained, tmp_path):
    for changes in (
        dict(sampler=dict(kind="confidence", block=8, cache="dual")),
        dict(sampler=dict(kind="threshold", block=8, cache="prefix")),
        dict(guidance=1.5),
    ):
        config = setting(corpus_file, **changes)
        act("sample", config, trained, tmp_path, "ab____yz________")
        row = np.load(tmp_path / "samples.npy")[0]
        assert bytes(row[[0, 1, 6, 7]].astype(np.uint8)) == b"abyz"
        assert row.max() < 256
    with pytest.raises(UserError, match=r"config\.guidance is 1.5"):
        act("sample", setting(corpus_file, guidance=1.5), trained, tmp_path)


def test_an_autoregressive_run_continues_only(corpus_file, trained, tmp_path):
    config = setting(corpus_file, "ar")
    act("sample", config, trained, tmp_path, "the cat ")
    assert bytes(np.load(tmp_path / "samples.npy")[1, :8].astype(np.uint8)) == b"the cat "
    with pytest.raises(UserError, match=r"gap of --input must be at its end"):
        act("sample", config, trained, tmp_path, "the ____ sat")


def test_languages_have_numbers_for_letters(tmp_path):
    config = configs.load("configs/masked_diffusion.py:test")
    configs.apply(config, dict(sample=dict(count=1, animate=True)))
    config.mesh.data = 1
    made = parts.parts_of(config)
    params = jax.jit(made.model.init)(jax.random.key(0))
    trained = {"mdm": (made, SimpleNamespace(params=params, average=None))}
    act("sample", config, trained, tmp_path, "0 1 ___ 2")
    assert np.load(tmp_path / "samples.npy")[0, [0, 1, 5]].tolist() == [0, 1, 2]
    assert (tmp_path / "writing.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "writing.gif").read_bytes().startswith(b"GIF8")
    with pytest.raises(UserError, match=r"must be numbers from 0 to 2"):
        act("sample", config, trained, tmp_path, "0 7")


def test_frames_show_a_text_growing():
    found = Result(np.array([[4, 5, 6]]), np.array([2]), 2, np.array([[1, -1, 0]]))
    rows = frames(found, 9)[:, 0]
    assert rows.tolist() == [[9, 5, 9], [9, 5, 6], [4, 5, 6]]
    letters = [animation.letters(row, animation._symbols, 9) for row in rows]
    assert letters == ["·f·", "·fg", "efg"]


def test_exports_are_read_again(corpus_file, trained, tmp_path):
    act("export", setting(corpus_file), trained, tmp_path)
    params, fields, vocab, mask = llada.load(tmp_path)
    assert (vocab, mask, fields["vocab"]) == (257, 256, 257)
    want = trained["mdm"][1].params
    np.testing.assert_array_equal(
        params["blocks"]["q"]["kernel"], want["blocks"]["q"]["kernel"]
    )
    act("export", setting(corpus_file, "ar"), trained, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    assert weights.load(tmp_path)[1]["vocab"] == 257


def test_rows_without_a_token_are_not_exported(corpus_file, tmp_path):
    """A large vocabulary has rows of padding, which would be tokens elsewhere."""
    for kind in ("mdm", "ar"):
        config = setting(corpus_file, kind, vocab=1100)
        config.model.tie = kind == "ar"
        made = parts.parts_of(config)
        params = jax.jit(made.model.init)(jax.random.key(0))
        trained = {kind: (made, SimpleNamespace(params=params, average=None))}
        assert made.fields["vocab"] == 1152
        act("export", config, trained, tmp_path / kind)
        x = jnp.array([[5, 1100, 7, 1099]], jnp.int32)
        if kind == "mdm":
            again = llada.load(tmp_path / kind)
            model = transformer(**again.fields)
            found = networks.denoiser(model, again.vocab, again.mask)
            theirs = jax.tree.map(jnp.asarray, again.params)
            got, want = denoise(found, theirs, x), denoise(made.denoiser, params, x)
            assert got.shape == (1, 4, 1101)
            np.testing.assert_allclose(got[..., :1100], want, atol=1e-5)
            assert not np.isfinite(got[..., 1100]).any()
        else:
            weights_, fields = weights.load(tmp_path / kind)
            assert fields["vocab"] == 1101
            got = transformer(**fields).apply(jax.tree.map(jnp.asarray, weights_), x)
            np.testing.assert_allclose(got, made.model.apply(params, x)[..., :1101], atol=1e-5)


def test_an_autoregressive_run_draws_as_the_sampler_says(corpus_file, trained, tmp_path):
    def texts(temperature):
        config = setting(corpus_file, "ar", sampler=dict(temperature=temperature))
        act("sample", config, trained, tmp_path)
        return np.load(tmp_path / "samples.npy")

    cold = texts(1e-4)
    np.testing.assert_array_equal(*cold)  # Both are the most probable one.
    assert not np.array_equal(*texts(1.0))
    with pytest.raises(UserError, match=r"config\.guidance is 1.5"):
        act("sample", setting(corpus_file, "ar", guidance=1.5), trained, tmp_path)


def test_speed_tells_tokens_a_second_and_break_even(corpus_file, trained, tmp_path):
    config = setting(corpus_file, speed=dict(batches=(1, 2), steps=(4,), repeats=1))
    made, state = trained["mdm"]
    found = speed.measured(config, made, state.params, ("count",))
    assert [r["sampler"] for r in found["rows"]] == ["ar", "ar_nocache", "count"] * 2
    assert found["rows"][2]["calls"] == 4
    assert found["rows"][5]["tokens_per_second"] == pytest.approx(
        2 * 16 / found["rows"][5]["seconds"]
    )
    star = np.array(found["decode"]) / np.array(found["forward"]) * 16
    np.testing.assert_allclose(found["break_even"], star)
    known = dict(batches=[1, 8], length=10, decode=[1.0, 9.0], forward=[2.0, 16.0])
    want = [10 * 1 / 2, 10 * 1 / 4, 10 * 1.6 / 16, 1]  # The price is 0.2.
    np.testing.assert_allclose(speed.cost_model(known, np.array([1.0, 2, 8, 80])), want)
    assert "| count | 4 | 2 |" in speed.table(found)
    with pytest.raises(UserError, match=r"config.speed.batches is \(\)"):
        act("speed", setting(corpus_file), trained, tmp_path)
    with pytest.raises(UserError, match=r"config\.kind is 'ar'"):
        act("speed", setting(corpus_file, "ar"), trained, tmp_path)


def test_inputs_that_mean_nothing_are_refused(corpus_file, trained, tmp_path):
    config = setting(corpus_file, speed=dict(batches=(1,)))
    for name in ("evaluate", "speed", "export"):
        with pytest.raises(UserError, match=r"is for sample"):
            act(name, config, trained, tmp_path, "text")
    run = Run("seed0", config, [], {}, lambda: trained["mdm"][1], str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"Cannot read --input"):
        actions.sampled(config, trained["mdm"][0], run, tmp_path)
    with pytest.raises(UserError, match=r"config\.sample\.count is 0"):
        act("sample", setting(corpus_file, sample=dict(count=0)), trained, tmp_path)
