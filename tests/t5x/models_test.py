"""Our model in T5X: the same network, losses and loops as T5X's own, and early exit in them."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.calibrate.generations import foreign
from calm.calibrate.generations.records import GenerationsError
from calm.exits import confidence, schedules
from calm.t5 import costs, parameters
from calm.t5x import stored
from calm.training import distillation, losses, objectives
from tests import engine
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.MARKS
collect_orphans = setup.collect_orphans
random_generator = setup.random_generator

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
  """Loss and computed metrics; T5X's timing metrics need a clock and are left out."""

  def run(params, batch):
    loss, metrics = model.loss_fn(params, batch, None)
    return loss, {k: v.compute() for k, v in metrics.items() if "timing" not in k}

  return setup.compiled(run)(params, batch)


def lambdas(value) -> dict:
  return {"threshold": jnp.asarray(value, jnp.float32)}


def assert_close(got, expected, atol=2e-5):
  np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=atol, rtol=1e-4)


def test_the_tree_is_that_of_t5x_with_the_classifier_alone_added():
  toy, shapes = engine.toy(), {"encoder_input_tokens": (2, 5), "decoder_input_tokens": (2, 4)}
  ours, theirs = (
    jax.eval_shape(lambda m=m: m.get_initial_variables(jax.random.key(0), shapes))
    for m in (setup.model(toy, rule=BY_CLASSIFIER), setup.t5x_model(toy))
  )
  for name in ("params", "params_axes"):
    mine, expected = (parameters.flatten(tree[name]) for tree in (ours, theirs))
    added = {path for path in mine if "exit_classifier" in path}
    assert added and set(mine) - added == set(expected)
    shape_of = lambda leaf: getattr(leaf, "shape", leaf)
    assert all(shape_of(mine[path]) == shape_of(leaf) for path, leaf in expected.items())


def test_full_depth_logits_are_those_of_t5x():
  toy, batch = engine.toy(), setup.training_batch(engine.toy())
  both = lambda model: setup.compiled(
    lambda *inputs: (model._compute_logits(*inputs), model.score_batch(*inputs))
  )
  logits, scores = both(setup.model(toy))(setup.params(toy), batch)
  expected, their_scores = both(setup.t5x_model(toy))(setup.t5x_params(toy), batch)
  assert np.std(expected) > 1
  assert_close(logits, expected, atol=1e-4)
  assert_close(scores, their_scores, atol=1e-4)


def test_our_module_is_taken_as_it_is_and_strangers_are_refused():
  from flax import linen as nn
  from t5x import adafactor
  from t5x.contrib.gpu.t5 import network as gpu_network

  toy = engine.toy()
  assert stored.config_of(setup.t5x_module(toy)) == toy.config
  assert setup.model(toy, rule=BY_CLASSIFIER).config == toy.config
  without = dataclasses.replace(toy.config, exit_classifier=False)
  assert setup.model(toy).config == without, "nothing needs one: the tree is T5X's own"
  ours = models.network.Transformer(toy.config)
  assert setup.model(toy, module=ours).config == toy.config
  sizes = dict(vocab_size=44, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=16)
  scaled = gpu_network.T5Config(**sizes, scale_attn_logits=True)
  plain = gpu_network.Transformer(gpu_network.T5Config(**sizes))
  assert stored.config_of(plain).emb_dim == 16
  decays = adafactor.Adafactor(1e-3, weight_decay_rate=0.1)
  stage_two = {"objective": objectives.ExitClassifier(), "optimizer_def": decays}
  refused = {
    "no `weight_decay_rate` with ExitClassifier, got 0.1": stage_two,
    "got flax": {"module": nn.Dense(2)},
    "scale_attn_logits of False": {"module": gpu_network.Transformer(scaled)},
    "Expected `threshold` in": {"threshold": 1.5},
    "`rule` to be a `StepRule`, got Speculative": {"rule": exits.Speculative(2)},
    "no `threshold` with Oracle": {"rule": exits.OracleExit(), "threshold": 0.5},
    "no `threshold` with Static": {"rule": exits.StaticExit(2), "threshold": 0.5},
  }
  for message, given in refused.items():
    with pytest.raises(ValueError, match=message):
      setup.model(toy, **given)


LAST_LAYER = objectives.LayerWeighted(losses.last_layer_weights, z_loss=1e-3)
DISTILLED = distillation.SelfDistilled(share=0.0, z_loss=1e-3)
FACTORS = [None, "NUM_REAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE"]


@pytest.mark.parametrize(
  ("objective", "factor"), [(DISTILLED, 7.0), *((LAST_LAYER, factor) for factor in FACTORS)]
)
def test_the_last_layer_alone_is_t5x_loss_and_accuracy(objective, factor):
  toy, batch = engine.toy(), setup.training_batch(engine.toy())
  options = dict(z_loss=1e-3, loss_normalizing_factor=factor)
  ours = setup.model(toy, objective=objective, **options)
  loss, metrics = loss_of(ours, setup.params(toy), batch)
  theirs = setup.t5x_model(toy, **options)
  expected, expected_metrics = loss_of(theirs, setup.t5x_params(toy), batch)
  assert_close(loss, expected)
  penalties = ("z_loss", "z_loss_per_all_target_tokens")
  assert metrics["z_loss"] > 0
  for name in ("loss", "loss_per_nonpadding_target_token", *penalties):
    assert_close(metrics[name], expected_metrics[name])
  if factor != "AVERAGE_PER_SEQUENCE":  # T5X drops the fractions of such weights there
    assert_close(metrics["accuracy"], expected_metrics["accuracy"])


def test_stage_one_is_equation_6_and_reports_every_layer():
  toy, batch = engine.toy(), setup.training_batch(engine.toy())
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


def test_what_maps_learn_from_is_measured_of_layers_that_have_them():
  """The last layer's cross entropy with itself, the floor, stands beside."""
  toy, batch = engine.toy(), setup.training_batch(engine.toy())
  objective = distillation.ExitMaps()
  model = setup.model(toy, objective=objective, exit_maps=((2,), 3))
  params = parameters.add_exit_parts(setup.t5x_params(toy), model.config)
  loss, metrics = loss_of(model, params, batch)
  values = {name: float(value) for name, value in metrics.items() if "/layer_" in name}
  kinds = ("accuracy", "loss", "agreement")
  names = {f"{kind}/layer_{layer}" for kind in kinds for layer in (2, 4)}
  assert values.keys() == names and np.isfinite([float(loss), *values.values()]).all()
  assert values["accuracy/layer_4"] == 1.0 > values["accuracy/layer_2"]
  assert values["loss/layer_2"] > values["loss/layer_4"] > 0.0


def test_at_full_depth_it_is_t5x_own_model_token_for_token():
  toy, batch = engine.toy(), setup.batch()
  theirs = setup.t5x_model(toy, decode_fn=greedy())
  expected, scores = predictor(theirs)(setup.t5x_params(toy), batch, {})
  ours = setup.model(toy, pieces=toy.sizes.vocab_size, decode_fn=greedy())
  for options in ({}, lambdas(NEVER)):
    got, aux = predictor(ours)(setup.params(toy), batch, options)
    np.testing.assert_array_equal(got, expected)
    assert_close(aux["scores"], scores["scores"])
    assert np.std(scores["scores"]) > 0, "T5X scores nothing where it rescales"
    assert set(np.unique(aux["exit_layers"])) <= {0, 4} and aux["exit_layers"][0, 0] == 4
    measured = {"threshold", "confidences", "rejected_confidences"} if options else set()
    always = {"scores", "exit_layers", "relative_cost"}
    assert set(aux) == always | measured, "what is not measured is left out"
    assert options or np.all(aux["relative_cost"] == 1.0)


@pytest.mark.parametrize("decode_fn", [greedy, lambda: models.greedy_decode])
@pytest.mark.parametrize("measure", ["softmax", "state"])
def test_early_exit_is_that_of_our_decoder_exit_for_exit(measure, decode_fn):
  toy, rule = engine.toy(), exits.DynamicExits(confidence.measure(measure), engine.DECAYING)
  predict = predictor(setup.model(toy, rule=rule, decode_fn=decode_fn()))
  means = []
  for threshold in (0.3, 0.7, NEVER):
    expected = engine.run(toy, rule, threshold).generation
    got, aux = predict(setup.params(toy), setup.batch(), lambdas(threshold))
    np.testing.assert_array_equal(got, expected.tokens)
    for name in ("exit_layers", "confidences", "rejected_confidences", "scores"):
      assert_close(aux[name], getattr(expected, name))
    assert_close(aux["threshold"], np.full(BATCH, threshold))
    step = costs.decoding_costs(
      toy.config, rule=rule, input_length=engine.PROMPTS.shape[1], cache_length=engine.LENGTH,
      num_pieces=toy.sizes.num_pieces,
    )  # fmt: skip
    each = [step.savings([row]).flops for row in np.asarray(expected.exit_layers)]
    assert_close(1 / aux["relative_cost"], each)
    means.append(float(expected.mean_layers))
    assert np.max(got) < toy.sizes.num_pieces < toy.sizes.vocab_size
  assert means[0] < means[1] < means[2] == 4.0
  assert predict._cache_size() == 1, "a whole grid is one compilation"


def test_decoder_params_stay_as_they_are_and_the_threshold_stays_here():
  toy, seen = engine.toy(), {}

  def spy(**arguments):
    seen.update(arguments)
    return models.greedy_decode(**arguments)

  given = {"threshold": 0.5, "eos_id": 1}
  setup.model(toy, decode_fn=spy).predict_batch_with_aux(
    setup.params(toy), setup.batch(), decoder_params=given
  )
  assert given == {"threshold": 0.5, "eos_id": 1}
  assert "threshold" not in seen and seen["eos_id"] == 1
  key, oracle = jax.random.key(0), {"rule": exits.OracleExit()}
  refused = [
    ("no prefix with OracleExit", oracle, {"prompt_with_targets": True}),
    ("one random key", {}, {"rng": key, "decoder_params": {"decode_rng": key}}),
  ]
  for wrong in (-1.0, np.float32(1.5), np.array([0.5] * (BATCH - 1) + [-0.1])):
    refused.append(("Expected `threshold` in", {}, {"decoder_params": {"threshold": wrong}}))
  for message, arguments, options in refused:
    with pytest.raises(ValueError, match=message):
      setup.model(toy, **arguments).predict_batch_with_aux(
        setup.params(toy), setup.batch(), **options
      )


def test_exits_of_samples_are_those_that_the_loop_had():
  """Replay against every step that T5X's loop took, by the tokens that it followed."""
  from t5x import decoding

  steps = {}

  def keep(position, sequences, *made):
    for row, (tokens, depth, refused) in enumerate(zip(sequences, *made, strict=True)):
      steps[(row // 3, *tokens[1 : position + 1].tolist())] = depth, refused

  def sample(tokens_to_logits, **given):
    def step(state):
      made, cache = tokens_to_logits.take_step(state)
      outcome = (made.exit_layer, made.rejected_confidence)
      jax.debug.callback(keep, state.cur_index[0], state.sequences, *outcome)
      return made.logits, cache

    fixed = dict(temperature=0.7, topk=5, tokens_to_logits=step)
    return decoding.temperature_sample(**fixed, **given)

  toy = engine.toy()
  predict = predictor(
    setup.model(toy, decode_fn=sample), num_decodes=3, return_all_decodes=True
  )
  options = {**lambdas(0.4), "decode_rng": jax.random.key(3)}
  decodes, aux = jax.block_until_ready(predict(setup.params(toy), setup.batch(), options))
  jax.effects_barrier()
  assert decodes.shape == (BATCH, 3, setup.LENGTH) == aux["exit_layers"].shape
  assert aux["scores"].shape == (BATCH, 3) and aux["threshold"].shape == (BATCH,)
  different = {tuple(row) for row in np.asarray(decodes).reshape(-1, setup.LENGTH)}
  assert len(different) > BATCH, "a prompt's samples differ"
  layers = np.asarray(aux["exit_layers"])
  for i, j, k in zip(*np.nonzero(layers), strict=True):
    depth, refused = steps[(i, *np.asarray(decodes)[i, j, :k].tolist())]
    assert layers[i, j, k] == depth
    assert_close(aux["rejected_confidences"][i, j, k], refused)
  np.testing.assert_array_equal(layers > 0, np.asarray(decodes) > 0)
  assert 1 < np.mean(layers[layers > 0]) < 4


@pytest.mark.parametrize("length", [setup.LENGTH, setup.LENGTH - 2])
def test_beam_search_is_t5x_own_at_full_depth_and_exits_follow_its_order(length):
  """Where it stops before the targets' length as well."""
  from t5x import decoding

  toy, options = engine.toy(), dict(num_decodes=4, return_all_decodes=True)
  limit = {} if length == setup.LENGTH else {"max_decode_len": length}
  pieces, beam = toy.sizes.vocab_size, decoding.beam_search

  def run(model, params, **given):
    decode = functools.partial(model.predict_batch_with_aux, **options)
    step = setup.compiled(lambda p, b: decode(p, b, decoder_params={**limit, **given}))
    return step(params, setup.batch())

  expected, scores = run(setup.t5x_model(toy, decode_fn=beam), setup.t5x_params(toy))
  model = setup.model(toy, pieces=pieces, decode_fn=beam)
  got, aux = run(model, setup.params(toy), threshold=NEVER)
  assert got.shape == (BATCH, 4, length)
  np.testing.assert_array_equal(got, expected)
  assert_close(aux["scores"], scores["scores"])
  decodes, early = run(model, setup.params(toy), threshold=0.4)
  real, layers = np.asarray(decodes) > 0, np.asarray(early["exit_layers"])
  assert np.all((layers > 0) == real) and 1 < layers[real].mean() < 4


@dataclasses.dataclass(frozen=True)
class FirstTokenOnly:
  """A schedule by which the first generated token leaves at once and no other ever does."""

  name = "first_token_only"

  def __call__(self, threshold, generated):
    return jnp.where(generated == 0, jnp.minimum(threshold, 0.0), NEVER)


@pytest.mark.parametrize("loop", ["sample", "beam", "ours"])
def test_a_prefix_runs_at_full_depth_is_not_counted_and_t_starts_after_it(loop):
  from t5x import decoding

  decode_fn = {"sample": greedy(), "beam": decoding.beam_search, "ours": models.greedy_decode}
  toy = engine.toy()
  rule = exits.DynamicExits(confidence.Softmax(), FirstTokenOnly())
  model = setup.model(toy, rule=rule, decode_fn=decode_fn[loop])
  lengths = np.arange(BATCH) % 4
  prefix = np.full((BATCH, setup.LENGTH), 5)
  prefix[np.arange(setup.LENGTH)[None] > lengths[:, None]] = 0
  prefix[:, 0] = 0
  batch = setup.batch() | {"decoder_input_tokens": jnp.asarray(prefix)}
  run = predictor(model, prompt_with_targets=True, num_decodes=2 if loop == "beam" else 1)
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
    never, _ = predictor(ours, prompt_with_targets=True)(setup.params(toy), batch, {})
    full, _ = predictor(theirs, prompt_with_targets=True)(setup.t5x_params(toy), batch, {})
    np.testing.assert_array_equal(never, full)


@pytest.mark.parametrize("loop", ["temperature_sample", "beam_search"])
def test_exits_in_t5x_own_loops_do_not_double_the_program_that_a_run_compiles(loop):
  """Start-up is compiling: the step is in the loop alone, exits are replayed in one pass."""
  from t5x import decoding

  toy, batch = engine.toy(num_decoder_layers=6), setup.batch()
  model = setup.model(toy, decode_fn=getattr(decoding, loop))

  def lines(options):
    made = jax.jit(functools.partial(model.predict_batch_with_aux, decoder_params=options))
    return made.lower(setup.params(toy), batch).as_text().count("\n")

  assert lines({"threshold": 0.5}) < 3 * lines({})  # with the step in two loops, x5.3


def test_one_key_draws_t5x_own_samples_where_the_embedding_is_wider():
  """Where T5X draws no id that the vocabulary does not have, and that ours never emits."""
  from t5x import decoding

  fixed = dict(topk=0, temperature=0.7)
  toy, decode_fn = engine.toy(), functools.partial(decoding.temperature_sample, **fixed)
  pieces = toy.sizes.num_pieces

  def unlikely_beyond(params):  # as after training, which shows a model no such id
    decoder = params["decoder"]
    head = decoder["logits_dense"]["kernel"].at[:, pieces:].set(0.0)
    return {**params, "decoder": {**decoder, "logits_dense": {"kernel": head}}}

  def sampled(model, params):
    options = {"decode_rng": jax.random.PRNGKey(3)}
    run = predictor(model, num_decodes=2, return_all_decodes=True)
    return np.asarray(run(unlikely_beyond(params), setup.batch(), options)[0]).tolist()

  theirs = sampled(setup.t5x_model(toy, decode_fn=decode_fn), setup.t5x_params(toy))
  ours = sampled(setup.model(toy, decode_fn=decode_fn), setup.params(toy))
  rows = [(i, row) for i, prompt in enumerate(theirs) for row in prompt if max(row) < pieces]
  assert len(rows) > BATCH and np.max(ours) < pieces < toy.sizes.vocab_size
  assert all(row in ours[i] for i, row in rows)


def test_prompts_are_embedded_by_their_rows_and_not_by_a_product_with_the_table():
  toy, batch = engine.toy(), setup.training_batch(engine.toy())
  ours, params = setup.model(toy), setup.params(toy)
  rows, length = batch["encoder_input_tokens"].shape
  one_hot = f"tensor<{rows}x{length}x{toy.config.vocab_size}xf32>"
  predicts = jax.jit(ours.predict_batch_with_aux).lower(params, batch).as_text()
  learns = jax.jit(lambda p, b: ours.loss_fn(p, b, None)[0]).lower(params, batch).as_text()
  assert one_hot not in predicts
  assert one_hot in learns, "as T5X trains, and where the check finds it"


def in_pairs(batch):
  """Rows 2i and 2i + 1 one behind the other, as seqio packs examples."""
  made = {name: x.reshape(x.shape[0] // 2, -1) for name, x in batch.items()}
  for side, tokens in (("encoder", "encoder_input"), ("decoder", "decoder_target")):
    length = batch[f"{tokens}_tokens"].shape[1]
    number = jnp.repeat(jnp.arange(1, 3), length)[None, :]
    made[f"{side}_segment_ids"] = jnp.where(made[f"{tokens}_tokens"] > 0, number, 0)
    places = jnp.tile(jnp.arange(length), 2)[None, :]
    made[f"{side}_positions"] = jnp.broadcast_to(places, made[f"{tokens}_tokens"].shape)
  return made


def test_examples_that_are_packed_have_the_loss_that_they_have_apart():
  toy = engine.toy()
  model, batch = setup.model(toy, rule=BY_CLASSIFIER), setup.training_batch(toy)
  loss = setup.compiled(lambda params, batch: model.loss_fn(params, batch, None)[0])
  apart, packed = (loss(setup.params(toy), x) for x in (batch, in_pairs(batch)))
  np.testing.assert_allclose(packed, apart, rtol=1e-5)
  mixed = {k: v for k, v in in_pairs(batch).items() if "segment" not in k}
  assert not np.allclose(loss(setup.params(toy), mixed), apart, rtol=1e-3), "meta: they attend"


def test_microbatches_add_up_to_the_gradient_of_the_batch():
  from t5x import trainer

  toy = engine.toy()
  still = models.network.Transformer(dataclasses.replace(toy.config, dropout_rate=0.0))
  model, batch = setup.model(toy, rule=BY_CLASSIFIER, module=still), setup.training_batch(toy)
  state = types.SimpleNamespace(params=setup.params(toy), flax_mutables=None)

  def grads(batch, number):
    key = jax.random.key(0)
    return trainer.accumulate_grads_microbatched(model, state, batch, key, number)[0]

  whole, parts = (setup.compiled(lambda x, n=n: grads(x, n))(batch) for n in (None, 4))
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole)) > 1
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), whole, parts
  )


def test_t5x_hardware_generator_drops_out_and_samples():
  from t5x import decoding, utils

  utils.set_hardware_rng_ops()
  toy = engine.toy()
  sampled = lambda **given: decoding.temperature_sample(temperature=1.0, topk=0, **given)
  model = setup.model(toy, rule=BY_CLASSIFIER, threshold=0.5, decode_fn=sampled)
  run = setup.compiled(
    lambda params, batch, key: model.predict_batch_with_aux(params, batch, rng=key)
  )
  inputs = setup.params(toy), setup.batch()
  one, again, other = (run(*inputs, jax.random.PRNGKey(seed)) for seed in (0, 0, 1))
  assert jax.random.PRNGKey(0).shape == (4,), "meta: the generator is another than threefry"
  np.testing.assert_array_equal(one[0], again[0])
  assert not np.array_equal(one[0], other[0])
  assert len(set(np.asarray(one[1]["exit_layers"]).ravel().tolist()) - {0}) > 1


def test_a_file_of_all_decodes_is_refused_and_one_of_the_best_is_read(tmp_path):
  """What `t5x/infer.py` writes in `predict_with_aux` mode, by its own function."""
  import seqio
  import tensorflow as tf
  from t5x import decoding, infer

  toy = engine.toy()
  model = setup.model(toy, rule=BY_CLASSIFIER, threshold=0.5, decode_fn=decoding.beam_search)
  rows = tf.data.Dataset.from_tensor_slices({"inputs_pretokenized": ["a", "b"]})

  def written(every: bool):
    predict = lambda params, batch: model.predict_batch_with_aux(
      params, batch, num_decodes=3, return_all_decodes=every
    )
    inputs = setup.params(toy), setup.batch(engine.PROMPTS[:2])
    made = jax.device_get(setup.compiled(predict)(*inputs))
    path, words = tmp_path / f"{every}.jsonl", seqio.ByteVocabulary()
    infer.write_inferences_to_file(str(path), made, rows, "predict_with_aux", words)
    return path

  with pytest.raises(GenerationsError, match=r"one decode.*return_all_decodes = False"):
    foreign.read_predictions(written(every=True))
  path = written(every=False)
  _, records = foreign.read_predictions(path)
  lines = [json.loads(line)["prediction"] for line in path.read_text("utf-8").splitlines()]
  assert [record.prediction for record in records] == lines and len(lines) == 2
