"""One token through the decoder layers: exit rule and per-row stop. Knows no
network. A row that has left keeps its exit state, whose keys and values the
layers above write (section 3.2).
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from calm import arguments
from calm.exits import confidence as confidence_lib
from calm.exits import layers as layers_lib
from calm.exits import propagation as propagation_lib
from calm.exits import schedules
from calm.exits import walk as walk_lib

DraftHead = Literal["shortlist", "full"]
# A pass may have as many positions: the limit bounds the memory of a pass.
MOST_DRAFTS = 31


@struct.dataclass
class TokenExit:
  """One token's outcome."""

  # float32, of the full head at the exit layer, [batch, vocab]
  logits: jax.Array
  exit_layer: jax.Array  # decoder layers run, 1-based, [batch] int32
  # the measure at the exit layer, [batch], 0 where nothing was measured
  confidence: jax.Array
  # the highest one measured and refused, [batch], 0 if none
  rejected_confidence: jax.Array
  # This position's keys and values, one a layer in use; () where the engine has
  # written them.
  rows: tuple[layers_lib.KeyValue, ...]
  # The argmax of the logits, where it is known.
  greedy: layers_lib.Greedy | None = None

  @property
  def head(self) -> jax.Array:
    """What the head made that is emitted from; the rest is not computed."""
    return self.logits if self.greedy is None else self.greedy.token

  @property
  def best(self) -> layers_lib.Greedy:
    """The argmax of the logits."""
    return (
      layers_lib.peaks(self.logits).greedy
      if self.greedy is None
      else self.greedy
    )


@runtime_checkable
class StepRule(Protocol):
  """How one token goes through the layers: `DynamicExits`, `StaticExit` or
  `OracleExit`.

  Attributes:
    speculates: whether it decodes in passes over drafts and not in steps
      (`Speculative`).
    reads_threshold: whether a token's way depends on the threshold.
  """

  speculates: ClassVar[bool] = False
  reads_threshold: ClassVar[bool] = False

  def depth(self, num_layers: int) -> int:
    """Decoder layers in the program, each with a cache."""
    return num_layers

  def __call__(
    self,
    layers: layers_lib.Layers,
    hidden: Float[Array, "batch emb"],
    active: jax.Array,
    threshold: jax.Array,
    generated: Int[Array, "..."],
  ) -> TokenExit:
    """Runs one token.

    Args:
      layers: the decoder at this position.
      hidden: embedded input token, d^0.
      active: rows that still generate, [batch] bool; others neither vote nor
        count.
      threshold: lambda, [] or [batch], traced; `NEVER_EXIT` runs every layer.
      generated: tokens that each row generated before this one, [] or [batch].
    """
    ...


@arguments.checked(
  measure=confidence_lib.measure,
  schedule=schedules.schedule,
  propagation=propagation_lib.propagation,
)
@dataclasses.dataclass(frozen=True)
class DynamicExits(StepRule):
  """Leave at the first allowed layer whose confidence reaches the threshold
  (Eq. 4).

  Attributes:
    measure: a `confidence.Measure`, or its name.
    schedule: threshold and token index -> this token's threshold; 'constant' by
      name.
    allowed: 1-based layers after which a token may leave, ascending; None
      allows every layer. The last layer always ends a token.
    propagation: what skipped layers store, or its name.
  """

  measure: confidence_lib.Measure
  schedule: schedules.Schedule = schedules.Constant()
  allowed: tuple[int, ...] | None = None
  propagation: propagation_lib.Propagation = propagation_lib.ExitState()
  reads_threshold: ClassVar[bool] = True  # see `StepRule`

  def __call__(self, layers, hidden, active, threshold, generated):
    walk = self.walk(layers, threshold, generated)
    state, rows = _walk_from(walk, 1, walk_lib.start(hidden, active))
    return token_exit(walk, state, active, rows)

  def walk(
    self, layers: layers_lib.Layers, threshold, generated
  ) -> walk_lib.Walk:
    """What this rule decides at one position, for an engine that runs the
    layers itself.
    """
    threshold = self.schedule(jnp.asarray(threshold, jnp.float32), generated)
    allowed = allowed_layers(self.allowed, layers.num_layers)
    return walk_lib.Walk(
      layers, self.measure, self.propagation, allowed, threshold
    )


def token_exit(
  walk: walk_lib.Walk,
  state: walk_lib.WalkState,
  active: jax.Array,
  rows: tuple[layers_lib.KeyValue, ...] = (),
) -> TokenExit:
  """The outcome of a walk that is over.

  Args:
    walk, state: what decided, and where every row is.
    active: rows that took part, [batch] bool; the others report nothing.
    rows: keys and values to be written, one a layer; none where the engine
      wrote them.
  """
  logits, greedy = walk.emitted(state)
  return TokenExit(
    logits,
    jnp.where(active, state.exit_layer, 0),
    jnp.where(active, state.confidence, 0.0),
    jnp.where(active, state.rejected_confidence, 0.0),
    rows,
    greedy,
  )


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class StaticExit(StepRule):
  """Every token runs layers 1 ... `layer`; no confidence is computed (None: all
  layers).

  The layers above are not in the program, so that this is a `layer`-layer
  model.
  """

  layer: int | None = None

  def depth(self, num_layers: int) -> int:
    depth = num_layers if self.layer is None else self.layer
    if not 1 <= depth <= num_layers:
      raise ValueError(f"Expected `layer` in 1 ... {num_layers}, got {depth}.")
    return depth

  def __call__(self, layers, hidden, active, threshold, generated):
    del threshold, generated
    depth = self.depth(layers.num_layers)
    rows = []
    for layer in range(1, depth + 1):
      hidden, row = layers.run(layer, hidden)
      rows.append(row)
    zeros = jnp.zeros(active.shape, jnp.float32)
    exit_layer = jnp.where(active, depth, 0).astype(jnp.int32)
    read = layers.read(depth, hidden)
    logits = layers.logits(read)
    greedy = layers.peaks(logits).greedy
    return TokenExit(logits, exit_layer, zeros, zeros, tuple(rows), greedy)


@arguments.checked(propagation=propagation_lib.propagation)
@dataclasses.dataclass(frozen=True)
class OracleExit(StepRule):
  """Leave at the first allowed layer whose argmax is the last layer's (section
  3.3.1). It runs every layer to know the answer, then stores the propagated
  states: an upper bound of what a measure could save. `allowed` and
  `propagation` are as of `DynamicExits`.
  """

  allowed: tuple[int, ...] | None = None
  propagation: propagation_lib.Propagation = propagation_lib.ExitState()

  def __call__(self, layers, hidden, active, threshold, generated):
    del threshold, generated
    allowed = allowed_layers(self.allowed, layers.num_layers)
    ran = []
    for layer in range(1, layers.num_layers + 1):
      hidden, row = layers.run(layer, hidden)
      ran.append(
        (layer, hidden, row, layers.logits(layers.read(layer, hidden)))
      )
    last, exit_hidden, _, exit_logits = ran[-1]
    answer = jnp.argmax(exit_logits, axis=-1)
    exit_layer = jnp.full(active.shape, last, jnp.int32)
    for layer, hidden, _, logits in reversed(
      [one for one in ran[:-1] if one[0] in allowed]
    ):
      agrees = jnp.argmax(logits, axis=-1) == answer
      exit_layer = jnp.where(agrees, layer, exit_layer)
      exit_logits = jnp.where(agrees[:, None], logits, exit_logits)
      exit_hidden = jnp.where(agrees[:, None], hidden, exit_hidden)
    memory = None
    rows = []
    for layer, hidden, row, _ in ran:  # above the exit the propagated row
      left = layer > exit_layer
      if layer > 1:
        skipped = self.propagation.skipped(layer, exit_hidden, memory, layers)
        row = layers_lib.select_rows(left, skipped, row)
      memory = self.propagation.remember(
        memory, layer, hidden, row, left, layers
      )
      rows.append(row)
    ones = active.astype(jnp.float32)
    exit_layer = jnp.where(active, exit_layer, 0)
    return TokenExit(
      exit_logits, exit_layer, ones, jnp.zeros_like(ones), tuple(rows)
    )


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Speculative:
  """Draft with layers 1 ... k, verify with the rest: the full model's own text.

  Layers 1 ... k are exact functions of the tokens before, so that their drafts
  need no second model (Leviathan et al., 2023; Elhoushi et al., 2024);
  `decode.speculative` runs it.

  A draft d is accepted if it is the full model's argmax, or, where some slack
  lambda is given, if p_full(d) >= (1 - lambda) max p_full. The traced threshold
  of a program is 1 - lambda: 1 and above (`NEVER_EXIT` too) is exact decoding,
  and a descending grid of thresholds is an ascending grid of slacks that begins
  with a loss of 0.

  Answers and summaries repeat words of their prompt. With k = 0 the drafts are
  the tokens that followed the last ones there, or in the text so far (Saxena,
  2023): they cost no layer, and a draft is accepted if it is the argmax,
  whatever the threshold.

  The text depends on neither `num_drafts`, `stop_below`, `adapts` nor
  `measures`.

  Attributes:
    draft_layer: k, in 1 ... L - 1; 0: drafts come from the prompt and the text.
    num_drafts: most tokens that are drafted before a pass verifies them, 1 ...
      31.
    draft_head: 'shortlist' drafts from the model's short list of likely tokens,
      'full' from the whole vocabulary.
    stop_below: drafting ends where the draft head finds it less probable than
      this that all drafts of the pass are accepted, [0, 1].
    adapts: whether that probability is corrected by how often the text's drafts
      were refused, a first draft has to be surer, and none is made for a while
      where drafts gained nothing.
    measures: whether every token is drafted, even where no pass can use it, so
      that the refused confidences of a text tell at which slack it would be
      another. With slack it is.
  """

  draft_layer: int
  num_drafts: int = 7
  draft_head: DraftHead = "shortlist"
  stop_below: float = 0.5
  adapts: bool = True
  measures: bool = False
  speculates: ClassVar[bool] = True  # see `StepRule`
  reads_threshold: ClassVar[bool] = True  # see `StepRule`

  def __post_init__(self):
    if not 1 <= self.num_drafts <= MOST_DRAFTS:
      raise ValueError(
        f"Expected `num_drafts` in 1 ... {MOST_DRAFTS}, got "
        f"{self.num_drafts}; for none, decode"
        " with `exits.StaticExit()`."
      )
    if not 0 <= self.stop_below <= 1:
      raise ValueError(
        f"Expected `stop_below` in [0, 1], got {self.stop_below}."
      )

  def depth(self, num_layers: int) -> int:
    """Decoder layers that keep a cache: all. ValueError: the draft layer is
    none below them.
    """
    if not 0 <= self.draft_layer < num_layers:
      raise ValueError(
        f"Expected `draft_layer` in 1 ... {num_layers - 1}, below the last "
        f"of {num_layers}"
        " decoder layers, or 0 for drafts from the prompt, got "
        f"{self.draft_layer}."
      )
    return num_layers

  @property
  def window(self) -> int:
    """Most positions of a pass: the drafts, and the token that needs none."""
    return self.num_drafts + 1


# How a program goes through the layers: a token at a time, or in passes over
# drafts.
Rule = StepRule | Speculative


@arguments.checked()
def allowed_layers(
  allowed: Sequence[int] | None, num_layers: int
) -> tuple[int, ...]:
  """The layers of 1 ... L after which a token may leave, the last excluded;
  None: all others.

  Raises:
    ValueError: they are not ascending, or not within 1 ... L.
  """
  if allowed is None:
    return tuple(range(1, num_layers))
  ascending = list(allowed) == sorted(set(allowed))
  if not ascending or any(not 1 <= layer <= num_layers for layer in allowed):
    raise ValueError(
      "Expected `allowed` exit layers to be ascending within 1 ... "
      f"{num_layers},"
      f" got {list(allowed)}."
    )
  return tuple(layer for layer in allowed if layer < num_layers)


def mapped_layers(
  rule: Any, num_layers: int, found: Collection[int]
) -> tuple[int, ...]:
  """Exit layers whose learned propagation a rule reads, ascending; () if it
  reads none.

  Args:
    rule, num_layers: how a token goes through the layers 1 ... L.
    found: exit layers for which a model has it.

  Raises:
    ValueError: the rule may leave at a layer for which the model has none.
  """
  if not isinstance(
    getattr(rule, "propagation", None), propagation_lib.Learned
  ):
    return ()
  asked = allowed_layers(rule.allowed, num_layers)
  if not set(asked) <= set(found):
    raise ValueError(
      "Expected a model with learned propagation from the exit layers "
      f"{list(asked)}, got one"
      f" with it from {sorted(found) or 'none'}; fit it (`calm fit`), allow "
      "other layers, or"
      " use the propagation 'exit_state'."
    )
  return asked


def _walk_from(
  walk: walk_lib.Walk, layer: int, state: walk_lib.WalkState
) -> tuple[walk_lib.WalkState, tuple[layers_lib.KeyValue, ...]]:
  """The nested conditionals of one token; the branches read caches and return
  rows.
  """
  hidden, row = walk.layers.run(layer, walk.layer_input(layer, state))
  row = walk.stored(layer, state, row)
  state = walk.after(layer, state, hidden, row)
  if layer == walk.layers.num_layers:
    return state, (row,)

  def skip(state):
    above = range(layer + 1, walk.layers.num_layers + 1)

    def skipped(k):
      return walk.propagation.skipped(
        k, state.hidden, state.memory, walk.layers
      )

    return state, tuple(map(skipped, above))

  def deeper(state):
    return _walk_from(walk, layer + 1, state)

  if layer not in walk.allowed:
    state, rows = deeper(state)
  else:
    state, rows = lax.cond(jnp.all(state.done), skip, deeper, state)
  return state, (row, *rows)
