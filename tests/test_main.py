"""The command line as a user meets it: real processes, exit codes, one sentence."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOY = "--config=tests/toy_config.py"
ROOT = Path(__file__).parent.parent


def environment(**more):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    cheap = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return env | cheap | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | more


def start(*flags, env=None, **kwargs):
    return subprocess.Popen(
        [sys.executable, "main.py", *flags],
        cwd=ROOT,
        env=env or environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def run(*flags, code=0, **kwargs):
    """One command to its end; returns stdout, stderr. No traceback is ever allowed."""
    process = start(*flags, **kwargs)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (process.returncode, out, err)
    assert "Traceback" not in err, err
    return out, err


def sentence(*flags, **kwargs):
    """The one line that a user's mistake is answered with."""
    out, err = run(*flags, code=2, **kwargs)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert not out, out
    return lines[0]


def files(folder):
    """Every byte of the results that must repeat; timing and locks must not."""
    kept = {}
    for name in ("config.json", "metrics.jsonl"):
        for path in sorted(Path(folder).rglob(name)):
            kept[str(path.relative_to(folder))] = path.read_bytes()
    return kept


def state(folder, *flags):
    """The final state, as the toy's action prints it."""
    return run(*flags, f"--workdir={folder}", "--do=predict", "--input=x")[0].split("Written")[
        0
    ]


def test_alone_it_lists_the_configs():
    out, _ = run()
    assert "configs/nqs.py" in out
    assert "Hubbard model" in out
    assert "base.py" not in out


def test_a_run_leaves_everything_and_says_where(tmp_path):
    out, err = run(TOY, f"--workdir={tmp_path}/w")
    assert "Toy: {'seed0':" in out
    assert f"Report: {tmp_path}/w/report.md" in out
    assert "seed0: step 30/30" in err
    assert "loss" in err
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert summary["loss"]["seed0"] > 0
    for name in (
        "config.json",
        "report.md",
        "seed0/config.json",
        "seed0/metrics.jsonl",
        "seed0/timing.json",
        "seed0/checkpoints/30",
    ):
        assert (tmp_path / "w" / name).exists(), name
    again, _ = run(TOY, f"--workdir={tmp_path}/w")
    assert again == out


def test_actions_use_a_finished_run(tmp_path):
    work = f"--workdir={tmp_path}/w"
    assert "no finished run" in sentence(TOY, work, "--do=predict")
    run(TOY, work, "--config.n_seeds=2")
    out, _ = run(TOY, work, "--do=predict", "--input=mine.txt")
    assert "seed0 mine.txt" in out
    assert "seed1 mine.txt" in out
    assert (tmp_path / "w" / "predict.md").exists()
    said = sentence(TOY, work, "--do=predcit")
    assert "no action 'predcit'; this experiment has predict, compile." in said
    out, _ = run(TOY, work, "--do=compile")
    assert "parameters | 4" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.stepz=3"], "config has no field 'stepz'. Did you mean 'steps'?"),
        (["--config.steps={[]:1}"], "config.steps is '{[]:1}', but must be a whole number."),
        (["--config.steps=x"], "config.steps is 'x', but must be a whole number."),
        (["--config.steps=0"], "config.steps is 0, but must be a whole number from 1 up."),
        (["--config.mesh.data=64"], "config.mesh.data is 64, but must be -1, or from 1 to"),
        (["--confg.steps=3"], "Unknown argument '--confg.steps=3'"),
        (["--workdir"], "The flag --workdir needs a value"),
        (["--config.init_from=nowhere"], "config.init_from is 'nowhere', but must be a run's"),
        (["--config.experiment=nqs.nothing"], "config.experiment is 'nqs.nothing'"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, flags, said):
    assert said in sentence(TOY, f"--workdir={tmp_path}/w", *flags)


def test_unknown_sizes_and_files():
    assert "unknown size 'big'; the sizes are test, small, many." in sentence(f"{TOY}:big")
    assert "Did you mean configs/nqs.py?" in sentence("--config=configs/nq.py")
    assert "Say what to run" in sentence("--workdir=x")


def test_a_foreign_workdir_is_refused_and_left_alone(tmp_path):
    run(TOY, f"--workdir={tmp_path}/w")
    before = files(tmp_path / "w")
    said = sentence(TOY, f"--workdir={tmp_path}/w", "--config.toy.batch=4")
    assert "toy.batch is 4 here and 8 there" in said
    assert files(tmp_path / "w") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "'thesis.tex' but no config.json" in sentence(TOY, f"--workdir={tmp_path}/mine")
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["thesis.tex"]
    run(TOY, f"--workdir={tmp_path}/w", "--config.steps=33")


def test_an_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "Cannot write to" in sentence(TOY, f"--workdir={tmp_path}/file/w")
    assert "Cannot write to" in sentence(TOY, "--workdir=/proc/w")


def test_a_full_disk_loses_nothing(tmp_path):
    """The process may write 40 kB a file: the first checkpoint of a large toy is more."""
    work, wide = f"--workdir={tmp_path}/w", "--config.toy.n_walkers=16000"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    signal_off = environment(PYTHONUNBUFFERED="1", JAX_ENABLE_COMPILATION_CACHE="false")
    said = sentence(TOY, work, wide, env=signal_off, preexec_fn=limit)
    assert "Cannot write to" in said
    run(TOY, work, wide)
    run(TOY, f"--workdir={tmp_path}/whole", wide)
    assert files(tmp_path / "w") == files(tmp_path / "whole")


def test_a_damaged_checkpoint_is_named_and_deleting_it_continues(tmp_path):
    work = tmp_path / "w"
    run(TOY, f"--workdir={work}")
    before = files(work)
    newest = work / "seed0" / "checkpoints" / "30"
    for data in newest.rglob("d/*"):
        data.write_bytes(data.read_bytes()[:-7])
    said = sentence(TOY, f"--workdir={work}")
    assert "checkpoints/30 is damaged" in said
    assert "delete that folder to continue from step 20." in said
    assert files(work) == before
    shutil.rmtree(newest)
    run(TOY, f"--workdir={work}")
    assert files(work) == before


def test_nan_exits_with_one_and_names_the_last_good_step(tmp_path):
    _, err = run(TOY, f"--workdir={tmp_path}/w", "--config.toy.nan_below=1e9", code=1)
    assert "grad_norm is not finite at step 3; the last good checkpoint: none" in err


def newest_row(metrics: Path) -> int:
    """The step of the last whole row; 0 before there is one."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


LONG = ["--config.steps=3000", "--config.save_every=200", "--config.log_every=50"]


def wait_for(path, process, seconds=120):
    for _ in range(int(seconds / 0.02)):
        if list(path.parent.glob(path.name)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"{path} never came")


def test_sigterm_saves_and_the_same_command_ends_bitwise_the_same(tmp_path):
    work = tmp_path / "w"
    process = start(TOY, f"--workdir={work}", *LONG)
    wait_for(work / "seed0" / "checkpoints" / "[24]00", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Saved step" in err
    assert "Traceback" not in err
    run(TOY, f"--workdir={work}", *LONG)
    run(TOY, f"--workdir={tmp_path}/whole", *LONG)
    assert files(work) == files(tmp_path / "whole")
    assert state(work, TOY) == state(tmp_path / "whole", TOY)


def test_sigkill_at_random_moments_changes_no_bit(tmp_path):
    work, moments = tmp_path / "w", random.Random(0)
    for step in sorted(moments.sample(range(1, 2800), 4)):
        process = start(TOY, f"--workdir={work}", *LONG)
        while newest_row(work / "seed0" / "metrics.jsonl") < step:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    run(TOY, f"--workdir={work}", *LONG)
    run(TOY, f"--workdir={tmp_path}/whole", *LONG)
    assert files(work) == files(tmp_path / "whole")
    assert state(work, TOY) == state(tmp_path / "whole", TOY)


def test_a_second_process_in_the_same_workdir_is_refused(tmp_path):
    process = start(TOY, f"--workdir={tmp_path}/w", "--config.steps=1000000")
    wait_for(tmp_path / "w" / "seed0" / "config.json", process)
    try:
        said = sentence(TOY, f"--workdir={tmp_path}/w", "--config.steps=1000000")
        assert "Another process is at work" in said
    finally:
        process.kill()
        process.communicate()


def pair(*flags):
    """Two processes of one command."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [
        start(
            TOY,
            *flags,
            env=environment(
                JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(i),
                XLA_FLAGS="--xla_force_host_platform_device_count=4",
            ),
        )
        for i in range(2)
    ]


def ended(both, code=0):
    said = [p.communicate(timeout=200) for p in both]
    assert [p.returncode for p in both] == [code, code], said
    return said


def test_two_processes_follow_one(tmp_path):
    said = ended(pair(f"--workdir={tmp_path}/two"))
    assert "Toy:" in said[0][0]
    ours = [line for line in said[1][0].splitlines() if "Gloo" not in line]
    assert not ours  # Only the first process speaks.
    run(TOY, f"--workdir={tmp_path}/one")
    rows = [
        [json.loads(line) for line in (tmp_path / w / "seed0/metrics.jsonl").open()]
        for w in ("two", "one")
    ]
    assert len(rows[0]) == len(rows[1]) == 11
    for two, one in zip(*rows, strict=True):
        assert {k: two[k] for k in ("step", "split")} == {k: one[k] for k in ("step", "split")}
        for name in set(one) - {"step", "split", "list"}:
            assert two[name] == pytest.approx(one[name], rel=1e-5)


def test_sigterm_to_one_of_two_processes_is_heard_by_both(tmp_path):
    """In the second run of the command, after as many steps again."""
    long = ["--config.n_seeds=2", "--config.steps=500", "--config.save_every=100"]
    both = pair(f"--workdir={tmp_path}/w", *long)
    wait_for(tmp_path / "w" / "seed1" / "checkpoints" / "[12]00", both[0])
    both[1].send_signal(signal.SIGTERM)
    said = ended(both, 143)
    assert "Saved step" in said[0][1]
    assert "Traceback" not in said[0][1] + said[1][1]
    assert not list((tmp_path / "w" / "seed1" / "checkpoints").glob("500"))
    ended(pair(f"--workdir={tmp_path}/w", *long))
    ended(pair(f"--workdir={tmp_path}/whole", *long))
    assert files(tmp_path / "w") == files(tmp_path / "whole")
