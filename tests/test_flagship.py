"""The promises of the house, kept by a real run: the Hubbard model from the command line."""

import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from common import config as configs
from common import runner
from tests.test_main import ROOT, environment, files, newest_row, run, start, wait_for

NQS = "--config=configs/nqs.py:test"
LONG = ["--config.steps=300", "--config.save_every=20", "--config.log_every=5"]


def final(workdir: Path):
    """Parameters, optimizer state and walkers of a finished run."""
    config = configs.restore(
        configs.load("configs/nqs.py:test"), json.loads((workdir / "config.json").read_text())
    )
    (each,) = runner.variants(config).values()
    each.mesh.data = 1
    with jax.enable_x64(True):
        made = runner.make(each)
    # For all threads: Orbax has its own, which the context manager would not reach.
    jax.config.update("jax_enable_x64", True)
    try:
        state = runner.load(made, each, workdir / "seed0", "seed0").state()
        return jax.tree.map(np.asarray, state)
    finally:
        jax.config.update("jax_enable_x64", False)


def same(one: Path, other: Path) -> None:
    assert files(one) == files(other)
    chex.assert_trees_all_equal(final(one), final(other))


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_bit(tmp_path):
    work, moments = tmp_path / "w", random.Random(0)
    for step in sorted(moments.sample(range(1, 290), 10)):
        process = start(NQS, f"--workdir={work}", *LONG)
        while newest_row(work / "seed0" / "metrics.jsonl") < step:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(0.3 * moments.random())
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (work / "report.md").exists()
    run(NQS, f"--workdir={work}", *LONG)
    run(NQS, f"--workdir={tmp_path}/whole", *LONG)
    same(work, tmp_path / "whole")


def test_sigterm_saves_and_the_same_command_ends_the_same(tmp_path):
    work = tmp_path / "w"
    some = ["--config.steps=100", "--config.save_every=10"]
    process = start(NQS, f"--workdir={work}", *some)
    wait_for(work / "seed0" / "checkpoints" / "10", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "Saved step" in err
    run(NQS, f"--workdir={work}", *some)
    run(NQS, f"--workdir={tmp_path}/whole", *some)
    assert files(work) == files(tmp_path / "whole")  # Its evaluation sees all of the state.


WIDE = "--config.precision.net=float64"  # In float32 a walker may go another way.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one process and one device."""
    work = tmp_path_factory.mktemp("one") / "w"
    run(NQS, f"--workdir={work}", WIDE)
    return work


@pytest.mark.xdist_group("finished")
def test_two_processes_of_two_devices_follow_one(finished, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def join(i):
        return environment(
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(i),
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
        )

    flags = (NQS, f"--workdir={tmp_path}/two", WIDE)
    both = [start(*flags, env=join(i)) for i in range(2)]
    said = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    two, one = (
        [json.loads(line) for line in (work / "seed0/metrics.jsonl").open()]
        for work in (tmp_path / "two", finished)
    )
    assert [r["step"] for r in two] == [r["step"] for r in one]
    for ours, theirs in zip(two, one, strict=True):
        for name in ("energy", "variance", "acceptance"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-8), name
    chex.assert_trees_all_close(final(tmp_path / "two"), final(finished), atol=1e-7)


REFUSED = [
    (["--config.start.orbitals=zero"], "config.start.orbitals is 'zero', but must be"),
    (["--config.optim.dampign=1"], "config.optim has no field 'dampign'. Did you mean"),
    (["--config.model.n_up=7"], "config.model.n_up is 7, but must be a whole number from"),
    (["--config.model.U=nan"], "config.model.U is nan, but must be a finite number"),
    (["--config.sampler.n_walkers=31"], "config.sampler.n_walkers is 31, but must be a"),
    (["--config.ansatz.n_heads=3"], "config.ansatz.n_heads is 3, but must be a divisor"),
    (["--config.x64=False"], "config.precision.determinants is 'float64', but config.x64"),
    (["--config.lattice.bc_x=moebius"], "config.lattice.bc_x is 'moebius', but must be"),
]
COMMANDS = """
import sys, main

def again(x64):  # A process joins its pod once.
    import jax
    jax.config.update("jax_enable_x64", x64)

for flag in sys.argv[2:]:
    print(main.main([*sys.argv[1].split(), flag]), file=sys.stderr)
    if "jax" in sys.modules:
        main.runtime.start = again
"""


def test_what_cannot_be_is_said_in_a_sentence(tmp_path):
    """All in one process of two devices, as starting takes longer than refusing."""
    flags = [f for (f,), _ in REFUSED]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, f"{NQS} --workdir={tmp_path}/w", *flags],
        cwd=ROOT,
        env=environment(XLA_FLAGS="--xla_force_host_platform_device_count=2"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 2 * len(REFUSED), done.stderr
    for (_, said), sentence, code in zip(REFUSED, lines[::2], lines[1::2], strict=True):
        assert sentence.startswith(f"error: {said}"), sentence
        assert code == "2"
    assert not (tmp_path / "w").exists()


@pytest.mark.xdist_group("finished")
def test_evaluate_measures_a_finished_run_again(finished):
    out, _ = run(NQS, f"--workdir={finished}", "--do=evaluate", "--config.eval.blocks=8")
    assert re.search(r"\| seed0 \| -?\d", out)
    assert (finished / "evaluate" / "seed0" / "density.png").exists()


def test_paper_size_compiles_ahead_of_time():
    out, _ = run("--config=configs/nqs.py:paper", "--do=compile")
    assert "| parameters | 1,838,848 |" in out
    assert "GiB" in out
    assert "FLOPs in all" in out
