"""The published recipe, number by number (arXiv:2506.14562 and its release)."""

import pytest

from common import config as configs
from common import runner
from lm.transformer import SIZES, parameters

# steps, peak learning rate, parameters
PUBLISHED = {
    "60m": (10_000, 1e-3, 58_073_600),
    "135m": (20_000, 1e-3, 134_105_856),
    "350m": (60_000, 1e-3, 367_969_280),
    "1b": (90_000, 6e-4, 1_339_082_752),
}


def load(size):
    return configs.load(f"configs/alphadecay.py:{size}")


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_recipe(size):
    c = load(size)
    steps, peak, count = PUBLISHED[size]
    assert (c.steps, c.optim.learning_rate) == (steps, peak)
    assert parameters(**c.model) == count
    assert {name: c.model[name] for name in SIZES[size]} == SIZES[size]
    assert (c.batch_size, c.data.length, c.data.pack, c.data.end_cut) == (512, 256, False, True)
    assert (c.data.limit, c.eval.tokens, c.model.dtype) == (0, 10_000_000, "bfloat16")
    o = c.optim
    assert (o.name, o.b1, o.b2, o.eps) == ("adam", 0.9, 0.999, 1e-8)
    assert (o.warmup, o.final, o.clip, o.decay_rest) == (0.1, 0.1, 1.0, "base")
    a = o.alphadecay
    assert (o.weight_decay, a.s1, a.s2, a.every) == (5e-6, 0.67, 5.0, 500)
    assert (a.fit, a.reference, a.assignment, a.score) == ("median", "mle", "linear", "alpha")
    assert c.batch_size % c.accumulate == 0


@pytest.mark.parametrize(
    ("size", "name", "strengths"),
    [
        ("60m_adam", "adam", {1e-5: 3.0, 5e-6: 5.0, 1e-6: 5.0}),
        ("paper", "adam", {1e-5: 3.0, 5e-6: 5.0, 1e-6: 5.0}),
        ("60m_adamw", "adamw", {0.1: 5.0, 0.05: 5.0, 0.01: 5.0}),
        ("135m_adamw", "adamw", {0.1: 5.0, 0.05: 5.0, 0.01: 5.0}),
    ],
)
def test_the_tables(size, name, strengths):
    c = load(size)
    runs = runner.variants(c)
    rules = {}
    for each in runs.values():
        o = each.optim
        assert o.name == name
        rules.setdefault(o.rule, {})[o.weight_decay] = o.alphadecay.s2
    assert set(rules) == {"none", "uniform", "awd", "adadecay_module", "alphadecay"}
    assert rules["alphadecay"] == strengths
    assert all(set(rules[r]) == set(strengths) for r in rules if r != "none")
    assert c.optim.awd_factor == 100.0
    seeds = {each.seed for each in runs.values()}
    assert seeds == (set(range(5, 11)) if size == "paper" else {0})


@pytest.mark.parametrize("rule", ["uniform_matched", "static_by_type"])
def test_controls_wait_for_measured_means_at_published_sizes(rule):
    c = load("60m")
    configs.apply(c, dict(optim=dict(rule=rule)))
    with pytest.raises(configs.UserError, match="the mean of an AlphaDecay run of this recipe"):
        runner.make(c)
