"""Whatever stops a command, it ends with one line that is true: signals, and a
full disk.
"""

import json
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip(
  "matplotlib", reason="matplotlib (the `report` extra) is not installed"
)

from calm import signals
from calm.commands import cli
from tests.commands import asked

pytestmark = pytest.mark.usefixtures("cache_in_tmp")
ROOT = pathlib.Path(__file__).resolve().parents[2]
# What `calm calibrate` works at; the others are in `asked.WORK`.
WORK = asked.WORK | {"calibrate": "calm.calibrate.losses.compute"}
# A server writes no output, and ends well by a signal: tests of `calm.serve`.
WRITING = [name for name in cli.COMMANDS if name != "serve"]
SIGNALS = signal.SIGTERM, signal.SIGINT
# What each says is kept.
NOTHING = (
  "files that were there are as they were, and the same command starts anew"
)
RESUMES = "what was finished is kept, and the same command goes on from there"
KEPT = {
  **dict.fromkeys(("demo", "calibrate", "merge"), NOTHING),
  **dict.fromkeys(("fit", "train", "generate", "report"), RESUMES),
  "infer": "what was written to --output=FILE is kept, and the same command"
  " goes on",
}


@pytest.mark.parametrize("command", WRITING)
def test_a_signal_ends_every_command_and_says_what_is_kept(
  command, asker, monkeypatch
):
  number = SIGNALS[WRITING.index(command) % 2]
  ended = []
  came = threading.Event()

  def signalled(*arguments, **options):
    signal.raise_signal(number)
    assert came.wait(10)
    raise asked.AtWork

  monkeypatch.setattr(WORK[command], signalled)
  monkeypatch.setattr(
    signals, "end", lambda *given: (ended.append(given), came.set())
  )
  # A shell starts what it puts into the background with SIGINT ignored.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    asker.ask(asker.words(command, "--none"))
  finally:
    signal.signal(signal.SIGINT, before)
  assert ended == [(number, f"stopped; {KEPT[command]}")]


AT_IMPORT = """
import signal, sys
class Signals:
  def find_spec(self, name, path=None, target=None):
    if [name] == sent:
      signal.raise_signal(int(sent.pop() and number))
signal.signal(signal.SIGINT, signal.default_int_handler)
sent, number = [sys.argv.pop(1)], sys.argv.pop(1)
sys.meta_path.insert(0, Signals())
from calm.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(
  ("module", "number"),
  [
    ("calm.commands.cli", SIGNALS[0]),
    ("numpy", SIGNALS[1]),
    ("jax", SIGNALS[0]),
  ],
)
def test_a_signal_during_imports_ends_the_process_with_one_line(
  module, number, tmp_path
):
  (tmp_path / "prompts.txt").write_text("a text\n")
  words = ["infer", "--threshold=0.9", f"--prompts={tmp_path / 'prompts.txt'}"]
  done = subprocess.run(
    [sys.executable, "-c", AT_IMPORT, module, str(int(number)), *words],
    capture_output=True,
    text=True,
    check=False,
  )
  lines = [
    line
    for line in done.stderr.splitlines()
    if not line.startswith(str(tmp_path))
  ]
  assert done.returncode == 128 + number and len(lines) == 1, done.stderr
  assert lines[0].startswith("calm: stopped")


def test_a_process_that_decodes_ends_by_a_signal_and_goes_on(
  asker, tmp_path, capsys
):
  folder = tmp_path / "run"
  words = [
    "generate",
    f"--model={asker.model}",
    f"--prompts={asker.rows}",
    "--batch_size=2",
  ]
  words += ["--limit=40", "--thresholds=0.9", f"--output={folder}"]
  called = [sys.executable, "-m", "calm", *words]
  with subprocess.Popen(
    called, cwd=ROOT, stdout=-1, stderr=-1, text=True
  ) as child:
    while child.poll() is None and not list(folder.glob("threshold_never*")):
      time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    told = child.communicate(timeout=60)[1]
  assert (
    child.returncode == 143
    and told.count("calm: ") == 1
    and KEPT["generate"] in told
  ), told
  kept = {path.name: path.read_bytes() for path in folder.glob("threshold*")}
  assert cli.main(words) == 0 and not (folder / ".lock").exists()
  for name, lines in kept.items():
    assert (
      (folder / name).read_bytes().startswith(lines[: lines.rfind(b"\n") + 1])
    )
  assert all(
    len(path.read_bytes().splitlines()) == 40
    for path in folder.glob("threshold*")
  )


# JAX says so where a compilation of half a second cannot be kept either, and
# goes on.
@pytest.mark.filterwarnings(
  "ignore:Error writing persistent compilation cache entry"
)
@pytest.mark.parametrize("command", WRITING)
def test_a_full_disk_ends_every_command_with_one_line(command, asker, tmp_path):
  words = asker.words(command, "--none")
  new = next(
    word.partition("=")[2] for word in words if word.startswith("--output")
  )
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # not one byte more
  try:
    status, told = asker.ask(words)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert status == 2, told
  lines = [line for line in told.splitlines() if line.startswith("calm: ")]
  assert (
    len(lines) == 1 and "Expected" in lines[0] and "Traceback" not in told
  ), told
  assert str(tmp_path) in lines[0], told
  left = [path for path in (tmp_path / new).rglob("*") if path.is_file()]
  assert not [path for path in left if path.suffix == ".tmp"]
  for path in left:
    if path.suffix == ".json":
      json.loads(path.read_text())
