"""A signal ends the process at once, whatever it does, and says what is
kept.
"""

import signal
import subprocess
import sys
import threading

import pytest

from calm import signals

# A long call in compiled code, during which no handler of Python's runs, and
# what swallows exceptions.
BUSY = """
import hashlib, signal, weakref
from calm import signals
signal.signal(signal.SIGINT, signal.default_int_handler)
class Thing: pass
thing = Thing()
work = lambda _: hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
reference = weakref.ref(thing, work)
with signals.ending("outer"), signals.ending("stopped; all is kept"):
  print("ready", flush=True)
  del thing
"""


@pytest.mark.parametrize("number", signals.HANDLED)
def test_a_signal_ends_the_process_even_in_a_compiled_call(number):
  with subprocess.Popen(
    [sys.executable, "-c", BUSY], stdout=-1, stderr=-1, text=True
  ) as child:
    try:
      assert child.stdout is not None and child.stdout.readline() == "ready\n"
      child.send_signal(number)
      assert child.wait(20) == 128 + number
      assert child.stderr is not None
      assert child.stderr.read() == "calm: stopped; all is kept.\n"
    finally:
      child.kill()


def test_other_signals_other_threads_and_what_was_there_are_left_alone(
  monkeypatch,
):
  ended = []
  before = signal.getsignal(signal.SIGTERM)
  monkeypatch.setattr(signals, "end", lambda *given: ended.append(given))
  monkeypatch.setattr(signals, "HANDLED", (signal.SIGINT, signal.SIGUSR1))
  signal.signal(signal.SIGUSR1, signal.SIG_IGN)
  with signals.ending("kept"):
    signal.raise_signal(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    thread = threading.Thread(
      target=lambda: ended.append(signals.ending("x").__enter__())
    )
    thread.start()
    thread.join()
  assert ended == [None] and signal.getsignal(signal.SIGTERM) is before
  assert signal.set_wakeup_fd(-1) == -1


def test_a_function_may_handle_signals_in_their_place(monkeypatch):
  """As `calm serve` finishes what it runs at the first."""
  ended = []
  handled = []
  monkeypatch.setattr(signals, "end", lambda *given: ended.append(given))
  with signals.ending("kept"):
    with signals.handling(lambda number, frame: handled.append(number)):
      signal.raise_signal(signal.SIGTERM)
    assert handled == [signal.SIGTERM] and not ended
    signal.raise_signal(signal.SIGTERM)
  assert ended == [(signal.SIGTERM, "kept")]
