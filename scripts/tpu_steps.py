"""Memory of whole steps on TPU meshes, as the compiler lays it out: training,
and decoding.

Compiled for the TPU that is named, estimated by its compiler: nothing runs,
none is needed.

  pip install '.[tpu]'   (x86 Linux)
  python scripts/tpu_steps.py --steps=squad_small_train,large_train
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tpu_hlo
import tpu_report
from flax import core as flax_core
from flax.linen import partitioning
from jax import sharding
from jax.experimental import topologies

from calm import exits
from calm.decode import program as program_lib
from calm.exits import confidence, schedules
from calm.t5 import caches, network, platforms
from calm.t5x import loops
from calm.training import objectives, updates

OUTPUT = pathlib.Path(__file__).parent / "results" / "tpu_memory.json"
# T5X's `partitioning.standard_logical_axis_rules()`.
RULES = (
  *(("batch", "data"), ("vocab", "model"), ("embed", None), ("mlp", "model")),
  *(
    ("heads", "model"),
    ("kv", None),
    ("joined_kv", "model"),
    ("relpos_buckets", None),
  ),
  *(("length", None), ("stack", None), ("mlp_activations", None)),
)
STAGES: Mapping[str, tuple[objectives.Objective, Any]] = {
  "stage one": (objectives.LayerWeighted(), updates.adafactor),
  "stage two": (objectives.ExitClassifier(), updates.adam),
}


@dataclasses.dataclass(frozen=True)
class Step:
  """What is compiled."""

  # 'stage one', 'stage two' (of training), or 'decode' (a batch with early
  # exit)
  kind: str
  shape: str  # T5 1.1's, one of `tpu_report.SIZES`
  topology: str = "v3:2x2"  # of TPU cores
  # cores along the model axis; the others lie along the data axis
  model: int = 1
  batch: int = 128  # rows of the whole mesh
  inputs: int = 512  # tokens
  targets: int = 512
  layers: int = 0  # of either stack, 0: the shape's
  vocabulary: int = 32128  # pieces
  # Whether a decoder lies whole on every core between batches, as in T5X's
  # inference (`whole_decoder`); else its weights are gathered once a batch.
  whole: bool = False

  @property
  def config(self) -> network.T5Config:
    changes: dict[str, Any] = {
      "vocab_size": self.vocabulary,
      "one_hot_embedding": True,
    }
    if self.layers:
      changes |= {
        "num_encoder_layers": self.layers,
        "num_decoder_layers": self.layers,
      }
    if self.kind != "decode":
      changes["dropout_rate"] = 0.1
    return tpu_report.configuration(self.shape, "bfloat16", **changes)

  @functools.cached_property
  def mesh(self) -> sharding.Mesh:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=self.topology
    ).devices
    grid = np.asarray(devices).reshape(-1, self.model)
    return sharding.Mesh(grid, ("data", "model"))

  def along(self, tree: Any, specs: Any) -> Any:
    """Shapes, each with its own partition of the mesh, or all with one."""
    if isinstance(specs, sharding.PartitionSpec):
      specs = jax.tree.map(lambda _: specs, tree)

    def there(spec):
      return sharding.NamedSharding(self.mesh, spec)

    def shape(x, spec):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there(spec))

    return jax.tree.map(shape, tree, specs)

  def params(self) -> Any:
    """The parameters' shapes, each along the axes of the mesh that T5X's rules
    name.
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = functools.partial(
      network.Transformer(self.config).init, enable_dropout=False
    )
    made = jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens)
    if self.whole:
      made = loops.kept_whole(made)
    names = flax_core.unfreeze(partitioning.get_axis_names(made["params_axes"]))

    def to_mesh(_, spec):
      return partitioning.logical_to_mesh_axes(spec, RULES)

    return self.along(
      made["params"], jax.tree.map(to_mesh, made["params"], names)
    )

  def rows(self, dtype: Any, *dimensions: int) -> Any:
    """An array of the batch, its rows along the data axis."""
    shape = jax.ShapeDtypeStruct((self.batch, *dimensions), dtype)
    return self.along(shape, sharding.PartitionSpec("data"))

  def compiled(self) -> Any:
    """The step for the TPU."""
    rules = partitioning.axis_rules(RULES)
    layout = platforms.laid_out_for("tpu")
    with sharding.use_abstract_mesh(self.mesh.abstract_mesh), rules, layout:
      made = self._decode() if self.kind == "decode" else self._train()
    return made.compile()

  def _train(self) -> Any:
    objective, optimizer = STAGES[self.kind]
    module = network.Transformer(self.config)
    params = self.params()
    config = updates.TrainConfig(1, optimizer=optimizer)
    state = jax.eval_shape(
      lambda p: updates.init_state(p, config, objective), params
    )
    # An optimizer keeps sums of rows and columns, and of what it trains alone.
    state = self.along(state, sharding.PartitionSpec())
    state = dataclasses.replace(state, params=params)
    batch = {
      "encoder_input_tokens": self.rows(jnp.int32, self.inputs),
      "decoder_input_tokens": self.rows(jnp.int32, self.targets),
      "decoder_target_tokens": self.rows(jnp.int32, self.targets),
      "decoder_loss_weights": self.rows(jnp.float32, self.targets),
    }
    step: Any = updates.make_train_step(module, config, objective, params)
    return step.lower(state, batch)

  def _decode(self) -> Any:
    """What `calm.t5x.models` runs under `predict_batch_with_aux`, in its own
    loop.
    """
    rule = exits.DynamicExits(confidence.Classifier(), schedules.Constant())
    config = self.config
    length = self.targets
    axes = loops.row_axes(self.mesh, self.batch)

    def predict(params, tokens, prefix, threshold):
      weights = program_lib.model_weights(params, config).decoder
      if axes:
        place = sharding.NamedSharding(
          self.mesh.abstract_mesh, sharding.PartitionSpec()
        )
        weights = jax.lax.with_sharding_constraint(weights, place)
      encoded = network.encode(params, config, tokens)
      encoded = caches.cross_attention_inputs(weights, config, encoded, tokens)

      def decode(weights, batch, rng):
        del rng
        prefix, encoded, threshold = batch
        rows = loops.make_rows(encoded, prefix, threshold)
        return loops.greedy_decode(
          prefix, {}, loops.Loop(config, rule, weights, rows, 1), 1
        )

      over = loops.over_rows(decode, self.mesh, axes)
      return over(weights, (prefix, encoded, threshold), None)

    batch = self.rows(jnp.int32, self.inputs), self.rows(jnp.int32, length)
    return jax.jit(predict).lower(self.params(), *batch, self.rows(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Memory:
  """What a step takes of one core, in GB (10^9 bytes)."""

  step: Step
  arguments: float
  temporaries: float
  peak: float  # donated arguments counted once
  loop_collectives: int | None  # of the token loop
  # thousands of a token that leaves after layer 1, L/3, 2 L/3, L
  cycles: tuple[float, ...]


def memory(step: Step) -> Memory:
  """Compiles a step."""
  try:
    made = step.compiled()
  except jax.errors.JaxRuntimeError as error:
    raise RuntimeError(f"{step} does not fit: {str(error)[:300]}") from error
  found: Any = made.memory_analysis()
  module = tpu_hlo.parse(made.as_text() or "")
  peak = (
    found.argument_size_in_bytes
    + found.output_size_in_bytes
    - found.alias_size_in_bytes
  )
  decodes = step.kind == "decode"
  layers = step.config.num_decoder_layers
  ends = (1, layers // 3, 2 * layers // 3, layers) if decodes else ()
  path = tpu_report.PATHS["deferred"]
  return Memory(
    step,
    found.argument_size_in_bytes / 1e9,
    found.temp_size_in_bytes / 1e9,
    (peak + found.temp_size_in_bytes) / 1e9,
    sum(tpu_hlo.collectives(module).values()) if decodes else None,
    tuple(tpu_hlo.step_cycles(module, path, layer) / 1e3 for layer in ends),
  )


def _paper(
  task: str, shape: str, inputs: int, targets: int, model: int
) -> dict[str, Step]:
  """What configs/runs/paper_TASK.gin trains and decodes, on the eight cores of
  a v3-8.
  """
  kinds = {"train": "stage one", "classifier": "stage two", "decode": "decode"}
  return {
    f"{task}_{shape}_{name}": Step(
      kind, shape, model=model, inputs=inputs, targets=targets
    )
    for name, kind in kinds.items()
  }


STEPS: Mapping[str, Step] = {
  **_paper("cnn_dailymail", "small", 512, 512, 1),
  **_paper("cnn_dailymail", "base", 512, 512, 1),
  **_paper("wmt15_enfr", "small", 256, 256, 1),
  **_paper("wmt15_enfr", "base", 256, 256, 1),
  **_paper("squad", "small", 512, 64, 1),
  **_paper("squad", "base", 512, 64, 1),
  "large_train": Step("stage one", "large", "v3:4x4", 2),
  "large_classifier": Step("stage two", "large", "v3:4x4", 2),
  "large_decode": Step("decode", "large", "v3:4x4", 2),
  "base_infer": Step("decode", "base", model=2, whole=True),
  "large_infer": Step("decode", "large", model=2, whole=True),
  "xl_train": Step("stage one", "xl", "v3:8x8", 8),
  "xl_classifier": Step("stage two", "xl", "v3:8x8", 8),
  "xl_decode": Step("decode", "xl", "v3:8x8", 8),
  "xl_decode_v3_32": Step("decode", "xl", "v3:4x4", 8),
  "xl_decode_v3_8": Step("decode", "xl", model=8, batch=32),
}


def row(name: str, one: Memory) -> list[Any]:
  step = one.step
  cores = step.mesh.size
  where = f"{step.topology}, {cores // step.model} x {step.model}"
  lengths = f"{step.batch}, {step.inputs} / {step.targets}"
  kept = [f"{x:.1f}" for x in (one.arguments, one.temporaries, one.peak)]
  loops = "" if one.loop_collectives is None else one.loop_collectives
  return [
    name,
    where,
    lengths,
    *kept,
    loops,
    " / ".join(f"{x:.0f}" for x in one.cycles),
  ]


COLUMNS = (
  *(
    "step",
    "cores, data x model",
    "batch, lengths",
    "arguments, GB",
    "temporaries, GB",
  ),
  *("in all, GB of 16 a core", "collectives in the token loop"),
  "thousand cycles a token, exit at 1 / a third / two thirds / all layers",
)


def main() -> None:
  steps = {"default": list(STEPS), "type": lambda text: text.split(",")}
  flags = tpu_report.flags_of(__doc__, OUTPUT, steps=steps)
  made = []
  for name in flags.steps:
    made.append(row(name, memory(STEPS[name])))
    print(*made[-1], sep=" | ", flush=True)
    tpu_report.write(flags.output, COLUMNS, made)


if __name__ == "__main__":
  main()
