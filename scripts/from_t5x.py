"""A T5X checkpoint and a vocabulary -> a checkpoint of ours, for `calm infer`.

  python scripts/from_t5x.py --checkpoint=runs/two/checkpoint_400 --like=packed \
      --output=runs/model

T5X stores no sizes, no vocabulary and no options of decoding: those come from `--like`, any
checkpoint that this package reads. Needs no T5X.
"""

import argparse
import dataclasses
import json
import pathlib

from calm import checkpoints, inference
from calm.calibrate.generations import files
from calm.t5 import parameters
from calm.t5x import stored as stored_lib


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--checkpoint", required=True, help="T5X's folder checkpoint_<step>")
  parser.add_argument("--like", default="packed", help="packed, or a checkpoint's folder")
  parser.add_argument("--output", required=True, help="folder to write")
  arguments = parser.parse_args()
  like = stored_lib.stored_checkpoint(arguments.like)
  stored = checkpoints.load(arguments.checkpoint)
  options = inference.options.to_stored(stored_lib.stored_options(arguments.like))
  # `to_t5x.py` and training add exit parts: the checkpoint has those that it has.
  parts = (*parameters.EXIT_PARTS, "exit_propagation_rank", "per_layer_heads")
  held = {part: getattr(stored.config, part) for part in parts}
  checkpoints.save(
    arguments.output,
    stored.params,
    dataclasses.replace(like.config, **held),
    vocabulary=like.vocabulary,
    exits_trained=stored.exits_trained,
  )
  text = json.dumps(options, indent=1) + "\n"
  files.write_atomically(pathlib.Path(arguments.output) / "inference.json", text)
  print(arguments.output)


if __name__ == "__main__":
  main()
