"""Pre-training: accumulation and placement change nothing, losses and actions are right."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import config as configs
from common import loop, metrics, runner
from common import mesh as meshes
from common.errors import UserError
from common.experiment import Run
from lm import causal, corpus, weights
from lm.transformer import transformer
from tests.common.test_loop import Never

# What they share is trained once.
pytestmark = pytest.mark.xdist_group("lm")


def config(devices=1, **changes):
    made = configs.load("configs/alphadecay.py:test")
    made.mesh.data = devices
    made.optim.rule = "alphadecay"
    made.steps = 60
    configs.apply(made, changes)
    return made


def trained(steps=4, measure=True, **changes):
    c = config(**changes)
    with jax.set_mesh(mesh := meshes.make(**c.mesh)):
        made = causal.make(c)
        placed = loop.shapes(made, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
        state = jax.jit(made.init, out_shardings=shardings)(jax.random.key(0))
        step = loop.stepper(made, placed)
        for i in range(steps):
            batch = meshes.to_devices(made.batch(i), mesh)
            state, values = step(state, batch, jax.random.key(1), jnp.uint32(i))
        found = made.evaluate(state, jax.random.key(2)) if measure else {}
        return c, made, jax.device_get(state), jax.device_get(values), found


@pytest.fixture(scope="module")
def plain():
    return trained()


@pytest.mark.parametrize(
    "changes",
    [
        dict(accumulate=2),
        dict(devices=8),
        dict(devices=4, accumulate=2, fsdp=True, mesh=dict(model=2)),
        dict(model=dict(remat=True)),
    ],
    ids=str,
)
def test_placement_and_accumulation_change_nothing(plain, changes):
    measure = "devices" in changes
    _, _, state, values, found = trained(measure=measure, **changes)
    chex.assert_trees_all_close(state.params, plain[2].params, atol=2e-5)
    for name in ("loss", "grad_norm", "ratio_mean"):
        assert float(values[name]) == pytest.approx(float(plain[3][name]), rel=1e-4), name
    if measure:
        assert found["val_loss"] == pytest.approx(plain[4]["val_loss"], rel=1e-5)


def test_validation_is_the_mean_over_all_targets(plain):
    c, _, state, _, found = plain
    _, valid = corpus.pair(**c.data)
    model, length = transformer(**c.model), c.data.length
    params = jax.tree.map(jnp.asarray, state.params)
    tokens = np.asarray(valid.tokens[: c.eval.tokens + 1], np.int32)
    losses = []
    for start in range(0, c.eval.tokens, length):
        row = tokens[start : start + length + 1]
        logits = np.asarray(model.apply(params, jnp.asarray(row[None, :-1])), float)[0]
        logits -= logits.max(axis=1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses.append(-logp[np.arange(len(row) - 1), row[1:]])
    flat = np.concatenate(losses)
    assert found["val_tokens"] == len(flat) == c.eval.tokens
    assert found["val_loss"] == pytest.approx(flat.mean(), rel=1e-5)
    assert found["val_ppl"] == pytest.approx(np.exp(flat.mean()), rel=1e-4)
    rows = c.eval.batch_size
    means = [np.concatenate(losses[i : i + rows]).mean() for i in range(0, len(losses), rows)]
    released = np.exp(sum(means) / (len(means) + 1))
    assert found["val_ppl_released"] == pytest.approx(released, rel=1e-4)


def test_a_model_learns():
    _, _, _, values, found = trained(steps=60, optim=dict(rule="uniform", learning_rate=1e-2))
    assert found["val_loss"] < 3.6
    assert float(values["loss"]) < 3.6


def test_pure_bfloat16_keeps_no_float32_copy():
    changes = dict(pure_bf16=True, model=dict(dtype="bfloat16"))
    _, made, state, values, _ = trained(steps=40, measure=False, **changes)
    wide = jax.eval_shape(made.init, jax.random.key(0)).opt
    floats = [a.dtype for a in jax.tree.leaves((state.params, wide)) if a.ndim > 1]
    assert set(floats) == {jnp.dtype("bfloat16")}
    assert float(values["loss"]) < 5.0


def test_one_document_per_row(tmp_path):
    text = "\f".join(f"{'the quick brown fox'[: 4 + i % 15]}" for i in range(400))
    (tmp_path / "a.txt").write_text(text)
    data = dict(path=str(tmp_path / "a.txt"), pack=False, length=24)
    changes = dict(data=data, optim=dict(rule="uniform", learning_rate=1e-2))
    _, made, _, _, found = trained(steps=60, **changes)
    assert set(made.batch(0)) == {"tokens", "mask"}
    assert not made.batch(0)["mask"].all()
    assert found["val_loss"] < 1.5


def test_a_text_of_few_documents_is_no_batch_of_documents():
    made = causal.make(config(data=dict(pack=False)))
    assert made.batch(0)["tokens"].shape == (8, 16)  # For shapes, whatever the text.
    with pytest.raises(UserError, match="this one has 1, and rows of a batch would repeat"):
        made.batch(1)


def test_validation_text_is_held_to_the_same_vocabulary(tmp_path):
    (tmp_path / "train.txt").write_text("plain words " * 50)
    (tmp_path / "valid.txt").write_bytes(bytes([200, 65]) * 50)
    data = dict(path=str(tmp_path / "train.txt"), valid=str(tmp_path / "valid.txt"))
    with pytest.raises(UserError, match=r"model\.vocab is 128, but must be at least 201"):
        causal.make(config(data=data, model=dict(vocab=128)))


def test_actions(plain, tmp_path):
    c, made, state, _, found = plain
    rows = [metrics.to_row(4, "eval", found)]
    run = Run("seed0", c, rows, {}, lambda: jax.tree.map(jnp.asarray, state))
    assert f"| val_loss | {found['val_loss']:.6g} |" in made.actions["evaluate"](run, tmp_path)
    made.actions["export"](run, tmp_path / "hf")
    params, fields = weights.load(tmp_path / "hf")
    chex.assert_trees_all_equal(params, state.params)
    assert fields["depth"] == c.model.depth
    said = made.actions["sample"](run, tmp_path)
    assert (tmp_path / "samples.txt").exists()
    assert said.startswith("```")
    table = made.actions["analyze"](run._replace(input=str(tmp_path / "hf")), tmp_path)
    assert table == made.actions["analyze"](run, tmp_path)
    assert len(table.splitlines()) == 4 + 7 * c.model.depth
    assert (tmp_path / "modules.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param(dict(devices=4, fsdp=True, mesh=dict(model=2)), marks=pytest.mark.slow)],
    ids=str,
)
def test_resume_inside_a_refresh_interval_changes_no_bit(changes, tmp_path):
    c = config(**changes, steps=6, optim=dict(alphadecay=dict(every=4)))
    found = []
    for name, at in (("whole", None), ("cut", 5)):
        made, folder = causal.make(c), tmp_path / name
        folder.mkdir()
        if at:  # Ratios of step 4 decide about steps 5 and 6.
            with pytest.raises(SystemExit):
                loop.train(made, c, folder, Never(at))
        loop.train(made, c, folder, Never())
        state = jax.device_get(runner.load(made, c, folder, name).state())
        found.append((state, (folder / "metrics.jsonl").read_text()))
    chex.assert_trees_all_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(model=dict(vocab=20)), r"model\.vocab is 20, but must be at least 123"),
        (dict(model=dict(depth=0)), r"model\.depth is 0, but must be a whole number from 1 up"),
        (dict(model=dict(dtype="float64")), r"model\.dtype is 'float64', but must be another"),
        (dict(pure_bf16=True), r"pure_bf16 is True, but must be False, or model\.dtype"),
        (dict(peak_flops=-1.0), r"peak_flops is -1\.0"),
        (dict(batch_size=7, devices=2), r"batch_size is 7, but must be a multiple of the 2"),
        (dict(accumulate=3), r"accumulate is 3, but must be a divisor of the 8 rows"),
        (dict(data=dict(path="nowhere.txt")), "nowhere"),
        (dict(data=dict(holdout=1.5)), r"data\.holdout is 1\.5"),
        (dict(model=dict(heads=3)), r"model\.heads is 3|model\.dim is 16"),
    ],
)
def test_what_cannot_be_is_named(changes, said):
    with pytest.raises(UserError, match=said):
        causal.make(config(**changes))
