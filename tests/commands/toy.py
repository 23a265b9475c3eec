"""A toy model and the `calm` command on it."""

from calm import checkpoints
from calm.commands import cli
from calm.data import vocabulary
from calm.t5 import network
from tests import toys

SIZES = toys.Config(vocab_size=264, num_pieces=259, num_decoder_layers=3)
DECODE = ["--max_input_length=32", "--max_decode_length=6", "--batch_size=2"]
# At the first no text differs from the full model's, at the second all five do.
THRESHOLDS = "--thresholds=0.99,0.5"
# Five losses of 0 have a p-value of 0.045 against a mean of 0.5; one of 1 among
# them, 0.27.
CERTIFIES = ["--tolerance=0.5", "--error_rate=0.05"]
TEXTS = ["a few words", "another prompt", "b", "the fourth one", "the end"]


def save_model(directory, params=None):
  checkpoints.save(
    directory,
    toys.params(SIZES, 1) if params is None else params,
    network.T5Config(**toys.network_fields(SIZES)),
    vocabulary=vocabulary.ByteVocabulary(extra_ids=0),
  )
  return directory


def generate(model, prompts, output, *more):
  options = [THRESHOLDS, *DECODE, *more]
  return cli.main(
    [
      "generate",
      f"--model={model}",
      f"--prompts={prompts}",
      f"--output={output}",
      *options,
    ]
  )
