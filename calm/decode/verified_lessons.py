"""What drafts teach a text: how often they are right, and when the next one is due. Knows no
network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from calm.decode import drafting, loop, ordering, verified_rows
from calm.decode.verified_state import VerifiedState


@dataclasses.dataclass(frozen=True)
class Lesson:
  """Drafts of a pass that met the full model's token.

  Attributes:
    tried: positions with such a draft, [batch, positions].
    accepted: those where it was right, or had room enough by the slack.
    confidences: of the drafts.
  """

  tried: Bool[Array, "batch positions"]
  accepted: Bool[Array, "batch positions"]
  confidences: Float[Array, "batch positions"]


def taught(
  state: VerifiedState,
  plan: drafting.Plan,
  lesson: Lesson,
  *,
  drafts: Bool[Array, ""],
  count: Int[Array, " batch"],
  besides: jax.Array | float,
) -> VerifiedState:
  """The state with what a pass taught, before its rows go on.

  Args:
    state: before.
    plan: what passes cost.
    lesson: of its drafts.
    drafts: whether it made any.
    count: tokens that it emitted, [batch].
    besides: what it took besides a step of the full model, in such steps.
  """
  odds = state.odds.add(lesson.tried, lesson.accepted, lesson.confidences)
  # One that was only looked at, and right, is as good.
  right = jnp.any(lesson.accepted & lesson.tried)
  looked = right & drafting.looks(state.odds, state.active)
  idle = jnp.where(jnp.any(count > 1) | looked, 0, state.idle + drafts.astype(jnp.int32))
  waits = plan.waits(idle, odds, state.active)
  return dataclasses.replace(
    state,
    odds=odds,
    idle=idle,
    waits=jnp.where(drafts, waits, state.waits - 1),
    cost=state.cost + besides,
    planned=plan(odds, state.active),
  )


def counted(
  seen: loop.Verification,
  state: VerifiedState,
  lesson: Lesson,
  made: Bool[Array, " positions"],
  count: Int[Array, " batch"],
) -> loop.Verification:
  """What is said of a text's drafts, with those of one more pass.

  Args:
    seen: before.
    state: that has learned of the pass, and whose rows have not gone on.
    lesson: of the pass.
    made: which of its positions have a draft.
    count: tokens that it emits, [batch].
  """
  number = jnp.where(np.arange(2) == 1, jnp.sum(made, dtype=jnp.int32), 0)
  # Not all at once, or a thread would be woken for half of it.
  drafts_of_rows = jnp.where(state.active[:, None], number[None], 0)
  counts = seen.counts + ordering.after(drafts_of_rows, state.odds.sums)
  right = lesson.accepted & lesson.tried
  before = jnp.asarray(seen.drafted)
  drafted = verified_rows.put(before, right, state.positions, count)
  return dataclasses.replace(seen, drafted=drafted, counts=counts)
