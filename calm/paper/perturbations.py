"""Fig. 2a: one wrong token at each position, and its effect on the whole output."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from calm import exits
from calm.calibrate import Record
from calm.inference import grid
from calm.paper import bench, scores

SAMPLING, LAYER = "sampling", "layer"


@dataclasses.dataclass(frozen=True)
class PerturbedRule(exits.StepRule):
  """Full depth but for one token: an `exits.StepRule` whose threshold is the token's index."""

  # Emits this layer's own prediction there (layer-based); None: the token of `rank`.
  layer: int | None = None
  rank: int = 10  # of the last layer's tokens, 1 = the most likely (sampling-based)

  def depth(self, num_layers: int) -> int:
    """Decoder layers in the program."""
    return num_layers

  def __call__(self, layers, hidden, active, threshold, generated) -> exits.TokenExit:
    """Runs one token of every active row. See `exits.StepRule`."""
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
    """Logits whose argmax is the token of that rank."""
    rank = min(self.rank, logits.shape[-1])
    token = jax.lax.top_k(logits, rank)[1][:, rank - 1]
    chosen = jax.nn.one_hot(token, logits.shape[-1], dtype=bool)
    return jnp.where(chosen, jnp.max(logits, axis=-1, keepdims=True) + 1.0, logits)


RULES = {SAMPLING: PerturbedRule(), LAYER: PerturbedRule(layer=1)}


@dataclasses.dataclass(frozen=True)
class Position:
  """One kind of perturbation at one position."""

  position: int  # index of the token, 0 for the first
  prompts: int  # outputs that have a token there; the others are left out
  changed: float  # share of those whose text changed, in [0, 1]
  similarity: float  # mean metric against the unperturbed text
  quality: float  # mean metric against the references
  full_quality: float  # the same of the unperturbed texts of these prompts
  similarity_error: float = float("nan")  # standard error of `similarity` over prompts


@dataclasses.dataclass(frozen=True)
class Perturbations:
  """Fig. 2a for one task: both kinds at each position."""

  metric: str
  num_prompts: int
  sampling: tuple[Position, ...]  # the last layer's 10th-ranked token
  layer: tuple[Position, ...]  # the first layer's prediction


def positions(full: Sequence[Record], most: int = 16) -> tuple[int, ...]:
  """Positions to perturb: evenly spaced, as far as a quarter of the outputs reach."""
  reach = int(np.percentile([len(record.tokens or ()) for record in full], 75))
  return tuple(sorted({int(p) for p in np.linspace(0, max(0, reach - 1), min(most, reach))}))


def perturbations(of: bench.Bench) -> Perturbations:
  """Perturbs every output of the validation prompts of Fig. 2 at `positions`, in both ways."""
  prompts = of.validation[: of.options.ablated]
  full = of.full[: len(prompts)]
  return of.result(
    Perturbations,
    "perturbations",
    lambda: _perturb(of, prompts, full, positions(full)),
    prompts=prompts,
    rules=repr(RULES),
    intervals=scores.LEVEL,
  )


def _perturb(of: bench.Bench, prompts, full, at: Sequence[int]) -> Perturbations:
  predictor, progress = of.whole, of.step("perturbed tokens")
  perturbed: dict[tuple[str, int], dict[int, Record]] = {
    (kind, position): {} for kind in RULES for position in at
  }
  lengths = np.array([len(record.tokens or ()) for record in full])
  batches = predictor.plan([prompt.input for prompt in prompts])
  for number, batch in enumerate(batches):
    encoded = predictor.encode(batch)
    for (kind, position), records in perturbed.items():
      reaches = np.zeros(len(batch.active), bool)
      reaches[: len(batch.rows)] = lengths[batch.rows] > position
      if not reaches.any():
        continue
      decoded = predictor.decode(encoded, reaches, float(position), RULES[kind])
      for i in np.flatnonzero(reaches):
        row = int(batch.rows[i])
        records[row] = grid.record(predictor, decoded, int(i), prompts[row].id)
    progress((number + 1) / len(batches), f"batch {number + 1} of {len(batches)}")
  metric = of.settings.metric
  sampling, layer = (
    tuple(_position(p, perturbed[kind, p], prompts, full, metric) for p in at) for kind in RULES
  )
  return Perturbations(metric, len(prompts), sampling, layer)


def _position(position: int, records: dict[int, Record], prompts, full, metric) -> Position:
  rows = sorted(records)
  after, before = [records[row] for row in rows], [full[row] for row in rows]
  references = [prompts[row].targets for row in rows]
  texts = [(record.prediction,) for record in before]
  similarity = scores.similarities(after, texts, metric)
  changed = [a.prediction != b.prediction for a, b in zip(after, before, strict=True)]
  return Position(
    position=position,
    prompts=len(rows),
    changed=float(np.mean(changed)),
    similarity=float(similarity.mean()),
    quality=float(scores.similarities(after, references, metric).mean()),
    full_quality=float(scores.similarities(before, references, metric).mean()),
    similarity_error=scores.standard_error(similarity),
  )
