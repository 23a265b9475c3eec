"""Laws of the decode loop as a TPU's compiler lays it out (nothing is run; no
TPU is needed).

Real widths, since layouts depend on them, but few layers and a small
vocabulary.
"""

import dataclasses
import functools

import pytest

pytest.importorskip("jax")
import tpu_hlo
import tpu_report

from calm import exits
from calm.decode import engines
from calm.exits import confidence, propagation
from calm.t5 import platforms

pytestmark = pytest.mark.skipif(
  bool(tpu_report.available()), reason=tpu_report.available()
)

TOPOLOGY = "v3:2x2"
LAYERS = 3
CONFIG = tpu_report.configuration(
  "small", num_decoder_layers=LAYERS, num_encoder_layers=1, vocab_size=2048
)
ROWS = 8
INPUT = 128
LENGTH = 512
# The smallest weight matrix of a layer; an activation is far smaller, a cache
# larger.
WEIGHT = CONFIG.emb_dim * CONFIG.num_heads * CONFIG.head_dim


def default() -> str:
  """The name of a TPU's default engine."""
  rule = exits.DynamicExits(confidence.Classifier())
  return engines.default_engine(rule, ROWS, "tpu").__name__.lower()


@functools.cache
def compiled(
  name: str, weights_dtype: str | None = None
) -> tpu_report.Compiled:
  sizes = ROWS, INPUT, LENGTH
  return tpu_report.compiled(
    TOPOLOGY, CONFIG, name, LAYERS, sizes, weights_dtype=weights_dtype
  )


def named(name: str) -> str:
  """'default' by its name."""
  return default() if name == "default" else name


def program(name: str, weights_dtype: str | None = None) -> tpu_report.Compiled:
  return compiled(named(name), weights_dtype)


@pytest.mark.parametrize("name", ["static", "default"])
def test_the_token_loop_moves_no_cache_and_no_weight(name):
  module = program(name).module
  assert not [x.text for x in tpu_hlo.moved(module, WEIGHT)]
  assert not tpu_hlo.collectives(module)
  # Meta: the loop was found, with the updates of the caches in it.
  sizes = [x.elements for x in module.within(module.token_loop())]
  assert max(sizes) >= program(name).half_cache and len(sizes) > 100


def test_the_check_finds_weights_and_caches_that_are_moved():
  """Meta: `Compacted` gathers rows of caches, which is why it is no default
  here.
  """
  assert tpu_hlo.moved(compiled("compacted").module, WEIGHT)


@pytest.mark.parametrize("name", sorted(set(tpu_report.PATHS) - {"static"}))
def test_the_path_of_an_engine_has_a_segment_a_layer(name):
  """One too many were there if the first ran in what the path leaves out."""
  module = compiled(name).module
  path = tpu_report.PATHS[name]
  assert tpu_hlo.step_cycles(module, path, LAYERS) > 0
  with pytest.raises(
    ValueError, match=f"Expected {LAYERS + 1} segments .* got 1 fewer"
  ):
    tpu_hlo.step_cycles(module, path, LAYERS + 1)


def test_a_token_costs_more_cycles_the_deeper_it_goes():
  name = default()
  path = tpu_report.PATHS[name]
  cycles = [
    tpu_hlo.step_cycles(program(name).module, path, k) for k in (1, 2, 3)
  ]
  full = tpu_hlo.step_cycles(
    program("static").module, tpu_report.PATHS["static"]
  )
  assert 0 < cycles[0] < cycles[1] < cycles[2]
  assert cycles[0] < full < 2 * cycles[2]


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
def test_an_exit_costs_at_most_a_tenth_more_than_a_model_of_that_depth(layer):
  """Filling what skipped layers left comes on top, later."""
  path = tpu_report.PATHS[default()]
  cycles = tpu_hlo.step_cycles(program("default").module, path, layer)
  sizes = ROWS, INPUT, LENGTH
  static = tpu_report.compiled(TOPOLOGY, CONFIG, "static", layer, sizes)
  assert cycles <= 1.1 * tpu_hlo.step_cycles(
    static.module, tpu_report.PATHS["static"]
  )


@functools.cache
def mapped(
  name: str, layer: int | None = None, maps: bool = True
) -> tpu_report.Compiled:
  """At T5 1.1 small's vocabulary, with translators and learned propagation or
  without.
  """
  exit_layers = tuple(range(1, LAYERS))
  given = dict(exit_translators=exit_layers, exit_propagation=exit_layers)
  given = {**given, "exit_propagation_rank": 16} if maps else {}
  config = dataclasses.replace(CONFIG, vocab_size=32128, **given)
  learned = propagation.Learned() if maps else None
  sizes = ROWS, INPUT, LENGTH
  return tpu_report.compiled(
    TOPOLOGY, config, name, layer, sizes, propagated=learned
  )


def test_maps_of_exits_cost_little_and_move_no_cache():
  path = tpu_report.PATHS[default()]
  static = tpu_report.PATHS["static"]
  module = mapped(default()).module
  assert not [x.text for x in tpu_hlo.moved(module, WEIGHT)]
  for layer in range(1, LAYERS + 1):
    cycles = tpu_hlo.step_cycles(module, path, layer)
    today = tpu_hlo.step_cycles(
      mapped(default(), maps=False).module, path, layer
    )
    cut = tpu_hlo.step_cycles(mapped("static", layer).module, static)
    assert cycles <= 1.05 * today and cycles <= 1.1 * cut, (
      layer,
      cycles,
      today,
      cut,
    )


def test_a_single_row_meets_the_head_in_the_matrix_unit():
  """Else it is multiplied by the element, from a head in float32, in thrice the
  cycles.
  """
  one = tpu_report.compiled(TOPOLOGY, CONFIG, "static", 1, (1, INPUT, 64))
  head = f"{CONFIG.emb_dim},{CONFIG.vocab_size}"
  text = "\n".join(x.text for x in one.module.within(one.module.token_loop()))
  assert f"bf16[{head}]" in text and f"f32[{head}]" not in text


@pytest.mark.parametrize("name", ["static", "default"])
def test_temporaries_are_what_the_loop_carries(name):
  """Each cache once, in the precision of the products, as the matrices' copies
  are; and what skipped layers project later. At this size that is 1.2 and 1.4
  times the float32 caches.
  """
  made = program(name)
  rows = f"{ROWS},{LENGTH}"
  carried = made.module.carried()
  assert made.temporaries <= 1.1 * sum(carried.values())
  in_caches = carried[f"bf16[{rows},{CONFIG.num_heads * CONFIG.head_dim}]"]
  assert in_caches == made.caches / 2
  states = {"default": ROWS * LENGTH * CONFIG.emb_dim * 4}.get(name, 0)
  matrices = sum(
    v for k, v in carried.items() if not k.split("[")[1].startswith(f"{ROWS},")
  )
  prompts = carried[
    f"bf16[{ROWS},{INPUT},{CONFIG.num_heads * CONFIG.head_dim}]"
  ]
  assert made.temporaries <= 1.1 * (in_caches + states + matrices + prompts)


@pytest.mark.parametrize("name", ["static", "default"])
def test_stored_layouts_keep_temporaries_below_the_size_of_caches(
  name,
):
  """What was above was the float32 weights' copies: a loop keeps no second
  cache.
  """
  made = program(name, "bfloat16")
  assert made.temporaries <= made.caches < program(name).temporaries


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["static", "default"])
def test_weights_stored_as_products_read_them_are_not_laid_out_anew(
  name, dtype
):
  """Keys and values of one matrix were, for every layer that may be skipped:
  two are stored.
  """
  config = dataclasses.replace(CONFIG, dtype=dtype)
  engine = named(name)
  sizes = ROWS, INPUT, LENGTH
  made = tpu_report.compiled(
    TOPOLOGY, config, engine, LAYERS, sizes, weights_dtype="bfloat16"
  )
  before_the_loop = made.module.computations[made.module.entry]
  copied = [
    x for x in before_the_loop if x.opcode == "copy" and x.elements >= WEIGHT
  ]
  assert not [x.text for x in copied]
  # Meta: the matrices are there to be copied.
  assert (
    sum(
      x.opcode == "parameter" and x.elements >= WEIGHT for x in before_the_loop
    )
    > 20
  )


@pytest.mark.parametrize("name", ["static", "default"])
def test_one_float32_matrix_of_keys_and_values_takes_fewer_cycles(
  name, monkeypatch
):
  one = program(name)
  path = tpu_report.PATHS[named(name)]
  monkeypatch.setattr(platforms, "key_value_apart", lambda matrices: True)
  two = compiled.__wrapped__(named(name))
  segments = 1 if name == "static" else LAYERS
  cycles = [
    tpu_hlo.step_cycles(made.module, path, segments) for made in (one, two)
  ]
  assert cycles[0] < cycles[1]
  assert one.temporaries < 1.01 * two.temporaries
