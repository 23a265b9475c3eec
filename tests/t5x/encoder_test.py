"""What T5X's predictions do before they decode."""

import jax

from tests import engine
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.MARKS


def test_prompts_are_embedded_by_their_rows_and_not_by_a_product_with_the_table():
  toy, batch = engine.toy(), setup.training_batch(engine.toy())
  ours, params = setup.model(toy), setup.params(toy)
  rows, length = batch["encoder_input_tokens"].shape
  one_hot = f"tensor<{rows}x{length}x{toy.config.vocab_size}xf32>"
  predicts = jax.jit(ours.predict_batch_with_aux).lower(params, batch).as_text()
  learns = jax.jit(lambda p, b: ours.loss_fn(p, b, None)[0]).lower(params, batch).as_text()
  assert one_hot not in predicts
  assert one_hot in learns, "as T5X trains, and where the check finds it"
