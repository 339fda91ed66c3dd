"""How a process finds its pod, and its signals."""

import os
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from common import pod, runtime
from common import stop as stopping
from common.errors import UserError


@pytest.mark.parametrize(
    ("count", "index", "said"),
    [
        ("2", None, "JAX_PROCESS_ID is missing"),
        (None, "0", "JAX_NUM_PROCESSES is missing"),
        ("two", "0", "JAX_NUM_PROCESSES is 'two', but must be a whole number."),
        ("2", "-1", "JAX_PROCESS_ID is '-1', but must be a whole number."),
        ("2", "2", "JAX_PROCESS_ID is 2, but must be below 2."),
    ],
)
def test_a_wrong_place_in_the_pod_is_named(monkeypatch, count, index, said):
    for name, value in (("JAX_NUM_PROCESSES", count), ("JAX_PROCESS_ID", index)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="^" + said):
        runtime._place_in_pod()


def test_a_place_in_the_pod(monkeypatch):
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    assert runtime._place_in_pod() == (None, None)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert runtime._place_in_pod() == (2, 1)


@pytest.fixture
def _handlers():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_alone_a_signal_waits_within_training_only(number):
    stop = stopping.Stop()
    with stop.after_step():
        assert stop.requested() == 0
        os.kill(os.getpid(), number)
        assert stop.requested() == 128 + number
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_among_many_a_signal_is_exchanged_first(monkeypatch, number):
    """The one that hears it leaves no sooner than those that hear it from the network."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    network = []
    monkeypatch.setattr(pod, "largest", lambda value: network.append(value) or max(network))
    stop = stopping.Stop()
    assert stop.requested() == 0
    os.kill(os.getpid(), number)  # Between two runs, too, it is only noted.
    assert stop.requested() == 0
    assert stop.requested() == 128 + number
    assert network == [0, number, number]


def test_largest_is_on_every_device():
    found = pod.largest(7)
    assert int(np.asarray(found)) == 7
    assert found.sharding.is_fully_replicated


def test_only_a_closed_event_loop_is_not_worth_a_traceback():
    seen = []
    hook = runtime._but_closed_loops(seen.append)
    hook(SimpleNamespace(exc_value=RuntimeError("Event loop is closed")))
    assert not seen
    others = [RuntimeError("another"), ValueError("Event loop is closed"), None]
    for error in others:
        hook(SimpleNamespace(exc_value=error))
    assert [found.exc_value for found in seen] == others
