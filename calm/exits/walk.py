"""Rows on their way up the layers: who leaves where. Knows no network and no
control flow: `exits.DynamicExits` walks with nested conditionals,
`engines.Deferred` with a loop a layer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from calm.exits import confidence as confidence_lib
from calm.exits import layers as layers_lib
from calm.exits import propagation as propagation_lib


@struct.dataclass
class WalkState:
  """One token of every row; `done` rows are frozen at their exit state."""

  # the raw residual, of `done` rows at their exit, [batch, emb]
  hidden: jax.Array
  done: jax.Array  # rows that left or never took part, [batch] bool
  # decoder layers run, 0 until a row leaves, [batch] int32
  exit_layer: jax.Array
  confidence: jax.Array  # the measure at the exit layer, [batch]
  # the highest confidence refused so far, [batch]
  rejected_confidence: jax.Array
  # Of the full head at the exit layer, [batch, vocab]; None until one was
  # computed.
  logits: jax.Array | None
  memory: Any  # the propagation's own
  greedy: layers_lib.Greedy | None = None  # their argmax
  # What the head reads of the exit state, where it is carried to one head after
  # the chain.
  read: jax.Array | None = None


def start(hidden: jax.Array, active: jax.Array) -> WalkState:
  """Every row before layer 1; rows that are not active count as done."""
  zeros = jnp.zeros(active.shape, jnp.float32)
  return WalkState(
    hidden, ~active, zeros.astype(jnp.int32), zeros, zeros, None, None
  )


@dataclasses.dataclass(frozen=True)
class Walk:
  """What one token's layers decide."""

  layers: layers_lib.Layers  # the decoder at this position
  measure: confidence_lib.Measure
  propagation: propagation_lib.Propagation
  # layers after which a row may leave, the last excluded
  allowed: tuple[int, ...]
  threshold: jax.Array  # this token's, [] or [batch]

  @property
  def carries_read(self) -> bool:
    """Whether one head after the chain reads states that different layers
    translate.
    """
    return not self.measure.uses_head and bool(
      {*self.layers.translated} & {*self.allowed}
    )

  def layer_input(self, layer: int, state: WalkState) -> jax.Array:
    """What a layer that runs gets: d^{i-1}, and of rows that had left the
    propagated state.
    """
    hidden = state.hidden
    rows = state.done.shape[0]
    before_exits = layer <= min(self.allowed, default=self.layers.num_layers)
    # it had not left: the layer runs
    if before_exits or (isinstance(rows, int) and rows == 1):
      return hidden
    kept = self.propagation.state(hidden, state.memory)
    given = self.propagation.layer_input(layer, kept, self.layers)
    return (
      hidden
      if given is hidden
      else layers_lib.select_rows(state.done, given, hidden)
    )

  def stored(
    self, layer: int, state: WalkState, row: layers_lib.KeyValue
  ) -> layers_lib.KeyValue:
    """What a layer that runs stores: `row`, and the propagated one for rows
    that had left.
    """
    if layer == 1 or self.propagation.projects_state:  # `layer_input` saw to it
      return row
    skipped = self.propagation.skipped(
      layer, state.hidden, state.memory, self.layers
    )
    return layers_lib.select_rows(state.done, skipped, row)

  def after(
    self,
    layer: int,
    state: WalkState,
    hidden: jax.Array,
    row: layers_lib.KeyValue,
  ) -> WalkState:
    """The state after `layer`, which made `hidden` and stored `row`."""
    done = state.done
    previous = state.hidden
    hidden = jnp.where(done[:, None], previous, hidden)
    memory = self.propagation.remember(
      state.memory, layer, hidden, row, done, self.layers
    )
    state = dataclasses.replace(state, hidden=hidden, memory=memory)
    last = layer == self.layers.num_layers
    return (
      self._decide(layer, state, previous, last)
      if last or layer in self.allowed
      else state
    )

  def emitted(self, state: WalkState) -> tuple[jax.Array, layers_lib.Greedy]:
    """Logits at every row's exit, after the last layer that ran, and their
    argmax.
    """
    if state.logits is not None and state.greedy is not None:
      return state.logits, state.greedy
    layers = self.layers
    read = state.read
    read = (
      layers.read(layers.num_layers, state.hidden) if read is None else read
    )
    logits = layers.logits(read)
    return logits, layers.peaks(logits).greedy

  def _decide(
    self, layer: int, state: WalkState, previous: jax.Array, last: bool
  ) -> WalkState:
    here = ~state.done
    confidence, logits, greedy = self._measure(layer, state, previous, last)
    leaves = here if last else here & (confidence >= self.threshold)
    refused = here & ~leaves
    worse = jnp.maximum(state.rejected_confidence, confidence)
    read = self.layers.read(layer, state.hidden) if self.carries_read else None
    return dataclasses.replace(
      state,
      done=state.done | leaves,
      exit_layer=jnp.where(leaves, layer, state.exit_layer),
      confidence=jnp.where(leaves, confidence, state.confidence),
      rejected_confidence=jnp.where(refused, worse, state.rejected_confidence),
      logits=_chosen(leaves, logits, state.logits),
      greedy=_chosen(leaves, greedy, state.greedy),
      read=_chosen(leaves, read, state.read),
    )

  def _measure(
    self, layer: int, state: WalkState, previous: jax.Array, last: bool
  ):
    """Confidence of every row after `layer`; logits of the full head and their
    argmax, None where one head after the chain will do.
    """
    view = view_after(self.layers, layer, state.hidden, previous)
    if not last and self.measure.bound is not None:
      return self._verify(view, state, self.measure.bound(view))
    uses_head = self.measure.uses_head
    return (
      self._with_logits(view) if uses_head else (self.measure(view), None, None)
    )

  def _with_logits(self, view: confidence_lib.LayerView):
    """One product of the head for the measure and for the token."""
    logits = view.logits()
    peaks = self.layers.peaks(logits)
    view = dataclasses.replace(view, logits=lambda: logits, peaks=lambda: peaks)
    return self.measure(view), logits, peaks.greedy

  def _verify(self, view, state: WalkState, bound: jax.Array):
    """Asks the measure itself only where its cheap bound clears the
    threshold.
    """
    passes = ~state.done & (bound >= self.threshold)
    kept = state.logits, state.greedy
    if state.logits is None:
      shapes = jax.eval_shape(lambda: self._with_logits(view)[1:])
      kept = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def verify(kept):
      del kept
      confidence, *made = self._with_logits(view)
      return jnp.where(passes, confidence, bound), *made

    return lax.cond(jnp.any(passes), verify, lambda kept: (bound, *kept), kept)


def view_after(
  layers: layers_lib.Layers, layer: int, hidden: jax.Array, previous: jax.Array
) -> confidence_lib.LayerView:
  """What a measure may look at after `layer`, which made `hidden` of
  `previous`.
  """

  def read():
    return layers.read(layer, hidden)

  return confidence_lib.LayerView(
    layer,
    hidden,
    previous,
    logits=lambda: layers.logits(read()),
    peaks=lambda: layers.peaks(layers.logits(read())),
    exit_logit=lambda: layers.exit_logit(read()),
    shortlist_peaks=lambda: layers.peaks(layers.shortlist_logits(read())),
    probe_logit=lambda: layers.probe_logit(layer, read(), hidden, previous),
  )


def _chosen(leaves: jax.Array, here: Any, before: Any) -> Any:
  """`here` of the rows that leave now, `before` of the others; None before the
  first layer.
  """
  return (
    here
    if here is None or before is None
    else layers_lib.select_rows(leaves, here, before)
  )
