"""What the runner refuses, and that a refusal leaves the workdir usable."""

import errno
import fcntl
import json
import shutil
import time

import jax
import pytest
from jax.sharding import PartitionSpec as P

from common import config as configs
from common import metrics, pod, runner
from common.errors import Unfit, UserError
from tests import toy
from tests.common.test_loop import Never

TOY = "tests/toy_config.py"


@pytest.fixture(autouse=True)
def _no_signals(monkeypatch):
    monkeypatch.setattr(runner, "Stop", Never)


def config(**changes):
    made = configs.load(TOY)
    made.mesh.data = 1
    configs.apply(made, dict(steps=2) | changes)
    return made


def test_a_misspelt_donor_leaves_the_workdir_to_the_right_one(tmp_path):
    runner.run(config(), tmp_path / "donor")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "empty" / "config.json").write_text("{}")
    work = tmp_path / "w"
    for wrong in ("donor/seed1", "empty"):
        with pytest.raises(UserError, match=r"init_from is .* must be a run's folder"):
            runner.run(config(init_from=str(tmp_path / wrong)), work)
        assert not work.exists()
    runner.run(config(init_from=str(tmp_path / "donor" / "seed0")), work)
    assert (work / "seed0" / "checkpoints" / "2").exists()


def test_an_experiment_that_cannot_adopt_says_so_first(tmp_path, monkeypatch):
    runner.run(config(), tmp_path / "donor")
    monkeypatch.setattr(runner, "make", lambda c: toy.make(c)._replace(adopt=None))
    with pytest.raises(UserError, match="cannot adopt"):
        runner.run(config(init_from=str(tmp_path / "donor" / "seed0")), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_an_action_leaves_out_runs_that_its_input_is_not_for(tmp_path, monkeypatch, capsys):
    """Those without the action as well; where no run is left, one sentence is the answer."""
    runs = config()
    runs.unlock()
    runs.runs = {"a": {}, "b": {"experiment": "tests.toy_more"}}
    runs.lock()

    def make(c):
        def pick(run, folder):
            if run.input != run.name:
                raise Unfit(f"--input={run.input} is not {run.name}.")
            saved = run.saved()
            assert list(saved) == [1, 2]
            states = [load() for load in saved.values()]
            assert not (states[0].walkers == states[1].walkers).all()
            assert (run.state().walkers == states[1].walkers).all()
            return f"picked {run.name}"

        own = dict(only=lambda run, folder: "one") if "more" in c.experiment else {}
        return toy.make(c)._replace(actions=dict(pick=pick) | own)

    monkeypatch.setattr(runner, "make", make)
    configs.apply(runs, dict(save_every=1))
    work = tmp_path / "w"
    runner.run(runs, work)
    runner.act(runs, work, "pick", "b-seed0", ())
    said = capsys.readouterr()
    assert "note: a-seed0 is left out: --input=b-seed0 is not a-seed0." in said.err
    assert (work / "pick.md").read_text() == "# pick: b-seed0\n\npicked b-seed0\n"
    assert [p.name for p in (work / "pick").iterdir()] == ["b-seed0"]
    runner.act(runs, work, "only", "", ())
    assert (work / "only.md").read_text() == "# only: b-seed0\n\none\n"
    with pytest.raises(UserError, match="--input=c is not b-seed0"):
        runner.act(runs, work, "pick", "c", ())
    with pytest.raises(UserError, match="experiment has pick, only, compile"):
        runner.act(runs, work, "pck", "", ())


def test_a_variant_may_start_from_one_before_it(tmp_path):
    made = config()
    made.unlock()
    made.runs = {"warm": {}, "main": {"init_from": "warm-seed0"}, "another": {}}
    made.lock()
    assert list(runner.variants(made)) == ["another-seed0", "warm-seed0", "main-seed0"]
    runner.run(made, tmp_path / "w")
    assert (tmp_path / "w" / "main-seed0" / "checkpoints" / "2").exists()


def test_runs_that_start_from_each_other_are_refused(tmp_path):
    made = config()
    made.unlock()
    made.runs = {"a": {"init_from": "b-seed0"}, "b": {"init_from": "a-seed0"}}
    made.lock()
    with pytest.raises(UserError, match="The runs a-seed0, b-seed0 start from each other"):
        runner.run(made, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_run_that_has_begun_needs_its_donor_no_more(tmp_path):
    runner.run(config(), tmp_path / "donor")
    more = config(init_from=str(tmp_path / "donor" / "seed0"))
    runner.run(more, tmp_path / "w")
    shutil.rmtree(tmp_path / "donor")
    runner.run(more, tmp_path / "w")
    with pytest.raises(UserError, match="must be a run's folder"):
        runner.run(more, tmp_path / "new")


def test_a_command_that_failed_before_its_first_checkpoint_claims_nothing(tmp_path):
    work = tmp_path / "w"
    (work / "seed0").mkdir(parents=True)
    for folder in (work, work / "seed0"):
        other = config()
        other.toy.width = 9
        metrics.write(folder / "config.json", json.dumps(configs.to_dict(other)))
    runner.run(config(), work)
    other = config()
    other.toy.width = 9
    with pytest.raises(UserError, match=r"toy\.width is 9 here and 4 there"):
        runner.run(other, work)


def test_actions_say_what_is_unfinished_and_look_before_they_work(tmp_path, capsys):
    runner.run(config(), tmp_path / "w")
    longer = json.loads((tmp_path / "w" / "config.json").read_text()) | dict(steps=50)
    metrics.write(tmp_path / "w" / "config.json", json.dumps(longer))
    runner.act(config(), tmp_path / "w", "predict", "", ())
    assert "seed0 is at step 2 of 50." in capsys.readouterr().err
    longer["n_seeds"] = 2
    metrics.write(tmp_path / "w" / "config.json", json.dumps(longer))
    (tmp_path / "w" / "predict.md").unlink()
    with pytest.raises(UserError, match="seed1 has no checkpoint"):
        runner.act(config(), tmp_path / "w", "predict", "", ())


def test_damaged_configs_are_named(tmp_path):
    runner.run(config(), tmp_path / "w")
    (tmp_path / "w" / "seed0" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"seed0/config\.json is damaged"):
        runner.run(config(init_from=str(tmp_path / "w" / "seed0")), tmp_path / "new")
    (tmp_path / "w" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"w/config\.json is damaged"):
        runner.act(config(), tmp_path / "w", "predict", "", ())


def test_reading_a_run_leaves_the_checkpoint_in_flight(tmp_path):
    runner.run(config(), tmp_path / "w")
    flight = tmp_path / "w" / "seed0" / "checkpoints" / "3.orbax-checkpoint-tmp"
    flight.mkdir()
    made = config()
    runner.load(toy.make(made), made, tmp_path / "w" / "seed0", "seed0").state()
    time.sleep(0.3)  # Orbax cleans up in the background.
    assert flight.exists()


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    runner.run(config(), tmp_path / "w")
    assert "cannot be locked (No locks available)" in capsys.readouterr().err
    assert json.loads((tmp_path / "w" / "summary.json").read_text())


def test_model_devices_need_something_to_split(tmp_path, monkeypatch):
    both = config(mesh=dict(model=2))
    with pytest.raises(UserError, match=r"config\.mesh\.model is 2, but must be 1: this"):
        runner.run(both, tmp_path / "w")
    assert not (tmp_path / "w").exists()
    rules = (("kernel$", P(None, ("data", "model"))),)
    runner._check_mesh(toy.make(both)._replace(rules=rules), both)
    runner._check_mesh(toy.make(config()), config())


def test_a_signal_between_runs_ends_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Stop", lambda: Never(3))  # Two steps, then the run's end.
    with pytest.raises(SystemExit) as stopped:
        runner.run(config(n_seeds=2), tmp_path / "w")
    assert stopped.value.code == 143
    assert (tmp_path / "w" / "seed0" / "checkpoints" / "2").exists()
    assert not (tmp_path / "w" / "seed1").exists()


def test_every_failure_of_the_first_process_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(pod, "agreed", lambda value: told.append(value) or value)
    with pytest.raises(ZeroDivisionError):
        pod.first(lambda: 1 / 0)
    assert told == [True]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(pod, "agreed", lambda value: 1)
    with pytest.raises(UserError, match="first process refused"):
        pod.first(lambda: pytest.fail("called on another process"))
