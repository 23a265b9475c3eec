"""Where a model is decoded: platform, precision of products, and what weights
are stored in.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from calm import calibrate, checkpoints, exits, inference
from calm.decode import program as program_lib
from calm.exits import schedules
from calm.inference import options as options_lib
from calm.t5 import eight_bits, network, parameters
from calm.t5 import layers as layers_lib
from tests.inference.predictor_test import OPTIONS, TEXTS, rows


@pytest.fixture(scope="module")
def elsewhere(model):
  """A calibration of the same procedure on a TPU."""
  made = calibrate.calibrate(
    np.zeros((200, 3)), [0.9, 0.6, 0.3], tolerance=0.1, error_rate=0.05
  )
  procedure = dataclasses.replace(
    model.procedure, platform="tpu", matmul_precision="high"
  )
  return dataclasses.replace(
    made,
    procedure=procedure,
    kind="textual",
    metric="exact_match",
    clusters=False,
  )


def test_a_procedure_says_where_it_decodes(directory, model):
  assert (model.procedure.platform, model.procedure.matmul_precision) == (
    "cpu",
    "default",
  )
  other = inference.load(directory, matmul_precision="highest", **OPTIONS)
  assert list(model.procedure.differences(other.procedure)) == [
    "matmul_precision"
  ]
  # JAX has several names for one precision.
  with jax.default_matmul_precision("float32"):
    assert model.procedure.matmul_precision == "highest"
  with pytest.raises(
    ValueError, match="`matmul_precision` to be one of 'default', 'high', "
  ):
    model.with_options(matmul_precision="great")


def test_a_calibration_from_another_platform_is_refused_with_both_named(
  directory, elsewhere, tmp_path
):
  expected = "`platform`: expected 'tpu', got 'cpu'.*--allow_platform"
  given = {**OPTIONS, "calibration": elsewhere}
  with pytest.raises(ValueError, match=expected):
    inference.load(directory, **given)
  with pytest.raises(
    ValueError, match="`matmul_precision`: expected 'high', got 'highest'"
  ):
    inference.load(directory, matmul_precision="highest", **given)
  served = inference.load(directory, allow_platform=True, **given)
  assert (
    served.threshold == elsewhere.threshold
    and served.generate(["a"]).guarantee is None
  )
  # The calibration's precision is an option, and is followed.
  assert served.options.matmul_precision == "high"
  with pytest.raises(
    ValueError, match="`measure`: expected 'softmax', got 'state'"
  ):
    inference.load(directory, allow_platform=True, measure="state", **given)


def test_the_precision_reaches_every_program(directory, monkeypatch):
  seen: list = []

  def note():
    return seen.append(jax.config.jax_default_matmul_precision)

  bind = program_lib.Program.bind
  apply = network.Transformer.apply
  monkeypatch.setattr(
    program_lib.Program, "bind", lambda *a: (note(), bind(*a))[1]
  )
  monkeypatch.setattr(
    network.Transformer, "apply", lambda *a, **k: (note(), apply(*a, **k))[1]
  )
  options = {**OPTIONS, "max_decode_length": 2}
  precise = inference.load(directory, matmul_precision="highest", **options)
  precise.generate(["a"], threshold=0.5)
  batch = precise.plan(["a"])[0]
  precise.resume(
    precise.encode(batch), None, batch.active, 0.5, np.zeros(1, np.int32)
  )
  assert seen == ["highest"] * 3


def test_narrow_weights_are_a_model_of_rounded_weights(directory):
  """Activations stay as they are: the texts are those of the rounded tree."""
  narrow = inference.load(directory, weights_dtype="bfloat16", **OPTIONS)

  def half(leaf):
    return np.asarray(jnp.asarray(leaf, jnp.bfloat16), np.float32)

  params = checkpoints.load(directory).params
  rounded = jax.tree.map(
    lambda leaf: half(leaf) if leaf.ndim > 1 else leaf, params
  )
  # The classifier and the position biases are few numbers, and are kept.
  plain = inference.load(directory, **OPTIONS)
  for part in ("exit_classifier", "relpos_bias"):
    rounded["decoder"][part] = plain.params["decoder"][part]
  same = dataclasses.replace(plain, params=rounded)
  got, expected = (m.generate(TEXTS, threshold=0.6) for m in (narrow, same))
  assert rows(got) == rows(expected)
  for ours, theirs in zip(got, expected, strict=True):
    np.testing.assert_allclose(ours.confidences, theirs.confidences, atol=1e-5)
  assert narrow.weights.decoder.head.dtype == jnp.bfloat16
  batch = narrow.plan(["a"])[0]
  generation = narrow.decode(narrow.encode(batch), batch.active, 0.5)
  assert generation.confidences.dtype == generation.scores.dtype == np.float32


def in_8_bits(call, arguments, named, context):
  """Linear maps of layers as the 8-bit formula has them, in whole numbers of
  float64.
  """
  module = context.module
  if not isinstance(module, layers_lib.Dense) or module.name.startswith(
    "logits_dense"
  ):
    return call(*arguments, **named)
  x = np.asarray(arguments[0], np.float32)
  steps = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-30) / np.float32(127)
  codes = np.round(x / steps)
  kernel = module.variables["params"]["kernel"]
  return jnp.asarray(
    (codes.astype(float) @ rounded(kernel).astype(float)) * steps, jnp.float32
  )


def rounded(matrix) -> np.ndarray:
  """A matrix whose columns are whole multiples of a 127th of their largest
  number.
  """
  scales = np.maximum(np.abs(matrix).max(0), 1e-30) / np.float32(127)
  return np.asarray(np.round(matrix / scales) * scales, np.float32)


@pytest.mark.parametrize("part", ["weights", "encoder"])
def test_layers_in_8_bits_are_the_network_with_its_products_rounded(
  directory, part
):
  """The whole network over whole texts: every linear map of what is done once a
  prompt computed by hand, of the decoder's steps with matrices that were
  rounded by hand.
  """
  given = {**OPTIONS, "batch_size": 1, f"{part}_dtype": "int8"}
  coded = inference.load(directory, **given)
  first = coded.weights.decoder.layers[0]
  assert all(
    any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(matrix))
    == (part == "weights")
    for matrix in (
      first.query,
      *first.key_value,
      first.cross_query,
      *first.mlp_in,
    )
  )
  assert isinstance(
    coded.weights.decoder.cross_key_value[0], eight_bits.EightBits
  )

  def once(path):
    return path[:1] == ("encoder",) or (
      path[-2:-1] == ("encoder_decoder_attention",)
      and path[-1] in ("key", "value")
    )

  def intercept(call, arguments, named, context):
    return (
      in_8_bits(call, arguments, named, context)
      if once(context.module.path)
      else call(*arguments, **named)
    )

  flat = parameters.flatten(coded.params)
  for path in flat if part == "weights" else ():
    module = path.split("/")[:-1]
    leaf = path.split("/")[-1]
    stepped = module[0] == "decoder" and module[-1] != "exit_classifier"
    if stepped and leaf == "kernel" and not once(tuple(module)):
      flat[path] = jnp.asarray(rounded(flat[path]))
  params = parameters.unflatten(flat)
  whole = network.Transformer(coded.config)
  for text in TEXTS[-3:]:
    (item,) = coded.generate([text], threshold=schedules.NEVER_EXIT)
    prompt = coded.plan([text])[0].tokens
    tokens = np.asarray(item.tokens)[None]
    before = np.concatenate(
      [np.zeros_like(tokens[:, :1]), tokens[:, :-1]], axis=1
    )
    with nn.intercept_methods(intercept):
      logits = whole.apply(
        {"params": params}, prompt, before, tokens, enable_dropout=False
      )
    logits = np.asarray(logits)[0, :, : coded.vocabulary.vocab_size]
    np.testing.assert_array_equal(logits.argmax(-1), tokens[0])
    score = np.sum(np.max(jax.nn.log_softmax(logits), axis=-1))
    np.testing.assert_allclose(item.score, score, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
  ("option", "value"),
  [("weights_dtype", "int8"), ("encoder_dtype", "int8"), ("dtype", "bfloat16")],
)
def test_nothing_is_decoded_exactly_from_drafts_where_states_are_rounded(
  directory, option, value
):
  coded = inference.load(directory, **{option: value}, **OPTIONS)
  with pytest.raises(
    ValueError, match=f"for exact decoding, got .*`{option}` '{value}'"
  ):
    inference.exact_rule(coded)


def test_a_folder_whose_states_are_rounded_forgets_that_drafts_were_faster(
  directory, tmp_path
):
  folder = tmp_path / "model"
  shutil.copytree(directory, folder)
  exact = dataclasses.asdict(exits.Speculative(1))
  (folder / inference.FULL_DEPTH).write_text(json.dumps({"exact": exact}))
  assert inference.load(folder).exact == exits.Speculative(1)
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(
    json.dumps({**config, "dtype": "bfloat16"})
  )
  opened = inference.load(folder)
  assert opened.config.dtype == "bfloat16" and opened.exact is None


def test_heads_in_8_bits_emit_the_same_tokens(directory):
  given = {**OPTIONS, "measure": "classifier"}
  plain = inference.load(directory, **given)
  quantized = inference.load(directory, head_dtype="int8", **given)
  head = quantized.weights.decoder.head
  assert isinstance(head, eight_bits.QuantizedHead)
  assert head.coded.numbers.dtype == jnp.int8
  for threshold in (schedules.NEVER_EXIT, 0.6):
    got, expected = (
      m.generate(TEXTS, threshold=threshold) for m in (quantized, plain)
    )
    assert rows(got) == rows(expected)
    for ours, theirs in zip(got, expected, strict=True):
      np.testing.assert_allclose(
        ours.confidences, theirs.confidences, atol=5e-3
      )
      np.testing.assert_allclose(
        ours.score, theirs.score, atol=2e-2 * len(ours.confidences)
      )


def test_files_of_before_are_read_and_what_is_no_option_is_refused(tmp_path):
  file = tmp_path / "inference.json"
  for stored in ("columns", None):
    file.write_text(json.dumps({"measure": "state", "weights_layout": stored}))
    assert options_lib.stored_options(tmp_path) == {"measure": "state"}
  for stored, message in (
    ({"weights_layout": "rows"}, "weights_layout.*by another program"),
    (
      {"head_dtype": "int4"},
      "`head_dtype` to be one of 'int8' or None, got 'int4'",
    ),
    ({"shortlist": [10**30]}, "`shortlist` to be in 0"),
    ({"schedule": {"name": "constant", "x": 1}}, "json: Expected `schedule`"),
  ):
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=message):
      options_lib.stored_options(tmp_path)
