"""Speculative decoding from a model's own exits: the first layers draft, the rest verify.

Layers 1 ... k are exact functions of the tokens before, so that their drafts need no second
model. One pass of layers k + 1 ... L and the head over all drafted positions says what the full
model emits at each, and writes their caches (Leviathan et al., 2023; Elhoushi et al., 2024).
"""

import dataclasses
import decimal
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from calm import arguments
from calm.exits import layers
from calm.exits.rules import StepRule

DraftHead = Literal["shortlist", "full"]
# A pass may have as many positions: the limit bounds the memory of a pass.
MOST_DRAFTS = 31


@struct.dataclass
class Draft:
  """A draft at some positions: layer k's most likely token [...] int32, and its probability
  under the draft head, [...] in (0, 1]."""

  token: jax.Array
  confidence: jax.Array


@struct.dataclass
class VerifierOutput:
  """What the full model says of some positions, each of which may have a draft.

  Attributes:
    token: the argmax, [...] int32.
    log_probability: of the argmax, nats.
    gap: log p_full of the draft less that of the argmax, at most 0 but for rounding.
  """

  token: jax.Array
  log_probability: jax.Array
  gap: jax.Array


@struct.dataclass
class Verdict:
  """What is emitted at some positions.

  Attributes:
    token: the draft where it is accepted, else the full model's argmax.
    accepted: whether the draft is what is emitted.
    gap: `VerifierOutput.gap`.
    rejected_confidence: exp of it where a draft was refused, 0 elsewhere.
  """

  token: jax.Array
  accepted: jax.Array
  gap: jax.Array
  rejected_confidence: jax.Array


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Speculative:
  """Draft with layers 1 ... k, verify with the rest: the full model's own text.

  A draft d is accepted if it is the full model's argmax, or, where some slack lambda is given,
  if p_full(d) >= (1 - lambda) max p_full. The traced threshold of a program is 1 - lambda: 1
  and above (`NEVER_EXIT` too) is exact decoding, and a descending grid of thresholds is an
  ascending grid of slacks that begins with a loss of 0.

  The text depends on neither `num_drafts`, `stop_below`, `adapts` nor `measures`.

  Attributes:
    draft_layer: k, in 1 ... L - 1.
    num_drafts: most tokens that are drafted before a pass verifies them, 1 ... 31.
    draft_head: 'shortlist' drafts from the model's short list of likely tokens, 'full' from
      the whole vocabulary.
    stop_below: drafting ends at a draft less probable than this under the draft head, [0, 1].
    adapts: whether fewer tokens are drafted, or none, where drafts are unlikely to be accepted.
    measures: whether every token is drafted, even where no pass can use it, so that the
      refused confidences of a text tell at which slack it would be another. With slack it is.
  """

  draft_layer: int
  num_drafts: int = 7
  draft_head: DraftHead = "shortlist"
  stop_below: float = 0.15
  adapts: bool = True
  measures: bool = False

  def __post_init__(self):
    if not 1 <= self.num_drafts <= MOST_DRAFTS:
      raise ValueError(
        f"Expected `num_drafts` in 1 ... {MOST_DRAFTS}, got {self.num_drafts}; for none, decode"
        " with `exits.StaticExit()`."
      )
    if not 0 <= self.stop_below <= 1:
      raise ValueError(f"Expected `stop_below` in [0, 1], got {self.stop_below}.")

  def depth(self, num_layers: int) -> int:
    """Decoder layers that keep a cache: all of them.

    Raises:
      ValueError: the draft layer is not below the last.
    """
    if not 1 <= self.draft_layer < num_layers:
      raise ValueError(
        f"Expected `draft_layer` in 1 ... {num_layers - 1}, below the last of {num_layers}"
        f" decoder layers, got {self.draft_layer}."
      )
    return num_layers

  @property
  def window(self) -> int:
    """Most positions of a pass: the drafts, and the token that needs none."""
    return self.num_drafts + 1

  @property
  def speculates(self) -> bool:
    """See `rules.StepRule`."""
    return True

  @property
  def reads_threshold(self) -> bool:
    """See `rules.StepRule`."""
    return True

  @property
  def description(self) -> str:
    """The rule in a few words."""
    return f"full depth, drafts by layer {self.draft_layer}"


# How a program goes through the layers: a token at a time, or in passes over drafts.
Rule = StepRule | Speculative


@arguments.checked()
def threshold_of(slack: float) -> float:
  """The threshold 1 - lambda that stands for a slack.

  Raises:
    ValueError: the slack is not in [0, 1).
  """
  if not 0 <= slack < 1:
    raise ValueError(
      f"Expected `slack` in [0, 1), got {slack}; 0 is exact, and 1 would accept every draft."
    )
  # In decimals: 1 - 0.7 is else 0.30000000000000004, in tables and in names of files.
  return float(1 - decimal.Decimal(str(slack)))


def draft(logits: Float[Array, "*rows tokens"], ids: Int[Array, " tokens"] | None) -> Draft:
  """The most likely token (the first of equals) of a draft head.

  Args:
    logits: of the draft head.
    ids: token ids of its columns; None: they are the columns' numbers.
  """
  best = layers.greedy(logits)
  token = best.token if ids is None else ids[best.token]
  return Draft(token, jnp.exp(best.log_probability))


def verdict(
  output: VerifierOutput,
  drafted: Int[Array, "*rows"],
  has_draft: jax.Array,
  threshold: jax.Array,
) -> Verdict:
  """What is emitted where the full model says this.

  Args:
    output: of the full head at the last layer.
    drafted: the drafts.
    has_draft: where there is one, bool.
    threshold: 1 - lambda; at 1 and above only the argmax is accepted.
  """
  ratio = jnp.exp(output.gap)
  # Of two equal logits the argmax is the first: only with slack may the second be emitted.
  close = (ratio >= threshold) & (threshold < 1.0)
  accepted = has_draft & ((drafted == output.token) | close)
  return Verdict(
    token=jnp.where(accepted, drafted, output.token),
    accepted=accepted,
    gap=output.gap,
    rejected_confidence=jnp.where(has_draft & ~accepted, ratio, 0.0),
  )
