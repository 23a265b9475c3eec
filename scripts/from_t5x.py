"""A T5X checkpoint and a vocabulary -> a checkpoint of ours, for `calm infer`.

  python scripts/from_t5x.py --checkpoint=runs/two/checkpoint_400 --like=packed \
      --output=runs/model

T5X stores neither sizes nor vocabulary: those come from `--like`, a checkpoint of ours. Needs
no T5X.
"""

import argparse

from calm import checkpoints
from calm.t5 import parameters
from calm.t5x import stored as stored_lib


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--checkpoint", required=True, help="T5X's folder checkpoint_<step>")
  parser.add_argument("--like", default="packed", help="packed, or a folder of ours")
  parser.add_argument("--output", required=True, help="folder to write")
  arguments = parser.parse_args()
  like = stored_lib.stored_checkpoint(arguments.like)
  stored = checkpoints.load(arguments.checkpoint)
  parameters.check(stored.params, like.config)
  checkpoints.save(
    arguments.output,
    stored.params,
    like.config,
    vocabulary=like.vocabulary,
    exits_trained=stored.exits_trained,
  )
  print(arguments.output)


if __name__ == "__main__":
  main()
