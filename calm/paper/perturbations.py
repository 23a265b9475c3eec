"""Fig. 2a: one wrong token at each position, and its effect on the whole output."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from calm import exits
from calm.calibrate import Record
from calm.inference import grid
from calm.paper import bench, scores


@dataclasses.dataclass(frozen=True)
class PerturbedRule(exits.StepRule):
  """Full depth but for one token: an `exits.StepRule` whose threshold is the token's index."""

  # Emits this layer's own prediction there (layer-based); None: the token of `rank`.
  layer: int | None = None
  rank: int = 10  # of the last layer's tokens, 1 = the most likely (sampling-based)

  def depth(self, num_layers: int) -> int:
    return num_layers

  def __call__(self, layers, hidden, active, threshold, generated) -> exits.TokenExit:
    rows, other = [], None
    for layer in range(1, layers.num_layers + 1):
      hidden, row = layers.run(layer, hidden)
      rows.append(row)
      if layer == self.layer:
        other = layers.logits(layers.read(layer, hidden))
    logits = layers.logits(layers.read(layers.num_layers, hidden))
    other = self._ranked(logits) if other is None else other
    here = jnp.asarray(generated, jnp.float32) == jnp.asarray(threshold, jnp.float32)
    here = jnp.broadcast_to(here, active.shape)
    zeros = jnp.zeros(active.shape, jnp.float32)
    return exits.TokenExit(
      jnp.where(here[:, None], other, logits),
      jnp.where(active, layers.num_layers, 0).astype(jnp.int32),
      zeros,
      zeros,
      tuple(rows),
    )

  def _ranked(self, logits: jax.Array) -> jax.Array:
    rank = min(self.rank, logits.shape[-1])
    token = jax.lax.top_k(logits, rank)[1][:, rank - 1]
    chosen = jax.nn.one_hot(token, logits.shape[-1], dtype=bool)
    return jnp.where(chosen, jnp.max(logits, axis=-1, keepdims=True) + 1.0, logits)


# Curve -> rule.
RULES = {"layer-based": PerturbedRule(layer=1), "sampling-based": PerturbedRule()}
UNPERTURBED = "unperturbed"


def positions(full: Sequence[Record], most: int = 16) -> tuple[int, ...]:
  """Positions to perturb: evenly spaced, as far as a quarter of the outputs reach."""
  reach = int(np.percentile([len(record.tokens or ()) for record in full], 75))
  return tuple(sorted({int(p) for p in np.linspace(0, max(0, reach - 1), min(most, reach))}))


def perturbations(of: bench.Bench) -> scores.Curves:
  """Perturbs every output of the validation prompts of Fig. 2 at `positions`, in both ways.

  The curves of `RULES` and of the unperturbed texts have a point a position, their threshold,
  over the prompts whose output has a token there.
  """
  prompts = of.validation[: of.options.ablated]
  make = lambda: _perturb(of, prompts, of.full[: len(prompts)])
  key = {"rules": repr(RULES), "intervals": scores.LEVEL}
  return of.result(scores.Curves, "wrong_tokens", make, prompts=prompts, **key)


def _perturb(of: bench.Bench, prompts, full: Sequence[Record]) -> scores.Curves:
  predictor, progress, at = of.whole, of.step("perturbed tokens"), positions(full)
  lengths = np.array([len(record.tokens or ()) for record in full])
  records: dict[tuple[str, int], dict[int, Record]] = {
    (kind, position): {} for kind in (UNPERTURBED, *RULES) for position in at
  }
  batches = predictor.plan([prompt.input for prompt in prompts])
  for number, batch in enumerate(batches):
    encoded = predictor.encode(batch)
    for kind, position in itertools.product(RULES, at):
      active = np.zeros(len(batch.active), bool)
      active[: len(batch.rows)] = lengths[batch.rows] > position
      if not active.any():
        continue
      decoded = predictor.decode(encoded, active, float(position), RULES[kind])
      for i in np.flatnonzero(active):
        row = int(batch.rows[i])
        made = grid.record(predictor, decoded, int(i), prompts[row].id)
        records[kind, position][row] = made
        records[UNPERTURBED, position][row] = full[row]
    progress((number + 1) / len(batches), f"batch {number + 1} of {len(batches)}")
  points = []
  for (kind, position), made in records.items():
    rows = sorted(made)
    points.append(
      scores.point(
        kind,
        [made[row] for row in rows],
        [full[row] for row in rows],
        [prompts[row] for row in rows],
        of.settings.metric,
        float(position),
      )
    )
  return scores.Curves(len(prompts), tuple(points))
