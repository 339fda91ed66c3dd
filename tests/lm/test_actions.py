"""What is done with a trained model: assigned decays, samples, exports, refused input."""

import csv
import json
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest

from common import config as configs
from common import mesh as meshes
from common.errors import UserError
from common.experiment import Run
from lm import actions, corpus, tokenizers, weights
from lm.modules import TYPES, modules
from lm.transformer import rules, transformer
from optim.modules import select

pytestmark = pytest.mark.xdist_group("lm-actions")

TEXT = "First Citizen: before we proceed any further, hear me speak. " * 8


def setting(**changes):
    made = configs.load("configs/alphadecay.py:test")
    configs.apply(made, changes)
    return made


def parts_of(config, text=TEXT, kind="bytes", folder=None):
    """The model and a text, as `lm.causal` shares them."""
    path = folder / "text.txt"
    path.write_text(text)
    found = corpus.load(str(path), kind)
    return SimpleNamespace(model=transformer(**config.model), train=found, valid=found)


def run_of(config, model, given="", rows=()):
    params = jax.jit(model.init)(jax.random.key(0))
    state = SimpleNamespace(params=params)
    return Run("seed0", config, list(rows), {}, lambda: state, given)


def analyzed(folder, given="", rows=(), **changes):
    """The rows of modules.csv, the text, and the parameters."""
    config = setting(**changes)
    model = transformer(**config.model)
    run = run_of(config, model, given, rows)
    text = actions.analyze(config, None, run, folder)
    with (folder / "modules.csv").open() as file:
        return list(csv.DictReader(file)), text, run.state().params


def exponents(params):
    """By NumPy, in float64: 1 + k / sum ln(lambda / smallest), over the upper half."""
    found = {}
    for kind in TYPES:
        for layer, w in enumerate(np.asarray(params["blocks"][kind]["kernel"], float)):
            values = np.sort(np.linalg.svd(w, compute_uv=False) ** 2)
            tail = values[len(values) // 2 :]
            found[kind, str(layer)] = 1 + len(tail) / np.log(tail / tail[0]).sum()
    return found


def column(rows, name):
    return np.array([float(row[name]) for row in rows])


@pytest.mark.parametrize("assignment", ["linear", "sqrt", "log2", "uniform"])
def test_ratios_are_those_of_the_settings(tmp_path, assignment):
    optim = dict(alphadecay=dict(assignment=assignment), weight_decay=0.2, rule="uniform")
    rows, text, params = analyzed(tmp_path, optim=optim)
    alpha = exponents(params)
    alpha = np.array([alpha[row["type"], row["layer"]] for row in rows])
    low, high = alpha.min(), alpha.max()
    want = {
        "linear": (alpha - low) / (high - low) * (5.0 - 0.67) + 0.67,
        "sqrt": np.sqrt(alpha) / np.sqrt(alpha).mean(),
        "log2": np.log2(alpha) / np.log2(alpha).mean(),
        "uniform": np.ones(len(alpha)),
    }[assignment]
    np.testing.assert_allclose(column(rows, "alpha"), alpha, atol=2e-3)
    np.testing.assert_allclose(column(rows, "ratio"), want, atol=5e-3)
    np.testing.assert_allclose(column(rows, "decay"), 0.2 * column(rows, "ratio"), rtol=2e-3)
    head, blank, *table = text.splitlines()
    assert (
        f"AlphaDecay would assign with config.optim.alphadecay (assignment {assignment},"
        in head
    )
    assert "whatever rule trained" in head
    assert (blank, len(table)) == ("", 2 + len(rows))


def test_every_setting_counts():
    params = jax.jit(transformer(**setting().model).init)(jax.random.key(0))

    def assigned(**changes):
        optim = setting(optim=dict(alphadecay=changes)).optim
        score, ratio, _ = actions.assigned(optim, params)
        return score, ratio

    plain = assigned()
    kernels = [np.asarray(params["blocks"][kind]["kernel"], float) for kind in TYPES]
    norms = [np.sum(w**2, axis=(1, 2)) for w in kernels]
    np.testing.assert_allclose(assigned(score="frobenius")[0], norms, rtol=1e-3)
    changes = [
        dict(reference="hill"),
        dict(tail=0.25),
        dict(fit="goodness_of_fit"),
        dict(quantiles=(0.1, 0.9)),
        dict(s1=0.1),
        dict(shape_correction="mp"),
    ]
    for change in changes:
        assert not np.allclose(assigned(**change)[1], plain[1], atol=1e-3), change
    sizes = np.array([w[0].size * np.ones(2) for w in kernels])
    mean = np.average(assigned(normalize_mean=True)[1], weights=sizes)
    assert mean == pytest.approx(1, abs=1e-5)


def test_independent_decay_is_divided_by_the_peak(tmp_path):
    optim = dict(independent=True, weight_decay=0.1, learning_rate=0.02)
    rows, _, _ = analyzed(tmp_path, optim=optim)
    np.testing.assert_allclose(column(rows, "decay"), 5 * column(rows, "ratio"), rtol=2e-3)


def test_modules_that_are_left_out_keep_the_base_decay(tmp_path):
    left = dict(exclude=("blocks.q.kernel[1]",))
    rows, _, _ = analyzed(tmp_path, optim=dict(alphadecay=left))
    odd = [row for row in rows if row["note"]]
    assert [(r["type"], r["layer"], r["ratio"], r["note"]) for r in odd] == [
        ("q", "1", "1.0000", "excluded")
    ]
    # Keys and values of one head of eight: too few eigenvalues.
    model, least = dict(heads=2, kv_heads=1), dict(min_eigs=9)
    rows, _, _ = analyzed(tmp_path, model=model, optim=dict(alphadecay=least))
    small = [row for row in rows if row["note"] == "below min_eigs"]
    assert {row["type"] for row in small} == {"k", "v"}
    assert {(row["alpha"], row["ratio"]) for row in small} == {("nan", "1.0000")}
    assert len({row["ratio"] for row in rows if row["type"] not in "kv"}) == 10
    rows, _, _ = analyzed(tmp_path, optim=dict(alphadecay=dict(min_eigs=50)))
    assert {(row["ratio"], row["note"]) for row in rows} == {("1.0000", "below min_eigs")}


def test_a_score_that_needs_gradients_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"score is 'grad_norm', but must be computed from"):
        analyzed(tmp_path, optim=dict(alphadecay=dict(score="grad_norm")))


def test_exponents_over_training_are_drawn_where_there_are_any(tmp_path):
    analyzed(tmp_path, rows=[{"step": 2, "split": "train", "loss": 1.0}])
    assert not (tmp_path / "over_training.png").exists()
    row = {"step": 0, "split": "eval"} | {f"alpha_layers_{kind}": [2.0, 2.5] for kind in TYPES}
    analyzed(tmp_path, rows=[row])
    assert (tmp_path / "over_training.png").stat().st_size > 1000


def test_placement_changes_no_spectrum(tmp_path):
    config = setting()
    model = transformer(**config.model)
    params = jax.jit(model.init)(jax.random.key(0))
    plain = actions.spectra_of(params), actions.assigned(config.optim, params)
    mesh = meshes.make(data=4, model=2)
    placed = meshes.place(params, rules(fsdp=True), mesh)
    with jax.set_mesh(mesh):
        split = jax.tree.map(lambda a, to: jax.device_put(a, to.sharding), params, placed)
        leaves, every = select(split, modules), jax.tree.leaves(split)
        found = actions._spectra(tuple(leaves), [every[leaf.index] for leaf in leaves])
        assert all(a.is_fully_replicated for a in jax.tree.leaves(found))
        assert not every[leaves[0].index].is_fully_replicated
        placed = actions.spectra_of(split), actions.assigned(config.optim, split)
    chex.assert_trees_all_close(placed[0], plain[0], rtol=2e-3)
    chex.assert_trees_all_close(placed[1][:2], plain[1][:2], rtol=2e-3)


# Samples.


def test_samples_go_on_past_the_length_of_training(tmp_path):
    config = setting(sample=dict(count=2, steps=60))
    parts, seen = parts_of(config, folder=tmp_path), []

    def extend(params, cache, tokens, positions):
        jax.debug.callback(lambda p: seen.append(int(p.max())), positions)
        return model.extend(params, cache, tokens, positions)

    model = parts.model
    parts.model = model._replace(extend=extend)
    actions.sample(config, parts, run_of(config, model), tmp_path)
    jax.effects_barrier()
    assert max(seen) == config.data.length - 1
    texts = (tmp_path / "samples.txt").read_text().split("\n\f\n")
    assert len(texts) == 2


def test_samples_hold_no_token_that_the_tokenizer_lacks(tmp_path, monkeypatch):
    config = setting(model=dict(vocab=512), sample=dict(count=3, steps=40, top_p=1.0))
    parts, drawn = parts_of(config, folder=tmp_path), []
    sliding = actions.sliding

    def spied(*args, **settings):
        drawn.append(sliding(*args, **settings))
        return drawn[-1]

    monkeypatch.setattr(actions, "sliding", spied)
    actions.sample(config, parts, run_of(config, parts.model), tmp_path)
    assert drawn[0].shape == (3, 56)
    assert drawn[0].max() < 256


def test_a_text_ends_where_its_end_is_drawn(tmp_path, monkeypatch):
    bpe = tmp_path / "tokenizer.json"
    bpe.write_text(tokenizers.train_bpe([TEXT], 260))
    config = setting(model=dict(vocab=260), sample=dict(count=2, steps=3))
    parts = parts_of(config, kind=str(bpe), folder=tmp_path)
    kind = tokenizers.tokenizer(str(bpe))
    (tmp_path / "in.txt").write_text("abc")
    asked = []

    def fake(model, params, key, prompt, steps, context, **settings):
        asked.append(settings)
        more = [[*kind.encode("d"), 1, *kind.encode("e")], kind.encode("fgh")]
        return np.concatenate([prompt, np.array(more)], axis=1)

    monkeypatch.setattr(actions, "sliding", fake)
    run = run_of(config, parts.model, str(tmp_path / "in.txt"))
    actions.sample(config, parts, run, tmp_path)
    assert (tmp_path / "samples.txt").read_text() == "abcd\n\f\nabcfgh"
    assert (asked[0]["stop"], asked[0]["vocab"]) == (1, kind.vocab_size)


def test_an_end_in_the_prompt_ends_nothing():
    row = np.array([5, 1, 6, 7, 1, 1])
    assert actions._ended(row, 3, 1).tolist() == [5, 1, 6, 7]
    assert actions._ended(row, 3, 9).tolist() == row.tolist()
    assert actions._ended(row, 3, None).tolist() == row.tolist()


@pytest.mark.parametrize(
    ("changes", "text", "said"),
    [
        ({}, "", r"The file --input=.*in\.txt holds no text to continue"),
        (dict(sample=dict(count=0)), "a", r"config\.sample\.count is 0, but must be a whole"),
        (dict(sample=dict(temperature=-1.0)), "a", r"config\.sample\.temperature is -1\.0"),
        (dict(model=dict(vocab=128)), "zé", r"config\.model\.vocab is 128, .* at least 196"),
    ],
)
def test_what_cannot_be_sampled_is_named(tmp_path, changes, text, said):
    config = setting(**changes)
    parts = parts_of(config, folder=tmp_path)
    (tmp_path / "in.txt").write_text(text)
    run = run_of(config, parts.model, str(tmp_path / "in.txt"))
    with pytest.raises(UserError, match=said):
        actions.sample(config, parts, run, tmp_path)


# Exports.


@pytest.mark.parametrize("action", ["evaluate", "export"])
def test_input_is_refused_where_it_means_nothing(tmp_path, action):
    config = setting()
    run = run_of(config, transformer(**config.model), "some.txt")
    with pytest.raises(UserError, match=r"^--input=some\.txt is for sample and analyze\.$"):
        actions.ALL[action](config, None, run, tmp_path)


def test_an_export_of_placed_parameters_is_whole_and_has_its_tokenizer(tmp_path):
    bpe = tmp_path / "mine.json"
    bpe.write_text(tokenizers.train_bpe([TEXT], 260))
    config = setting(model=dict(vocab=264))
    parts = parts_of(config, kind=str(bpe), folder=tmp_path)
    run = run_of(config, parts.model)
    plain, mesh = run.state().params, meshes.make(data=4, model=2)
    with jax.set_mesh(mesh):
        placed = meshes.place(plain, rules(fsdp=True), mesh)
        split = jax.tree.map(lambda a, to: jax.device_put(a, to.sharding), plain, placed)
        state = SimpleNamespace(params=split)
        said = actions.export(
            config, parts, run._replace(state=lambda: state), tmp_path / "out"
        )
    chex.assert_trees_all_equal(weights.load(tmp_path / "out")[0], jax.device_get(plain))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == bpe.read_bytes()
    about = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert about == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
    }
    assert "model.safetensors, config.json, tokenizer.json, tokenizer_config.json" in said


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    config = setting()
    parts = parts_of(config, folder=tmp_path)
    run = run_of(config, parts.model)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    actions.export(config, parts, run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    actions.export(config, parts, run, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
