"""Stopping cleanly: between steps at once, within a step after it."""

import os
import signal

import pytest

from forge_jax.trainer import loop


def test_a_signal_while_waiting_ends_the_wait():
  with (
    loop.StopSignal() as stop,
    pytest.raises(loop.Interrupted),
    stop.interruptible(),
  ):
    os.kill(os.getpid(), signal.SIGTERM)
  assert stop.requested


def test_a_signal_while_computing_is_only_noted():
  with loop.StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested
    with pytest.raises(loop.Interrupted), stop.interruptible():
      pass


def test_a_second_ctrl_c_ends_the_process_the_usual_way():
  with loop.StopSignal():
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_are_put_back():
  before = signal.getsignal(signal.SIGINT)
  with loop.StopSignal():
    assert signal.getsignal(signal.SIGINT) != before
  assert signal.getsignal(signal.SIGINT) == before
