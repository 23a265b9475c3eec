"""The plain engine: skipped layers are filled at every token."""

import dataclasses
import functools

from calm import exits
from calm.decode import ordering
from calm.decode.engines.engine import Bound, Task, grown, shifted
from calm.t5 import attention as attention_lib
from calm.t5 import caches
from calm.t5 import decoder as decoder_lib


@dataclasses.dataclass(frozen=True)
class Eager:
  """Skipped layers are filled at every token. The plain engine, and the one for any rule."""

  def __call__(self, task: Task) -> Bound:
    rule = task.rule
    if isinstance(rule, exits.Verified):
      raise TypeError(
        "Expected a rule of one token a step, got `exits.Verified`; it runs none."
      )
    table = attention_lib.bias_table(task.weights, task.config, task.length)

    def take_step(current, position, active, cache):
      decoder = decoder_lib.DecoderStep(
        task.weights,
        task.config,
        task.encoded,
        table.at(position, task.starts),
        table.current,
        task.native,
      )
      hidden = task.embed(current)
      generated = task.generated(position)
      made = rule(decoder.layers(cache), hidden, active, task.threshold, generated)
      keeps = task.keeps(position)
      ends = ordering.after_each(position, made.rows, made.head)
      return made, caches.write_rows(cache, made.rows, ends, keeps)

    same = lambda caches, position: caches
    grow = functools.partial(grown, length=task.length)
    return Bound(task.empty_caches(), take_step, same, same, shifted, grow)
