"""`calm fit`: mistakes are one message, and the command that it ends with works."""

import io
import json

from rich import console as rich_console

from calm.commands import fit
from tests.commands import toy


def test_mistakes_are_one_message(tmp_path, capsys):
  rows = tmp_path / "rows.jsonl"
  rows.write_text(
    "".join(json.dumps({"input": f"t {i}", "target": "x"}) + "\n" for i in range(9))
  )
  base = ["fit", "--model=nowhere", f"--train={rows}", f"--output={tmp_path / 'out'}"]
  assert "at least 118 rows" in toy.failure(capsys, base)
  assert "`stages`" in toy.failure(capsys, [*base, "--stages=three"])
  assert "`budget`" in toy.failure(capsys, [*base, "--budget=soon"])
  assert "missing.jsonl" in toy.failure(capsys, [*base, "--train=missing.jsonl"])
  assert not (tmp_path / "out").exists()


def test_a_model_folder_without_a_promise_asks_for_one(tmp_path, capsys):
  model = toy.save_model(tmp_path / "model")
  arguments = ["infer", f"--model={model}", "--prompts=-"]
  assert "calm fit" in toy.failure(capsys, arguments)


def test_the_time_left_counts_neither_compiling_nor_an_earlier_run(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(fit.time, "monotonic", lambda: now[0])
  written = io.StringIO()
  with fit._listener(rich_console.Console(file=written, width=80)) as listener:
    progress = listener.step("[1/2] Train stage one")
    for at, share, text in ((90, 0.0, "compiling"), (110, 0.5, "step 5"), (130, 0.6, "step 6")):
      now[0] = float(at)
      progress(share, text)
  lines = [line.strip() for line in written.getvalue().splitlines() if "%" in line]
  assert lines == [
    "0 %, compiling",
    "50 %, step 5",
    "60 %, step 6, about 1:20 left",
  ]


def test_the_time_left_is_seen_on_sixty_columns(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(fit.time, "monotonic", lambda: now[0])
  written = io.StringIO()
  console = rich_console.Console(file=written, width=60, force_terminal=True)
  with fit._listener(console) as listener:
    progress = listener.step("[4/6] Choose measure, layers and grid")
    for share in (0.2, 0.4):
      now[0] += 30.0
      progress(share, "classifier after layer 1, decaying with tau 4, threshold 0.8257")
  assert "about 1:30 left, " in written.getvalue()
