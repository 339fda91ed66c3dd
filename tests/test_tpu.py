"""Steps compile for TPUs that nobody has to own. Skipped without libtpu (the extra `tpu`)."""

import jax
import pytest

from common import aot, runner
from common import config as configs
from common.errors import UserError

# Config -> what its size `test` needs to change on a TPU; float64 there has no determinants.
NARROW = {
    "configs/nqs.py": {
        "x64": "False",
        "precision.determinants": "float32",
        "precision.linalg": "float32",
    },
}


def libtpu():
    return pytest.importorskip("libtpu", reason="the extra `tpu` is not installed")


@pytest.mark.parametrize("path", [str(path) for path in configs.listed()])
def test_the_step_compiles_for_a_pod(path):
    libtpu()
    config = configs.load(f"{path}:test")
    for field, text in NARROW.get(path, {}).items():
        configs.override(config, field, text)
    with jax.enable_x64(config.x64):
        cost = aot.compile_step(runner.make(config), config, topology="v5e:4x4")
    assert cost.devices == 16
    assert cost.temporary_bytes > 0


def test_what_a_tpu_cannot_do_is_said_in_a_sentence():
    libtpu()
    config = configs.load("configs/nqs.py:test")
    with jax.enable_x64(True), pytest.raises(UserError, match="does not compile for 4 devices"):
        aot.compile_step(runner.make(config), config, topology="v5e:2x2")


def test_topologies_that_are_none_are_refused():
    with pytest.raises(UserError, match="--input=v0:1x1 is no TPU topology"):
        aot.tpus("v0:1x1")
