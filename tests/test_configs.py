"""Every config: listed with a line, refuses typos, shape-checks at every size, and runs
from the command line to a report at size `test`. An eleventh paper is found by its place."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from common import config as configs
from common import mesh as meshes
from common import runner
from common.checkpoint import described
from tests.test_main import ROOT, environment

CONFIGS = [p.relative_to(ROOT) for p in configs.listed(str(ROOT / "configs"))]


def sizes(path: Path) -> list[str]:
    """The sizes that the refusal of an unknown one lists."""
    with pytest.raises(configs.UserError) as error:
        configs.load(f"{path}:no-such-size")
    return re.search(r"the sizes are (.*)\.$", str(error.value))[1].split(", ")


SIZES = [(path, size) for path in CONFIGS for size in sizes(path)]


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_says_in_a_line_what_it_is_and_has_the_three_sizes(path):
    assert len(configs.headline(ROOT / path)) > 20
    assert {"test", "small", "paper"} <= set(sizes(path))
    assert configs.load(str(path)).size == "small"


# Eight networks of ImageNet each: half a minute.
LONG = ("imagenet64_ladder", "imagenet512_ladder")


@pytest.mark.parametrize(
    ("path", "size"),
    [
        pytest.param(path, size, marks=[pytest.mark.slow] if size in LONG else [])
        for path, size in SIZES
    ],
    ids=str,
)
def test_every_size_shape_checks(path, size):
    """The step of every variant keeps the shapes and types of its state; no arithmetic."""
    config = configs.load(f"{path}:{size}")
    config.n_seeds = 1
    with jax.enable_x64(config.x64), jax.set_mesh(meshes.make(**config.mesh)):
        for each in runner.variants(config).values():
            experiment = runner.make(each)
            state = jax.eval_shape(experiment.init, jax.random.key(0))
            batch = experiment.batch(0)
            after, found = jax.eval_shape(experiment.step, state, batch, jax.random.key(0))
            assert described(after) == described(state)
            assert all(value.shape == () for value in found.values())


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_runs_to_a_report(path, tmp_path):
    work = tmp_path / "w"
    command = [sys.executable, "main.py", f"--config={path}:test", f"--workdir={work}"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert f"Report: {work}/report.md" in done.stdout
    summary = json.loads((work / "summary.json").read_text())
    assert summary
    text = (work / "report.md").read_text()
    pictures = re.findall(r"!\[[^]]*\]\((figures/[^)]*)\)", text)
    assert pictures
    for name in pictures:
        assert (work / name).read_bytes().startswith(b"\x89PNG")
