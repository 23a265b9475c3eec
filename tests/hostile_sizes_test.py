"""Files of five gigabytes, of which a disk holds none, pipes to which nobody writes, and
devices without an end. What comes back is an error that names the file, soon and in little
memory."""

import os
import resource
import signal

import pytest

from tests import hostile_documents as documents
from tests import hostile_runs as runs
from tests import hostile_test

HUGE = 5 * 2**30
# What an earlier run left unfinished is begun anew; a model may have no vocabulary beside it.
FAIR = {
  "unfinished outputs": ("huge", "pipe"),
  "our vocabulary": ("pipe", "endless"),
}


# What a user may well give through a pipe is waited for, as by any program.
PIPED = (*("references", "labels", "outputs of T5X", "outputs of a batch", "outputs of vLLM"),)
CASES = [
  (name, kind)
  for name in hostile_test.NAMES
  for kind in ("huge", "pipe", "endless")
  if kind != "pipe" or name not in PIPED
]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
  made = documents.documents(tmp_path_factory.mktemp("sizes"))
  return made | runs.documents(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def no_waiting():
  """Ends what hangs."""
  signal.signal(signal.SIGALRM, signal.default_int_handler)
  signal.alarm(60)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_has_no_end_is_refused_by_name(table, name, kind, no_waiting):
  path, read = table[name]
  good = path.read_bytes()
  tally = hostile_test.Tally()
  path.unlink()
  if kind == "pipe":
    os.mkfifo(path)
  elif kind == "endless":
    path.symlink_to("/dev/zero")
  else:
    path.touch()
    os.truncate(path, HUGE)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  try:
    tally.take(f"{name}: {kind}", read, kind in FAIR.get(name, ()))
  finally:
    path.unlink(missing_ok=True)  # what is begun anew is taken away
    path.write_bytes(good)
  expected = "accepted" if kind in FAIR.get(name, ()) else "named"
  assert dict(tally) == {expected: 1}, tally.wrong
  assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**30
