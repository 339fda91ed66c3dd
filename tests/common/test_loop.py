"""Every promise of the loop, on the toy, in this process."""

import contextlib
import shutil

import chex
import jax
import numpy as np
import pytest

from common import config as configs
from common import loop, metrics, runner
from common.checkpoint import Checkpoints
from common.errors import UserError
from common.experiment import Run
from tests import toy

TOY = "tests/toy_config.py"


class Never:
    """A `Stop` that nobody signals, or that asks to leave at one step."""

    def __init__(self, at=None):
        self.at, self.asked = at, 0

    def after_step(self):
        return contextlib.nullcontext()

    at_rest = after_step

    def requested(self):
        self.asked += 1
        return 143 if self.asked == self.at else 0


def config(devices=1, **changes):
    made = configs.load(TOY)
    made.mesh.data = devices
    configs.apply(made, changes)
    return made


def train(folder, stop=None, experiment=None, donor=None, **changes):
    c = config(**changes)
    made = experiment or toy.make(c)
    folder.mkdir(parents=True, exist_ok=True)
    loop.train(made, c, folder, stop or Never(), donor)
    return result(folder, made, c)


def result(folder, made, c) -> Run:
    return runner.load(made, c, folder, "toy")


def leaves(run):
    return jax.tree.map(np.asarray, run.state())


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("at", [1, 9, 10, 17, 29])
def test_resume_changes_no_bit(tmp_path, devices, at):
    whole = train(tmp_path / "whole", devices=devices)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "cut", Never(at), devices=devices)
    assert stopped.value.code == 143
    cut = train(tmp_path / "cut", devices=devices)
    chex.assert_trees_all_equal(leaves(cut), leaves(whole))
    read = [(tmp_path / f / "metrics.jsonl").read_text() for f in ("cut", "whole")]
    assert read[0] == read[1]


def test_rows_of_steps_that_are_done_again_stand_once(tmp_path):
    whole = train(tmp_path / "a", eval_every=5)
    folder = tmp_path / "a"
    shutil.rmtree(folder / "checkpoints" / "30")  # As if killed while it was written.
    again = train(folder, eval_every=5)
    assert again.rows == whole.rows
    train_steps = [r["step"] for r in again.rows if r["split"] == "train"]
    assert train_steps == list(range(3, 31, 3))
    assert [r["step"] for r in again.rows if r["split"] == "eval"] == list(range(5, 31, 5))


def test_an_evaluation_lost_behind_its_checkpoint_is_made_up(tmp_path):
    whole = train(tmp_path / "a", eval_every=10)
    path = tmp_path / "a" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))  # Killed before the last evaluation's row.
    assert train(tmp_path / "a", eval_every=10).rows == whole.rows


def test_another_mesh_continues(tmp_path):
    whole = train(tmp_path / "whole", devices=8)
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", Never(13), devices=8)
    other = train(tmp_path / "cut", devices=1)
    chex.assert_trees_all_close(leaves(other), leaves(whole), rtol=1e-5)


def test_a_finished_run_is_left_alone_and_a_longer_one_continues(tmp_path):
    first = train(tmp_path / "a")
    before = (tmp_path / "a" / "metrics.jsonl").read_text()
    train(tmp_path / "a")
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == before
    longer = train(tmp_path / "a", steps=40)
    assert longer.rows[: len(first.rows)] == first.rows
    assert longer.rows[-1]["step"] == 40


def test_nan_stops_and_is_never_the_newest_checkpoint(tmp_path):
    rows = train(tmp_path / "ok").rows
    losses = metrics.select(rows, "loss")[1]
    threshold = float(np.sort(losses)[2])
    with pytest.raises(loop.NotFinite, match=r"grad_norm is not finite at step \d+; the last"):
        train(tmp_path / "nan", toy={"nan_below": threshold})
    kept = metrics.read(tmp_path / "nan" / "metrics.jsonl")
    assert all(metrics.first_bad(r) is None for r in kept)
    with Checkpoints(tmp_path / "nan" / "checkpoints") as c:
        assert all(s < 30 for s in c.steps())


def test_one_compilation_and_a_sane_clock(tmp_path):
    run = train(tmp_path / "a")
    assert run.timing["compilations"] == 1
    assert run.timing["steps_timed"] == 29
    assert run.timing["steps_per_second"] > 0
    assert 0 < run.timing["peak_host_memory_mb"] < 1e6


def test_only_the_first_run_of_a_command_knows_its_start(tmp_path, monkeypatch):
    monkeypatch.setattr(loop._Clock, "measured_command", False)
    first, second = (train(tmp_path / n, steps=2).timing for n in "ab")
    assert first["seconds_from_command_to_first_step"] > first["seconds_to_first_step"] > 0
    assert second["seconds_from_command_to_first_step"] is None
    assert second["seconds_in_all"] > second["seconds_to_first_step"] > 0


def test_the_host_stays_within_two_steps_of_the_device(tmp_path, monkeypatch):
    """Step n + 1 is dispatched after step n - 1 ended, and while n may still run; batch
    n + 1 does not wait for it."""
    events = []
    made = toy.make(config())
    monkeypatch.setattr(loop, "stepper", lambda *_: numbered(events))
    monkeypatch.setattr(loop.jax, "block_until_ready", lambda v: events.append(("wait", v)))
    monkeypatch.setattr(loop.Checkpoints, "save", lambda *_: None)
    with pytest.raises(SystemExit):
        train(tmp_path / "a", Never(5), experiment=batches(made, events), log_every=30)
    events = [e for e in events if e != ("wait", None)]
    for n in range(2, 5):
        dispatched, made_next = events.index(("step", n)), events.index(("batch", n + 1))
        assert events.index(("wait", {"n": n - 2})) < dispatched < made_next
        assert made_next < events.index(("wait", {"n": n - 1}))


def numbered(events):
    def step(state, batch, key, number):
        events.append(("step", int(number)))
        return state, {"n": int(number)}

    return step


def batches(made, events):
    def batch(step):
        events.append(("batch", step))
        return made.batch(step)

    return made._replace(batch=batch)


def test_the_first_process_decides_about_a_missing_evaluation(tmp_path, monkeypatch):
    whole = train(tmp_path / "a")
    monkeypatch.setattr(metrics, "read", lambda path: [])  # A host that sees an old file.
    monkeypatch.setattr(loop.pod, "agreed", lambda value: value if value > 1 else 0)
    monkeypatch.setattr(loop._Work, "evaluate", lambda *_: pytest.fail("evaluated alone"))
    train(tmp_path / "a")
    assert whole.rows


def test_adopt_takes_the_weights_and_nothing_else(tmp_path):
    donor = train(tmp_path / "donor", seed=5)
    c = config(seed=1, steps=1)
    made = toy.make(c)
    seen = {}

    def adopt(fresh, other):
        seen["walkers"] = np.asarray(fresh.walkers)
        seen["donor"] = np.asarray(other.params["layer"]["kernel"])
        return fresh._replace(params=other.params)

    loop_experiment = made._replace(adopt=adopt)
    train(tmp_path / "new", experiment=loop_experiment, donor=donor.state, seed=1, steps=1)
    np.testing.assert_array_equal(seen["donor"], leaves(donor).params["layer"]["kernel"])
    assert not np.array_equal(seen["walkers"], leaves(donor).walkers)
    with pytest.raises(UserError, match="cannot adopt"):
        train(tmp_path / "no", experiment=made._replace(adopt=None), donor=donor.state)
