"""The promises of the house, kept by a real run: the Hubbard model from the command line."""

import json
import random
import re
import signal
import socket
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from common import config as configs
from common import runner
from tests.test_main import environment, files, newest_row, run, sentence, start, wait_for

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
    some = ["--config.steps=200", "--config.save_every=10"]
    process = start(NQS, f"--workdir={work}", *some)
    wait_for(work / "seed0" / "checkpoints" / "10", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "Saved step" in err
    run(NQS, f"--workdir={work}", *some)
    run(NQS, f"--workdir={tmp_path}/whole", *some)
    same(work, tmp_path / "whole")


def test_two_processes_of_two_devices_follow_one(tmp_path):
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

    wide = "--config.precision.net=float64"  # In float32 a walker may go another way.
    flags = (NQS, f"--workdir={tmp_path}/two", wide)
    both = [start(*flags, env=join(i)) for i in range(2)]
    said = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    run(NQS, f"--workdir={tmp_path}/one", wide)
    two, one = (
        [json.loads(line) for line in (tmp_path / w / "seed0/metrics.jsonl").open()]
        for w in ("two", "one")
    )
    assert [r["step"] for r in two] == [r["step"] for r in one]
    for ours, theirs in zip(two, one, strict=True):
        for name in ("energy", "variance", "acceptance"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-8), name
    chex.assert_trees_all_close(final(tmp_path / "two"), final(tmp_path / "one"), atol=1e-7)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.start.orbitals=zero"], "config.start.orbitals is 'zero', but must be"),
        (["--config.optim.dampign=1"], "config.optim has no field 'dampign'. Did you mean"),
        (["--config.model.n_up=7"], "config.model.n_up is 7, but must be a whole number from"),
        (["--config.model.U=nan"], "config.model.U is nan, but must be a finite number"),
        (["--config.sampler.n_walkers=31"], "config.sampler.n_walkers is 31, but must be a"),
        (["--config.ansatz.n_heads=3"], "config.ansatz.n_heads is 3, but must be a divisor"),
        (["--config.x64=False"], "config.precision.determinants is 'float64', but config.x64"),
        (["--config.lattice.bc_x=moebius"], "config.lattice.bc_x is 'moebius', but must be"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(tmp_path, flags, said):
    two = environment(XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert said in sentence(NQS, f"--workdir={tmp_path}/w", *flags, env=two)
    assert not (tmp_path / "w").exists()


def test_evaluate_measures_a_finished_run_again(tmp_path):
    work = f"--workdir={tmp_path}/w"
    run(NQS, work)
    out, _ = run(NQS, work, "--do=evaluate", "--config.eval.blocks=8")
    assert re.search(r"\| seed0 \| -?\d", out)
    assert (tmp_path / "w" / "evaluate" / "seed0" / "density.png").exists()


def test_paper_size_compiles_ahead_of_time():
    out, _ = run("--config=configs/nqs.py:paper", "--do=compile")
    assert "| parameters | 1,838,848 |" in out
    assert "GiB" in out
    assert "FLOPs in all" in out
