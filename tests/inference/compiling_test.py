"""Seconds of decoding leave out what a program's first run takes beside its work."""

import time

import pytest

from calm.decode import compiled
from calm.inference import compiling


@pytest.fixture
def work(monkeypatch):
  """A program: its first run compiles it, and prepares kernels for a while."""
  calls = []

  def run():
    calls.append(len(calls))
    if len(calls) == 1:
      compiled._made["work"] += 1
      time.sleep(0.1)
    return calls[-1]

  monkeypatch.setattr(compiled, "_made", compiled._made.copy())
  return run


def test_the_second_run_of_a_new_program_counts(work):
  clock = compiling.Clock()
  assert clock.run("decode", work) == 1
  assert clock.seconds["decode"] < 0.1 <= clock.compile_seconds
  assert clock.run("decode", work) == 2, "a program that is there runs once"


def test_a_long_first_run_is_not_made_again(work, monkeypatch):
  monkeypatch.setattr(compiling, "FIRST_SECONDS", 0.05)
  clock = compiling.Clock()
  assert clock.run("encode", work) == 0
  assert clock.seconds == {"encode": pytest.approx(0.1, abs=0.09), "decode": 0.0}
  assert clock.compile_seconds < 0.05
