"""What a fit tells the outside world, and how it looks on a screen."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from rich import console as rich_console

from calm.calibrate import looking, screen
from calm.calibrate.generations.shown import visible


@dataclasses.dataclass(frozen=True)
class Listener:
  """What a fit tells the outside world; by itself it is silent.

  Attributes:
    say: a sentence worth keeping.
    step: (title) -> progress, which is told the share done and what is being done.
  """

  say: Callable[[str], None] = lambda text: None
  step: Callable[[str], looking.Report] = lambda title: lambda share, text: None


@contextlib.contextmanager
def on_screen(console: rich_console.Console) -> Iterator[Listener]:
  """A listener that prints sentences, and the step at work with the time that it still takes.

  That is a bar in a terminal, a line that changes in a notebook, else a line now and then.
  """
  view, started = looking.view(console), False
  drawn = not isinstance(view, looking.Lines)  # for those a step's title is enough
  show = lambda text: screen.say(console, text, soft_wrap=True)

  def step(title: str) -> looking.Report:
    nonlocal started
    # The line above has the title; on it there is room for the time that is left.
    number, left = visible(title.partition(" ")[0]), looking.Left()
    show(f"{title} ...")
    if drawn:
      view.show(0.0, number)
    if not started:
      started = True
      view.start()

    def report(share: float, text: str) -> None:
      rest = left(share)
      view.show(share, f"{number} {rest}, {text}" if rest else f"{number} {text}")

    return report

  try:
    yield Listener(say=show, step=step)
    if isinstance(view, looking.Notebook):  # where the last line stays
      view.show(1.0, "done")
  finally:
    if started:
      view.stop()
