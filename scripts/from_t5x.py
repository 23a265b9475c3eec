r"""A T5X checkpoint and a vocabulary -> a checkpoint of ours, for `calm infer`.

  python scripts/from_t5x.py --checkpoint=runs/two/checkpoint_400 --like=packed
      \ --output=runs/model

Sizes are those of the checkpoint's arrays; vocabulary and options of decoding,
which T5X does not store, are those of `--like`, any checkpoint that this
package reads (or `--vocabulary`). With --fit, exits are learned beside the
weights as `calm fit` does, from what the full model wrote in a sweep
(scripts/t5x_sweep.py, `calm infer`); scripts/to_t5x.py takes them to T5X:

  python scripts/from_t5x.py --checkpoint=runs/one/checkpoint_400 --like=packed
      \ --fit=runs/cache --output=runs/model
  python scripts/to_t5x.py --checkpoint=runs/model --step=400 --output=runs/maps

Needs no T5X.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

from calm import calibrate, checkpoints, inference, storage
from calm.data import vocabulary
from calm.t5 import parameters
from calm.t5x import stored as stored_lib


def main() -> None:
  shape = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
  parser.add_argument(
    "--checkpoint", required=True, help="T5X's folder checkpoint_<step>"
  )
  parser.add_argument(
    "--like", default="packed", help="packed, or a checkpoint's folder"
  )
  parser.add_argument(
    "--vocabulary", help="spiece.model or bytes, in place of --like"
  )
  parser.add_argument("--output", required=True, help="folder to write")
  parser.add_argument(
    "--fit", help="a sweep's folder, whose full-depth texts exits learn from"
  )
  parser.add_argument(
    "--layers", help="exit layers of --fit, as in 2,4,6; all below the last"
  )
  parser.add_argument(
    "--rank", type=int, default=16, help="of its learned propagation"
  )
  arguments = parser.parse_args()
  stored = checkpoints.load(arguments.checkpoint)
  options = inference.DecodeOptions()
  if arguments.vocabulary == "bytes":
    words = vocabulary.ByteVocabulary()
  elif arguments.vocabulary:
    words = vocabulary.SentencePieceVocabulary(arguments.vocabulary)
  else:
    words = stored_lib.stored_checkpoint(arguments.like).vocabulary
    folder = (
      inference.PACKED
      if arguments.like == "packed"
      else pathlib.Path(arguments.like)
    )
    options = dataclasses.replace(
      options, **inference.options.stored_options(folder)
    )
  stored = dataclasses.replace(stored, vocabulary=words)
  if arguments.fit:
    below = range(1, stored.config.num_decoder_layers)
    layers = (
      list(map(int, arguments.layers.split(","))) if arguments.layers else below
    )
    stored = fitted(
      stored, arguments.fit, layers, arguments.rank, options.shortlist
    )
  layers = stored.config.exit_propagation
  if layers and options.propagation != "learned":
    learned = {"propagation": "learned", "exit_layers": layers}
    options = inference.options.change(stored.config, options, **learned)
  words = stored.vocabulary
  trained = stored.exits_trained
  checkpoints.save(
    arguments.output,
    stored.params,
    stored.config,
    vocabulary=words,
    exits_trained=trained,
  )
  text = json.dumps(inference.options.to_stored(options), indent=1) + "\n"
  storage.write_atomically(
    pathlib.Path(arguments.output) / "inference.json", text
  )
  print(arguments.output)


def fitted(
  stored, sweep: str, layers, rank: int, listed
) -> checkpoints.Checkpoint:
  """The model that was swept, with exits after `layers` in place of those that
  it had.

  `listed` is the shortlist that probes are to read; None: no probes.
  """
  from calm.fitting import exit_maps  # needs the `report` extra

  found = calibrate.load(sweep)
  if stored.vocabulary is None or found.procedure is None:
    raise ValueError(
      f"Expected a vocabulary and a sweep, got {stored.vocabulary} and "
      f"{found.procedure}; give"
      " --like a model that has one, and --fit a folder that says how it was "
      "decoded."
    )
  base, _ = parameters.split(stored.params)
  plain = {
    "measure": "softmax",
    "exit_layers": None,
    "propagation": "exit_state",
  }
  options = inference.options_of(found.procedure)
  options = dataclasses.replace(options, **plain, shortlist=listed)
  predictor = inference.Predictor(
    stored.config, stored.params, stored.vocabulary, options
  )
  own = predictor.procedure.to_json()
  theirs = found.procedure.to_json()
  # T5X reads no exits unasked
  if theirs["parameters_digest"] == parameters.digest(base):
    own["parameters_digest"] = theirs["parameters_digest"]
  names = ("parameters_digest", "tokenizer_digest", "configuration")
  if different := [name for name in names if own[name] != theirs[name]]:
    raise ValueError(
      f"Expected texts of this very model in {sweep!r}, got other "
      f"{', '.join(different)}; sweep"
      " this checkpoint, and give as --like what has its sizes and vocabulary."
    )
  inputs = [prompt.input for prompt in found.prompts]
  outputs = [record.tokens or () for record in found.full]

  def show(share, text):
    return print(f"\r{share:4.0%} {text:40}", end="", file=sys.stderr)

  made, _ = exit_maps.fit(
    predictor, inputs, outputs, layers, rank=rank, progress=show
  )
  print(file=sys.stderr)
  config = dataclasses.replace(stored.config, **parameters.exit_fields(made))
  params = parameters.unflatten(parameters.flatten(base) | made)
  return dataclasses.replace(
    stored, config=config, params=params, exits_trained=True
  )


if __name__ == "__main__":
  main()
