"""A signal ends a loop between two steps, wherever it comes; a second one ends the process."""

import signal
import subprocess
import sys
import threading
import weakref

import pytest

from calm import signals

STEPS = 4


class Thing:
  """Something with a weak reference, whose callback swallows what is raised in it."""


@pytest.fixture(autouse=True)
def handled():
  """A shell starts what it puts into the background with SIGINT ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def loop(first: list[int], second: list[int]) -> None:
  """Steps of two halves, with what swallows exceptions between them."""
  for number in range(STEPS):
    signals.check()
    first.append(number)
    thing = Thing()
    reference = weakref.ref(thing, lambda _: len(first))
    del thing, reference
    try:
      len(second)
    except BaseException:
      len(first)
    second.append(number)


def run(point: int | None, number: int) -> tuple[list[int], list[int], int, type | None]:
  """The loop with a signal at one of its lines: (both halves, lines run, what it raised)."""
  first, second, lines = [], [], 0

  def trace(frame, event, argument):
    nonlocal lines
    if frame.f_code.co_filename != __file__:
      return None
    if event == "line":
      if lines == point:
        signal.raise_signal(number)
      lines += 1
    return trace

  raised, tracing = None, sys.gettrace()
  try:
    with signals.deferred():
      sys.settrace(trace)
      try:
        loop(first, second)
      finally:
        sys.settrace(tracing)
  except KeyboardInterrupt as error:
    raised = type(error)
  return first, second, lines, raised


@pytest.mark.parametrize(
  ("number", "error"),
  [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, signals.Terminated)],
)
def test_a_signal_at_any_line_ends_the_loop_after_a_whole_step(number, error):
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  first, second, lines, raised = run(None, number)
  assert first == second == list(range(STEPS)) and raised is None and lines > 8 * STEPS
  ended = set()
  for point in range(lines):
    first, second, _, raised = run(point, number)
    assert first == second == list(range(len(first))), f"torn by a signal at line {point}"
    assert raised is error, f"a signal at line {point} was lost"
    ended.add(len(first))
  assert ended == {*range(STEPS + 1)}
  assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
  signals.check()  # the flag is down again


def test_the_flag_stays_up_where_what_it_raises_is_swallowed():
  with pytest.raises(signals.Terminated), signals.deferred(), signals.deferred():
    signal.raise_signal(signal.SIGTERM)
    for _ in range(3):
      with pytest.raises(signals.Terminated):
        signals.check()


def test_signals_that_are_ignored_and_other_threads_are_left_alone():
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with signals.deferred():
    signal.raise_signal(signal.SIGINT)
    signals.check()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
  found = []

  def work():
    with signals.deferred():
      found.append(signal.getsignal(signal.SIGTERM))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [signal.SIG_DFL]


# A long call in compiled code, during which no handler of Python's runs.
BUSY = """
import hashlib, signal, sys
from calm import signals
signal.signal(signal.SIGINT, signal.default_int_handler)
with signals.deferred():
  print("ready", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process_at_once(number):
  with subprocess.Popen([sys.executable, "-c", BUSY], stdout=-1, stderr=-1, text=True) as child:
    try:
      assert child.stdout is not None and child.stdout.readline() == "ready\n"
      child.send_signal(number)
      with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
      child.send_signal(number)
      assert child.wait(20) == 128 + number
      assert child.stderr is not None and child.stderr.read() == "calm: stopped at once.\n"
    finally:
      child.kill()
