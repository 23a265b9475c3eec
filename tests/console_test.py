"""The console: sanitized text, progress in terminals, notebooks and pipes."""

import contextlib
import io
import time

import pytest
from rich import console as rich_console

from calm import console as console_module
from calm.console import Progress, print_text, quiet, sanitize


def terminal(width=80):
  return rich_console.Console(
    file=io.StringIO(), width=width, force_terminal=True
  )


def pipe(width=80):
  return rich_console.Console(file=io.StringIO(), width=width)


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    (
      "\x1b[31mred\x1b]0;title\x07\r\x08\x9b2J",
      r"\x1b[31mred\x1b]0;title\x07\r\x08\x9b2J",
    ),
    ("a\u202eb\u2066c\u200bd\ufeff", r"a\u202eb\u2066c\u200bd\ufeff"),
    (
      "a\nb\tc é 漢 [/b] <script> می\u200cخواهم",
      "a\nb\tc é 漢 [/b] <script> می\u200cخواهم",
    ),
  ],
)
def test_control_characters_are_escaped(text, shown):
  assert sanitize(text) == shown


def test_printed_text_is_no_markup():
  console = terminal(20)
  print_text(console, "[bold]:smile:\x1b[2J", "bold")
  assert console.file.getvalue() == "\x1b[1m[bold]:smile:\\x1b[2J\x1b[0m\n"
  print_text(console, "a path of more than twenty letters", soft_wrap=True)
  assert console.file.getvalue().endswith(
    "m\na path of more than twenty letters\n"
  )


@pytest.fixture
def now(monkeypatch):
  """A clock that the test sets; bars come at once."""
  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  monkeypatch.setattr(console_module, "LEAST_SECONDS", 0.0)
  return now


def test_a_terminal_has_a_bar_with_the_remaining_time(now, capsys):
  console = terminal(60)
  with contextlib.suppress(RuntimeError), Progress(console) as report:
    report(0.1, "begun")
    now[0] = 40.0
    report(0.5, "[b] 5 of 10 prompts, \x1b[2J and a long text that has no room")
    print("to standard output")
    report.hide()
    console.print("a text")
    report(0.5, "5 of 10 prompts, still")
    raise RuntimeError
  before, _, after = console.file.getvalue().partition("a text\n")
  assert "0:00:50" in before and "5 of 10 prompts, still" in after
  # nothing of the bar stays
  assert before.endswith("\x1b[2K") and after.endswith("\x1b[2K")
  assert (
    "\x1b[2J" not in before
    and capsys.readouterr().out == "to standard output\n"
  )


def test_short_work_shows_nothing():
  for each in (terminal(), pipe()):
    with Progress(each) as report:
      report(0.5, "half of it")
    assert each.file.getvalue() == ""


def test_without_a_console_only_somebody_who_looks_on_sees_progress(
  now, monkeypatch, capsys
):
  with Progress() as report:
    report.step("a step")(0.5, "half")
  assert capsys.readouterr() == ("", "")
  console = terminal()
  outer = terminal()
  monkeypatch.setattr(rich_console, "Console", lambda **options: console)
  with quiet(), Progress() as report:
    report(0.0, "begun")
  with Progress(outer), Progress() as report:  # the outer one reports already
    report(0.0, "begun")
  assert console.file.getvalue() == ""
  with Progress() as report:
    report.count("prompts")(3, 12)
  assert "3 of 12 prompts" in console.file.getvalue()


def test_a_pipe_gets_a_line_now_and_then(now):
  console = pipe()
  with Progress(console) as report:
    for second in range(1, 41):
      now[0] = float(second)
      report(second / 40, f"prompt {second}")
  assert console.file.getvalue().split("\n") == [
    "  38 %, about 0:00:26 left, prompt 15",
    "  75 %, about 0:00:10 left, prompt 30",
    "",
  ]


def test_a_step_begins_with_its_first_report(now):
  console = pipe()
  with Progress(console) as progress:
    progress.step("read from a file")  # never reports
    for title, second in (("slow [/b]", 20.0), ("quick", 60.0)):
      report = progress.step(title)
      report(0.1, "begun")
      now[0] = second
      report(0.6, "half of it")
  assert console.file.getvalue().splitlines() == [
    "slow [/b] ...",
    "  60 %, about 0:00:16 left, half of it",
    "quick ...",
    "  60 %, about 0:00:32 left, half of it",
  ]
