"""Ours, as `benchmark.py` times it: full depth, static k, forced and real
exits, engines.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import benchmark_models as models
import jax
import jax.numpy as jnp
import numpy as np

from calm import exits
from calm.decode import engines, sharded
from calm.decode import program as program_lib
from calm.exits import confidence
from calm.t5 import caches

# Ways of running the loop; a rule's own default is what `inference` takes.
ENGINES: dict[str, engines.Engine | None] = {
  "default": None,
  "eager": engines.Eager,
  "deferred": engines.Deferred,  # every layer that a row needs, for all rows
  "fitted": type("Fitted", (engines.Compacted,), {"ratio": 2}),
}


@dataclasses.dataclass(frozen=True)
class Decoded:
  """What one run made: one [batch, length] array a batch of prompts."""

  tokens: list[np.ndarray]
  exit_layers: list[np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class System:
  """One row of the table."""

  name: str
  decode: Callable[[], Decoded]  # every batch, and waits
  # the same; None: in the time of another row
  encode: Callable[[], object] | None = None
  # that every token runs, where it is known beforehand
  measured_layers: float | None = None
  # `decode` encodes too, and `encode` decodes one token: the difference is the
  # decoder's time.
  by_difference: bool = False
  exact: list[np.ndarray] | None = None  # exits that must come out
  peer: bool = False  # somebody else's


@dataclasses.dataclass(frozen=True, eq=False)
class Ours:
  """Makes the systems of one model in one setting, over so many devices."""

  model: models.Model
  setting: models.Setting
  num_devices: int = 1
  native: bool = True

  @functools.cached_property
  def tokens(self) -> list[jax.Array]:
    """The prompts, a batch an array."""
    return [
      jnp.asarray(batch) for batch in models.batches(self.model, self.setting)
    ]

  @functools.cached_property
  def weights(self) -> program_lib.ModelWeights:
    """The model's, on every device."""
    return sharded.replicate(self.model.weights, self.num_devices)

  @functools.cached_property
  def encoded(self) -> list[caches.Encoded]:
    """The prompts encoded once, for every rule."""
    return self.encode()

  def systems(
    self,
    depths: Sequence[int],
    measures: Sequence[str],
    thresholds: Sequence[float],
    ways: Sequence[str],
    exit_layers: tuple[int, ...] | None = None,
  ) -> list[System]:
    """Full depth, the static models, then the dynamic exits of every measure
    and engine.
    """
    num_layers = self.model.config.num_decoder_layers
    depths = [depth for depth in depths if depth < num_layers]
    made = [
      self.system("full depth", exits.StaticExit(), num_layers, encode=True)
    ]
    made += [self.system(f"static {k}", exits.StaticExit(k), k) for k in depths]
    forced: dict[str, tuple[int, ...]] = {f"forced {k}": (k,) for k in depths}
    forced["mixed"] = models.mixed_depths(num_layers, exit_layers=exit_layers)
    forced["never"] = (num_layers,)
    if self.setting.batch_size < engines.MANY_ROWS:  # these are for many
      ways = [name for name in ways if name not in ("deferred", "fitted")]
    for measure in measures:
      for engine in ways:
        for name, trace in forced.items():
          made.append(
            self.forced(
              f"{measure}, {name}", measure, trace, engine, exit_layers
            )
          )
        for threshold in thresholds:
          rule = exits.DynamicExits(
            confidence.measure(measure), allowed=exit_layers
          )
          name = f"{measure}, threshold {threshold:g}, {engine}"
          made.append(self.system(name, rule, None, threshold, engine))
    return made

  def forced(
    self,
    name: str,
    measure: str,
    depths: tuple[int, ...],
    engine: str,
    exit_layers: tuple[int, ...] | None = None,
  ) -> System:
    """Exits at known layers; the run checks that they came out."""
    rule = models.forced(measure, depths, self.model.config, exit_layers)
    rows = self.setting.batch_size
    length = self.setting.decode_length
    made = self.system(
      f"{name}, {engine}", rule, None, models.starts(rows), engine
    )
    if self.model.eos_id != models.NO_EOS:  # rows end where they end
      return made
    trace = models.Trace(depths, self.model.config.num_decoder_layers)
    expected = trace.depths_of(rows, length)
    return dataclasses.replace(made, exact=[expected] * len(self.tokens))

  def system(
    self,
    name: str,
    rule: exits.StepRule,
    measured_layers: float | None,
    threshold: float | np.ndarray = 0.0,
    engine: str = "default",
    encode: bool = False,
  ) -> System:
    """One rule under one engine."""
    program = self._program(rule, engine)
    limit = jnp.asarray(threshold, jnp.float32)
    active = jnp.ones(self.setting.batch_size, bool)

    def decode() -> Decoded:
      made = [
        program.decode(self.weights, encoded, active, limit)
        for encoded in self.encoded
      ]
      made = jax.device_get(made)
      return Decoded([m.tokens for m in made], [m.exit_layers for m in made])

    return System(
      name, decode, self.encode if encode else None, measured_layers
    )

  def _program(self, rule, engine="default"):
    model = self.model
    length = self.setting.decode_length
    made = program_lib.Program(
      model.config, rule, length, model.eos_id, ENGINES[engine], self.native
    )
    return (
      sharded.ShardedProgram(made, self.num_devices)
      if self.num_devices > 1
      else made
    )

  def encode(self) -> list[caches.Encoded]:
    """Encoder and cross-attention keys and values of every batch."""
    program = self._program(exits.StaticExit())
    encoded = [program.encode(self.weights, tokens) for tokens in self.tokens]
    return jax.block_until_ready(encoded)
