"""Config files, overrides, and the sentence for every mistake."""

import json

import pytest

from common import config as configs
from common.errors import UserError
from common.runner import variants

TOY = "tests/toy_config.py"


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("steps", "7", 7),
        ("toy.nan_below", "2", 2.0),
        ("toy.nan_below", "1e-3", 1e-3),
        ("toy.nan_below", "-inf", float("-inf")),
        ("toy.name", "b", "b"),
        ("toy.name", "'7'", "7"),
        ("toy.name", "7", "7"),
        ("toy.pair", "(3, 4)", (3, 4)),
        ("toy.pair", "[3, 4]", (3, 4)),
        ("x64", "True", True),
    ],
)
def test_override_keeps_the_type(field, text, value):
    config = configs.load(TOY)
    configs.override(config, field, text)
    node = config
    for part in field.split("."):
        node = node[part]
    assert node == value
    assert type(node) is type(value)


@pytest.mark.parametrize(
    ("field", "text", "sentence"),
    [
        ("stepz", "7", "config has no field 'stepz'. Did you mean 'steps'?"),
        ("toy.widht", "7", "config.toy has no field 'widht'. Did you mean 'width'?"),
        ("toi.width", "7", "config has no field 'toi'. Did you mean 'toy'?"),
        ("toy.qqq", "7", "config.toy has no field 'qqq'. It has batch"),
        ("steps", "7.5", "config.steps is '7.5', but must be a whole number"),
        ("steps", "True", "config.steps is 'True', but must be a whole number"),
        ("steps", "many", "config.steps is 'many', but must be a whole number"),
        ("toy.nan_below", "x", "config.toy.nan_below is 'x', but must be a number"),
        ("x64", "1", "config.x64 is '1', but must be True or False"),
        ("toy.pair", "3", "config.toy.pair is '3', but must be a tuple"),
        ("toy", "3", "config.toy is a group; set one of its fields"),
        ("runs", "3", "config.runs is a group; it is empty here and filled in the config"),
        ("size", "paper", "config.size cannot be set: say the size after the colon, --config="),
        ("steps.a", "3", "config.steps is a plain value and has no field 'a'"),
    ],
)
def test_override_refuses(field, text, sentence):
    with pytest.raises(UserError) as error:
        configs.override(configs.load(TOY), field, text)
    assert str(error.value).startswith(sentence)


def test_load_names_what_is_there():
    with pytest.raises(UserError, match="unknown size 'tset'; the sizes are test, small"):
        configs.load(f"{TOY}:tset")
    with pytest.raises(UserError, match=r"Did you mean configs/nqs\.py\?"):
        configs.load("configs/nsq.py")
    with pytest.raises(UserError, match="no function get_config"):
        configs.load("tests/toy.py")


def test_runs_replace_at_a_size_and_multiply_by_seeds():
    config = configs.load(f"{TOY}:many")
    configs.override(config, "n_seeds", "2")
    found = variants(config)
    assert list(found) == ["a-seed0", "a-seed1", "b-seed0", "b-seed1"]
    assert [c.toy.batch for c in found.values()] == [8, 8, 16, 16]
    assert [c.seed for c in found.values()] == [0, 1, 0, 1]
    assert list(variants(configs.load(TOY))) == ["seed0"]


def test_a_misspelt_field_of_a_variant_is_refused():
    config = configs.load(TOY)
    config.unlock()
    config.runs = {"a": {"toy": {"bach": 3}}}
    with pytest.raises(UserError, match="Did you mean 'batch'"):
        variants(config)


def test_differences_ignore_what_a_resumed_run_may_change():
    old = json.loads(json.dumps(configs.to_dict(configs.load(TOY))))
    new = configs.load(TOY)
    new.steps, new.keep = 99, 7
    new.mesh.data = 1
    assert configs.differences(new, old) == []
    new.toy.batch = 9
    assert configs.differences(new, old) == ["toy.batch is 9 here and 8 there"]


@pytest.mark.parametrize("text", ["{", "", "[1]", "\xff"])
def test_a_damaged_config_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        configs.read(path)
    with pytest.raises(UserError, match="Cannot read"):
        configs.read(tmp_path / "none.json")


def test_restore_gives_back_what_json_lost():
    saved = configs.load(TOY)
    saved.toy.pair = (5, 6)
    config = configs.restore(configs.load(TOY), configs.to_dict(saved))
    assert config.toy.pair == (5, 6)
    assert config.is_locked
