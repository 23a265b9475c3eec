"""The console: sanitized text, tables, progress in terminals, notebooks and pipes."""

import io
import threading
import time

import pytest
from rich import console as rich_console

from calm import console as console_module
from calm.console import Progress, print_table, print_text, quiet, sanitize

HEADS = ("threshold", "mean loss", "upper bound", "p-value", "certified", "layers / token")
ROWS = (
  ("0.95", "0.0005", "0.0130", "2.1e-11", "yes", "7.33"),
  ("0.9", "0.0190", "0.0421", "1.3e-05", "no", "4.33"),
)


def terminal(width=80):
  return rich_console.Console(file=io.StringIO(), width=width, force_terminal=True)


def pipe(width=80):
  return rich_console.Console(file=io.StringIO(), width=width)


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    ("\x1b[31mred\x1b]0;title\x07\r\x08\x9b2J", r"\x1b[31mred\x1b]0;title\x07\r\x08\x9b2J"),
    ("a\u202eb\u2066c\u200bd\ufeff", r"a\u202eb\u2066c\u200bd\ufeff"),
    ("a\nb\tc é 漢 [/b] <script> می\u200cخواهم", "a\nb\tc é 漢 [/b] <script> می\u200cخواهم"),
  ],
)
def test_control_characters_are_escaped(text, shown):
  assert sanitize(text) == shown


def test_printed_text_is_no_markup():
  console = terminal(20)
  print_text(console, "[bold]:smile:\x1b[2J", "bold")
  assert console.file.getvalue() == "\x1b[1m[bold]:smile:\\x1b[2J\x1b[0m\n"
  print_text(console, "a path of more than twenty letters", soft_wrap=True)
  assert console.file.getvalue().endswith("m\na path of more than twenty letters\n")


@pytest.mark.parametrize("width", [120, 80, 40, 20])
def test_a_table_fits_any_width(width):
  console = pipe(width)
  print_table(console, HEADS, ROWS, title="textual loss")
  text = console.file.getvalue()
  lines = text.splitlines()
  assert max(map(len, lines)) <= width and "…" not in text
  assert all(cell in text for row in ROWS for cell in row)
  if width >= 80:  # a row is a line
    assert any(all(cell in line for cell in ROWS[0]) for line in lines)
  else:
    assert any(line.startswith("0.95: mean loss") for line in lines)


def test_a_table_has_a_bold_row_and_sanitized_cells():
  console = terminal()
  print_table(console, ("a", "b"), (("[/b]", ":smile:"), ("\x1b[2J", "x")), bold=0)
  text = console.file.getvalue()
  assert "[/b]" in text and ":smile:" in text and r"\x1b[2J" in text
  assert text.count("\x1b[1m") >= 2


@pytest.fixture
def now(monkeypatch):
  """A clock that the test sets."""
  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  return now


@pytest.fixture
def at_once(monkeypatch):
  monkeypatch.setattr(console_module, "LEAST_SECONDS", 0.0)


def begin(report, share=0.0):
  """The first report, and the moment at which the display starts."""
  report(share, "begun")
  for thread in threading.enumerate():
    if isinstance(thread, threading.Timer):
      thread.join(10.0)


def test_a_terminal_has_a_bar_with_the_remaining_time(now, at_once, capsys):
  console = terminal(60)
  with Progress(console) as report:
    begin(report, 0.1)
    now[0] = 40.0
    report(0.5, "[b] 5 of 10 prompts, \x1b[2J and a long text that has no room")
    print("to standard output")
    with report.hidden():
      console.print("a text")
  before, _, after = console.file.getvalue().partition("a text\n")
  assert "about 0:50 left" in before and "[b] 5 of 10 prompts" in after
  assert before.endswith("\x1b[2K") and after.endswith("\x1b[2K")  # nothing of the bar stays
  assert "\x1b[2J" not in before and capsys.readouterr().out == "to standard output\n"


def test_short_work_shows_nothing():
  for each in (terminal(), pipe()):
    with Progress(each) as report:
      report(0.5, "half of it")
    assert each.file.getvalue() == ""


def test_without_a_console_only_somebody_who_looks_on_sees_progress(
  at_once, monkeypatch, capsys
):
  with Progress() as report:
    begin(report)
    report.step("a step")(0.5, "half")
  assert capsys.readouterr() == ("", "")
  console, outer = terminal(), terminal()
  monkeypatch.setattr(rich_console, "Console", lambda **options: console)
  with quiet(), Progress() as report:
    begin(report)
  with Progress(outer), Progress() as report:  # the outer one reports already
    begin(report)
  assert console.file.getvalue() == ""
  with Progress() as report:
    report.count("prompts")(3, 12)
    begin(lambda share, text: None)
  assert "3 of 12 prompts" in console.file.getvalue()


def test_a_failure_leaves_no_bar(at_once):
  console = terminal()
  with pytest.raises(RuntimeError), Progress(console) as report:
    begin(report)
    raise RuntimeError
  assert console.file.getvalue().endswith("\x1b[2K")
  assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer)]


def test_a_pipe_gets_a_line_now_and_then(now):
  console = pipe()
  with Progress(console) as report:
    report.restart("the beginning")
    for second in range(1, 41):
      now[0] = float(second)
      report(second / 40, f"prompt {second}")
  assert console.file.getvalue().split("\n") == [
    "  38 %, about 0:25 left, prompt 15",
    "  75 %, about 0:10 left, prompt 30",
    "",
  ]


def test_steps_of_an_earlier_run_take_no_time(now):
  console = pipe()
  with Progress(console) as progress:
    progress.expect(6)
    progress.step("read from a file")  # never reports
    slow = progress.step("slow [/b]")
    slow(0.1, "begun")
    now[0] = 27.0
    slow(1.0, "all of it")
    progress.step("read from a file")
    now[0] = 54.0
    progress.step("quick")(0.9, "x")
  assert console.file.getvalue().splitlines() == [
    "[2/6] slow [/b]",
    "  20 %, about 2:00 left, [2/6] slow [/b]: all of it",  # 30 s a step, four are left
    "[4/6] quick",
    "  48 %, about 1:02 left, [4/6] quick: x",  # two steps and a tenth are left
  ]
