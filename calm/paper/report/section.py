"""What a page is made of."""

import dataclasses

from calm.paper.experiments import examples
from calm.paper.report.figures import Figure
from calm.paper.report.tables import Table


@dataclasses.dataclass(frozen=True)
class Panel:
  """The coloured outputs of one task under every measure.

  Attributes:
    task: its name.
    title: of the task.
    metric: of D and R.
    measures: one entry a measure.
  """

  task: str
  title: str
  metric: str
  measures: tuple[examples.Examples, ...]


@dataclasses.dataclass(frozen=True)
class Section:
  """One part of the page.

  Attributes:
    name: anchor.
    title: heading.
    text: paragraphs.
    figures: side by side where there is room.
    tables: below the figures.
    panels: coloured outputs.
  """

  name: str
  title: str
  text: tuple[str, ...] = ()
  figures: tuple[Figure, ...] = ()
  tables: tuple[Table, ...] = ()
  panels: tuple[Panel, ...] = ()
