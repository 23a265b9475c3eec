"""Any checkpoint that this package reads -> a T5X checkpoint, to start T5X's
training from.

  python scripts/to_t5x.py --checkpoint=packed --output=runs/packed

Ours, Hugging Face's and T5X's own are read; the exit classifier is added where
there is none. Needs T5X.
"""

import argparse
import dataclasses

from calm.t5 import parameters
from calm.t5x import models
from calm.t5x import stored as stored_lib


def main() -> None:
  shape = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
  parser.add_argument(
    "--checkpoint", default="packed", help="a checkpoint's folder, or packed"
  )
  parser.add_argument(
    "--output", required=True, help="folder to write checkpoint_<step> into"
  )
  parser.add_argument(
    "--step", type=int, default=0, help="the step that T5X counts on from"
  )
  arguments = parser.parse_args()
  stored = stored_lib.stored_checkpoint(arguments.checkpoint)
  config = dataclasses.replace(stored.config, exit_classifier=True)
  params = parameters.add_exit_parts(stored.params, config)
  print(
    models.save_t5x_checkpoint(
      params, config, arguments.output, train_step=arguments.step
    )
  )


if __name__ == "__main__":
  main()
