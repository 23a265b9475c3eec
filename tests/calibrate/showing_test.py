"""Counts with their rate and the time left, in a terminal and where there is none."""

import io

from rich import console as rich_console

from calm.console import clock, counted, rate, time


def test_counts_rates_and_time_left_without_a_terminal(monkeypatch, capsys):
  now = [100.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  with counted(rich_console.Console(), 50, "prompts", done=10) as counter:
    now[0] += 30
    counter.add(20, idle_seconds=10)  # compiling, which the rest need not do
    now[0] += 1
    counter.add(5)
  said = capsys.readouterr().out
  assert said == "30 of 50 prompts, 1.0 a second, 0:20 left\n"
  assert rate(3, 60) == "3.0 a minute" and clock(3725) == "1:02:05"


def test_what_is_printed_in_between_is_not_printed_into_the_bar():
  file = io.StringIO()
  console = rich_console.Console(file=file, width=80, force_terminal=True)
  with counted(console, 50, "prompts") as counter:
    counter.add(20)
    with counter.hidden():
      console.print("a text")
  told = file.getvalue()
  assert "20 of 50 prompts" in told
  before, _, after = told.partition("a text\n")
  assert before.endswith("\x1b[2K") and "50 prompts" in after and after.endswith("\x1b[2K")
