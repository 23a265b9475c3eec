"""Our model in T5X: the same network, losses and loops as T5X's own, and early
exit in them.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.calibrate.generations import foreign
from calm.calibrate.generations.records import GenerationsError
from calm.exits import confidence, schedules
from calm.t5 import costs, parameters
from calm.training import distillation, losses, objectives
from tests import engine
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.ORBAX

NEVER = schedules.NEVER_EXIT
BATCH = len(engine.PROMPTS)
BY_CLASSIFIER = exits.DynamicExits(confidence.Classifier())


def greedy(**options):
  from t5x import decoding

  fixed = dict(temperature=0.0, topk=0, rescale_log_probs=False)
  return functools.partial(decoding.temperature_sample, **fixed, **options)


def predictor(model, **arguments):
  """The jitted prediction: (params, batch, decoder_params) -> tokens, aux."""
  return setup.compiled(
    lambda params, batch, options: model.predict_batch_with_aux(
      params, batch, decoder_params=options, **arguments
    )
  )


def loss_of(model, params, batch):
  """Loss and computed metrics; T5X's timing metrics need a clock and are left
  out.
  """

  def run(params, batch):
    loss, metrics = model.loss_fn(params, batch, None)
    return loss, {
      k: v.compute() for k, v in metrics.items() if "timing" not in k
    }

  return setup.compiled(run)(params, batch)


def lambdas(value) -> dict:
  return {"threshold": jnp.asarray(value, jnp.float32)}


def assert_close(got, expected, atol=2e-5):
  np.testing.assert_allclose(
    np.asarray(got), np.asarray(expected), atol=atol, rtol=1e-4
  )


def test_the_tree_is_that_of_t5x_with_the_classifier_alone_added():
  toy = engine.toy()
  shapes = {"encoder_input_tokens": (2, 5), "decoder_input_tokens": (2, 4)}
  ours, theirs = (
    jax.eval_shape(
      lambda m=m: m.get_initial_variables(jax.random.key(0), shapes)
    )
    for m in (setup.model(toy, rule=BY_CLASSIFIER), setup.t5x_model(toy))
  )
  for name in ("params", "params_axes"):
    mine, expected = (parameters.flatten(tree[name]) for tree in (ours, theirs))
    added = {path for path in mine if "exit_classifier" in path}
    assert added and set(mine) - added == set(expected)

    def shape_of(leaf):
      return getattr(leaf, "shape", leaf)

    assert all(
      shape_of(mine[path]) == shape_of(leaf) for path, leaf in expected.items()
    )


def test_full_depth_logits_are_those_of_t5x():
  toy = engine.toy()
  batch = setup.training_batch(engine.toy())

  def both(model):
    return setup.compiled(
      lambda *inputs: (
        model._compute_logits(*inputs),
        model.score_batch(*inputs),
      )
    )

  logits, scores = both(setup.model(toy))(setup.params(toy), batch)
  expected, their_scores = both(setup.t5x_model(toy))(
    setup.t5x_params(toy), batch
  )
  assert np.std(expected) > 1
  assert_close(logits, expected, atol=1e-4)
  assert_close(scores, their_scores, atol=1e-4)


def test_our_module_is_taken_as_it_is_and_strangers_are_refused():
  from flax import linen as nn
  from t5x import adafactor
  from t5x.contrib.gpu.t5 import network as gpu_network

  toy = engine.toy()
  assert setup.model(toy, rule=BY_CLASSIFIER).config == toy.config
  without = dataclasses.replace(toy.config, exit_classifier=False)
  assert setup.model(toy).config == without, (
    "nothing needs one: the tree is T5X's own"
  )
  ours = models.network.Transformer(toy.config)
  assert setup.model(toy, module=ours).config == toy.config
  scaled = gpu_network.T5Config(vocab_size=44, scale_attn_logits=True)
  decays = adafactor.Adafactor(1e-3, weight_decay_rate=0.1)
  stage_two = {
    "objective": objectives.ExitClassifier(),
    "optimizer_def": decays,
  }
  refused = {
    "no `weight_decay_rate` with ExitClassifier, got 0.1": stage_two,
    "got flax": {"module": nn.Dense(2)},
    "scale_attn_logits of False": {"module": gpu_network.Transformer(scaled)},
    "`rule` to be a `StepRule`, got Speculative": {
      "rule": exits.Speculative(2)
    },
    "no `threshold` with Static": {
      "rule": exits.StaticExit(2),
      "threshold": 0.5,
    },
  }
  for message, given in refused.items():
    with pytest.raises(ValueError, match=message):
      setup.model(toy, **given)


LAST_LAYER = objectives.LayerWeighted(losses.last_layer_weights, z_loss=1e-3)
DISTILLED = distillation.SelfDistilled(share=0.0, z_loss=1e-3)


@pytest.mark.parametrize(
  ("objective", "factor"),
  [
    (DISTILLED, 7.0),
    (LAST_LAYER, "NUM_REAL_TARGET_TOKENS"),
    (LAST_LAYER, None),
  ],
)
def test_the_last_layer_alone_is_t5x_loss_and_accuracy(objective, factor):
  toy = engine.toy()
  batch = setup.training_batch(engine.toy())
  options = dict(z_loss=1e-3, loss_normalizing_factor=factor)
  ours = setup.model(toy, objective=objective, **options)
  loss, metrics = loss_of(ours, setup.params(toy), batch)
  theirs = setup.t5x_model(toy, **options)
  expected, expected_metrics = loss_of(theirs, setup.t5x_params(toy), batch)
  assert_close(loss, expected)
  assert metrics["z_loss"] > 0
  for name in (
    "loss",
    "loss_per_nonpadding_target_token",
    "z_loss",
    "accuracy",
  ):
    assert_close(metrics[name], expected_metrics[name])


def test_stage_one_is_equation_6_and_reports_every_layer():
  toy = engine.toy()
  batch = setup.training_batch(engine.toy())
  loss, metrics = loss_of(setup.model(toy), setup.params(toy), batch)
  layers = range(1, toy.config.num_decoder_layers + 1)
  each = [float(metrics[f"loss/layer_{i}"]) for i in layers]
  tokens = float(jnp.sum(batch["decoder_loss_weights"]))
  assert np.std(each) > 0.05
  assert_close(loss / tokens, np.dot(each, losses.layer_weights(len(each))))
  assert metrics["accuracy"] == metrics["accuracy/layer_4"]
  same = [float(metrics[f"agreement/layer_{i}"]) for i in layers]
  assert same[-1] == 1.0 and all(0.0 < x < 1.0 for x in same[:-1])
  own, _ = loss_of(setup.t5x_model(toy), setup.t5x_params(toy), batch)
  assert_close(each[-1] * tokens, own)


def test_at_full_depth_it_is_t5x_own_model_token_for_token():
  toy = engine.toy()
  batch = setup.batch()
  theirs = setup.t5x_model(toy, decode_fn=greedy())
  expected, scores = predictor(theirs)(setup.t5x_params(toy), batch, {})
  ours = setup.model(toy, pieces=toy.sizes.vocab_size, decode_fn=greedy())
  for options in ({}, lambdas(NEVER)):
    got, aux = predictor(ours)(setup.params(toy), batch, options)
    np.testing.assert_array_equal(got, expected)
    assert_close(aux["scores"], scores["scores"])
    assert np.std(scores["scores"]) > 0, "T5X scores nothing where it rescales"
    assert (
      set(np.unique(aux["exit_layers"])) <= {0, 4}
      and aux["exit_layers"][0, 0] == 4
    )
    measured = (
      {"threshold", "confidences", "rejected_confidences"} if options else set()
    )
    always = {"scores", "exit_layers", "relative_cost"}
    assert set(aux) == always | measured, "what is not measured is left out"
    assert options or np.all(aux["relative_cost"] == 1.0)


@pytest.mark.parametrize("decode_fn", [greedy, lambda: models.greedy_decode])
def test_early_exit_is_that_of_our_decoder_exit_for_exit(decode_fn):
  toy = engine.toy()
  rule = exits.DynamicExits(confidence.Softmax(), engine.DECAYING)
  predict = predictor(setup.model(toy, rule=rule, decode_fn=decode_fn()))
  means = []
  for threshold in (0.3, 0.7, NEVER):
    expected = engine.run(toy, rule, threshold).generation
    got, aux = predict(setup.params(toy), setup.batch(), lambdas(threshold))
    np.testing.assert_array_equal(got, expected.tokens)
    for name in (
      "exit_layers",
      "confidences",
      "rejected_confidences",
      "scores",
    ):
      assert_close(aux[name], getattr(expected, name))
    assert_close(aux["threshold"], np.full(BATCH, threshold))
    sizes = dict(
      input_length=engine.PROMPTS.shape[1], cache_length=engine.LENGTH
    )
    sizes["num_pieces"] = toy.sizes.num_pieces
    step = costs.decoding_costs(toy.config, rule=rule, **sizes)
    each = [
      step.savings([row]).flops for row in np.asarray(expected.exit_layers)
    ]
    assert_close(1 / aux["relative_cost"], each)
    means.append(engine.mean_layers(expected))
    assert np.max(got) < toy.sizes.num_pieces < toy.sizes.vocab_size
  assert means[0] < means[1] < means[2] == 4.0
  assert predict._cache_size() == 1, "a whole grid is one compilation"


def test_the_threshold_stays_here_and_odd_calls_are_refused():
  toy = engine.toy()
  seen = {}

  def spy(**arguments):
    seen.update(arguments)
    return models.greedy_decode(**arguments)

  given = {"threshold": 0.5, "eos_id": 1}
  inputs = (setup.params(toy), setup.batch())
  setup.model(toy, decode_fn=spy).predict_batch_with_aux(
    *inputs, decoder_params=given
  )
  assert given == {"threshold": 0.5, "eos_id": 1}
  assert "threshold" not in seen and seen["eos_id"] == 1
  key = jax.random.key(0)
  wrong = np.array([0.5] * (BATCH - 1) + [-0.1])
  for message, rule, options in (
    (
      "no prefix with OracleExit",
      exits.OracleExit(),
      {"prompt_with_targets": True},
    ),
    (
      "one random key",
      None,
      {"rng": key, "decoder_params": {"decode_rng": key}},
    ),
    (
      "Expected `threshold` to be",
      None,
      {"decoder_params": {"threshold": wrong}},
    ),
  ):
    with pytest.raises(ValueError, match=message):
      setup.model(toy, rule=rule).predict_batch_with_aux(*inputs, **options)


def test_beam_search_is_t5x_own_at_full_depth_and_exits_follow_its_order():
  """Where it stops before the targets' length."""
  from t5x import decoding

  toy = engine.toy()
  length = setup.LENGTH - 2
  options = dict(return_all_decodes=True)
  beam = {"decode_fn": decoding.beam_search}

  def run(model, params, **given):
    decode = functools.partial(
      model.predict_batch_with_aux, num_decodes=4, **options
    )
    given["max_decode_len"] = length
    step = setup.compiled(lambda p, b: decode(p, b, decoder_params=given))
    return step(params, setup.batch())

  expected, scores = run(setup.t5x_model(toy, **beam), setup.t5x_params(toy))
  model = setup.model(toy, pieces=toy.sizes.vocab_size, **beam)
  got, aux = run(model, setup.params(toy), threshold=NEVER)
  assert got.shape == (BATCH, 4, length)
  np.testing.assert_array_equal(got, expected)
  assert_close(aux["scores"], scores["scores"])
  decodes, early = run(model, setup.params(toy), threshold=0.4)
  real = np.asarray(decodes) > 0
  layers = np.asarray(early["exit_layers"])
  assert np.all((layers > 0) == real) and 1 < layers[real].mean() < 4


@dataclasses.dataclass(frozen=True)
class FirstTokenOnly:
  """A schedule by which the first generated token leaves at once and no other
  ever does.
  """

  name = "first_token_only"

  def __call__(self, threshold, generated):
    return jnp.where(generated == 0, jnp.minimum(threshold, 0.0), NEVER)


@pytest.mark.parametrize("loop", ["sample", "beam", "ours"])
def test_a_prefix_runs_at_full_depth_is_not_counted_and_t_starts_after_it(loop):
  from t5x import decoding

  decode_fn = {
    "sample": greedy(),
    "beam": decoding.beam_search,
    "ours": models.greedy_decode,
  }
  toy = engine.toy()
  rule = exits.DynamicExits(confidence.Softmax(), FirstTokenOnly())
  model = setup.model(toy, rule=rule, decode_fn=decode_fn[loop])
  lengths = np.arange(BATCH) % 4
  prefix = np.full((BATCH, setup.LENGTH), 5)
  prefix[np.arange(setup.LENGTH)[None] > lengths[:, None]] = 0
  prefix[:, 0] = 0
  batch = setup.batch() | {"decoder_input_tokens": jnp.asarray(prefix)}
  run = predictor(
    model, prompt_with_targets=True, num_decodes=2 if loop == "beam" else 1
  )
  tokens, aux = run(setup.params(toy), batch, lambdas(0.5))
  layers = np.asarray(aux["exit_layers"])
  for row, k in enumerate(lengths):
    np.testing.assert_array_equal(tokens[row, :k], 5)
    np.testing.assert_array_equal(layers[row, :k], 0)
    assert layers[row, k] == 1
    rest = layers[row, k + 1 :]
    assert set(rest[rest > 0]) <= {4}
  if loop == "sample":
    theirs = setup.t5x_model(toy, decode_fn=greedy())
    ours = setup.model(toy, pieces=toy.sizes.vocab_size, decode_fn=greedy())
    never, _ = predictor(ours, prompt_with_targets=True)(
      setup.params(toy), batch, {}
    )
    full, _ = predictor(theirs, prompt_with_targets=True)(
      setup.t5x_params(toy), batch, {}
    )
    np.testing.assert_array_equal(never, full)


@pytest.mark.parametrize("loop", ["temperature_sample", "beam_search"])
def test_exits_in_t5x_own_loops_do_not_double_the_program_that_a_run_compiles(
  loop,
):
  """Start-up is compiling: the step is in the loop alone, exits are replayed in
  one pass.
  """
  from t5x import decoding

  toy = engine.toy(num_decoder_layers=6)
  batch = setup.batch()
  model = setup.model(toy, decode_fn=getattr(decoding, loop))

  def lines(options):
    made = jax.jit(
      functools.partial(model.predict_batch_with_aux, decoder_params=options)
    )
    return made.lower(setup.params(toy), batch).as_text().count("\n")

  # with the step in two loops, x5.3
  assert lines({"threshold": 0.5}) < 3 * lines({})


def test_one_key_draws_t5x_own_samples_where_the_embedding_is_wider():
  """Where T5X draws no id that the vocabulary does not have, and that ours
  never emits.
  """
  from t5x import decoding

  fixed = dict(topk=0, temperature=0.7)
  toy = engine.toy()
  decode_fn = functools.partial(decoding.temperature_sample, **fixed)
  pieces = toy.sizes.num_pieces

  # as after training, which shows a model no such id
  def unlikely_beyond(params):
    decoder = params["decoder"]
    head = decoder["logits_dense"]["kernel"].at[:, pieces:].set(0.0)
    return {**params, "decoder": {**decoder, "logits_dense": {"kernel": head}}}

  def sampled(model, params):
    options = {"decode_rng": jax.random.PRNGKey(3)}
    run = predictor(model, num_decodes=2, return_all_decodes=True)
    return np.asarray(
      run(unlikely_beyond(params), setup.batch(), options)[0]
    ).tolist()

  theirs = sampled(
    setup.t5x_model(toy, decode_fn=decode_fn), setup.t5x_params(toy)
  )
  ours = sampled(setup.model(toy, decode_fn=decode_fn), setup.params(toy))
  rows = [
    (i, row)
    for i, prompt in enumerate(theirs)
    for row in prompt
    if max(row) < pieces
  ]
  assert len(rows) > BATCH and np.max(ours) < pieces < toy.sizes.vocab_size
  assert all(row in ours[i] for i, row in rows)


def in_pairs(batch):
  """Rows 2i and 2i + 1 one behind the other, as seqio packs examples."""
  made = {name: x.reshape(x.shape[0] // 2, -1) for name, x in batch.items()}
  for side, tokens in (
    ("encoder", "encoder_input"),
    ("decoder", "decoder_target"),
  ):
    length = batch[f"{tokens}_tokens"].shape[1]
    number = jnp.repeat(jnp.arange(1, 3), length)[None, :]
    made[f"{side}_segment_ids"] = jnp.where(
      made[f"{tokens}_tokens"] > 0, number, 0
    )
    places = jnp.tile(jnp.arange(length), 2)[None, :]
    made[f"{side}_positions"] = jnp.broadcast_to(
      places, made[f"{tokens}_tokens"].shape
    )
  return made


def test_examples_that_are_packed_have_the_loss_that_they_have_apart():
  toy = engine.toy()
  model = setup.model(toy, rule=BY_CLASSIFIER)
  batch = setup.training_batch(toy)
  loss = setup.compiled(
    lambda params, batch: model.loss_fn(params, batch, None)[0]
  )
  apart, packed = (loss(setup.params(toy), x) for x in (batch, in_pairs(batch)))
  np.testing.assert_allclose(packed, apart, rtol=1e-5)
  mixed = {k: v for k, v in in_pairs(batch).items() if "segment" not in k}
  assert not np.allclose(loss(setup.params(toy), mixed), apart, rtol=1e-3), (
    "meta: they attend"
  )


def test_a_file_of_all_decodes_is_refused_and_one_of_the_best_is_read(tmp_path):
  """What `t5x/infer.py` writes in `predict_with_aux` mode, by its own
  function.
  """
  import seqio
  import tensorflow as tf
  from t5x import decoding, infer

  toy = engine.toy()
  words = seqio.ByteVocabulary()
  model = setup.model(toy, threshold=0.5, decode_fn=decoding.beam_search)
  rows = tf.data.Dataset.from_tensor_slices({"inputs_pretokenized": ["a", "b"]})
  inputs = setup.params(toy), setup.batch(engine.PROMPTS[:2])
  for every in (True, False):
    predict = predictor(model, num_decodes=3, return_all_decodes=every)
    made = jax.device_get(predict(*inputs, {}))
    path = str(tmp_path / f"{every}.jsonl")
    infer.write_inferences_to_file(path, made, rows, "predict_with_aux", words)
  with pytest.raises(
    GenerationsError, match=r"one decode.*return_all_decodes = False"
  ):
    foreign.read_predictions(tmp_path / "True.jsonl")
  _, records = foreign.read_predictions(path)
  lines = [
    json.loads(x)["prediction"] for x in (tmp_path / "False.jsonl").open()
  ]
  assert [record.prediction for record in records] == lines and len(lines) == 2
