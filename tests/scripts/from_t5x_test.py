"""Exits in closed form beside a checkpoint's weights, from what it wrote in a
sweep.
"""

import pathlib
import sys

import jax
import numpy as np
import pytest

pytest.importorskip(
  "optax", reason="optax (the `train` extra) is not installed"
)
pytest.importorskip(
  "jinja2", reason="jinja2 (the `report` extra) is not installed"
)

from calm import calibrate, checkpoints, inference
from calm.calibrate import Provenance
from calm.data import vocabulary
from calm.inference import grid
from calm.t5 import parameters
from scripts import from_t5x
from tests import toy_vocabulary
from tests.inference import predictor_test

NEVER = float("inf")


def swept(model: inference.Predictor, folder: pathlib.Path) -> pathlib.Path:
  """What a model writes for a few prompts at full depth and at one
  threshold.
  """
  texts = [
    f"{word} {i}" for i in range(4) for word in ("a few words", "say it", "b")
  ]
  prompts = [calibrate.Prompt(str(i), text) for i, text in enumerate(texts)]
  story = Provenance(grid=(0.5,), num_examples=len(prompts))
  writer = calibrate.open_writer(
    folder,
    prompts=prompts,
    thresholds=[0.5],
    procedure=model.procedure,
    provenance=story,
  )
  grid.generate(model, prompts, [0.5], writer)
  writer.finish()
  return folder


def test_exits_lie_beside_the_weights_of_the_model_that_was_swept(
  tmp_path, monkeypatch
):
  def run(**given):
    arguments = [f"--{name}={value}" for name, value in given.items()]
    monkeypatch.setattr(sys, "argv", ["from_t5x", *arguments])
    from_t5x.main()
    return checkpoints.load(given["output"])

  plain, other = (
    predictor_test.save(tmp_path / f"{i}", seed=i) for i in (1, 2)
  )
  before = inference.load(plain, **predictor_test.OPTIONS)
  cache = swept(before, tmp_path / "cache")
  output = tmp_path / "output"
  with jax.numpy_dtype_promotion("standard"):  # optax
    stored = run(
      checkpoint=plain, like=plain, fit=cache, layers="1", rank=4, output=output
    )
  config = stored.config
  assert config.exit_translators == config.exit_propagation == (1,)
  assert config.exit_propagation_rank == 4 and config.exit_classifier
  assert parameters.base_digest(stored.params) == parameters.base_digest(
    before.params
  )
  for part in ("exit_translators", "exit_classifier"):
    assert all(
      map(np.any, parameters.flatten(stored.params["decoder"][part]).values())
    )
  model = inference.load(output, **predictor_test.OPTIONS)
  assert (
    model.options.propagation == "learned" and model.options.exit_layers == (1,)
  )

  def tokens(of):
    return [
      out.tokens for out in of.generate(["a few words 9", "x"], threshold=NEVER)
    ]

  assert tokens(model) == tokens(before)
  with pytest.raises(
    ValueError, match=r"of this very model .* got other parameters_digest"
  ):
    run(checkpoint=other, like=plain, fit=cache, output=tmp_path / "none")
  words = toy_vocabulary.train(tmp_path / "toy.model")
  brought = run(
    checkpoint=output, vocabulary=words, output=tmp_path / "brought"
  )
  assert brought.config == config, "sizes are the checkpoint's"
  assert brought.vocabulary == vocabulary.SentencePieceVocabulary(words)
  with pytest.raises(ValueError, match="at most 264"):
    run(checkpoint=output, vocabulary="bytes", output=tmp_path / "none")
  silent = predictor_test.save(tmp_path / "silent", with_vocabulary=False)
  with pytest.raises(
    ValueError, match=r"Expected a vocabulary .* got None and Procedure"
  ):
    run(checkpoint=plain, like=silent, fit=cache, output=tmp_path / "none")
