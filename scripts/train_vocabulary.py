r"""Trains a SentencePiece vocabulary on the inputs and targets of JSON Lines
files.

  python scripts/train_vocabulary.py --output=debian_4000.model --size=4000 \
      data/*/train.jsonl.gz

Ids are T5's: padding 0, end of text 1, unknown 2. Each distinct text is read
once, sorted, so that the same files give the same vocabulary.
"""

import argparse

import sentencepiece

from calm import storage
from calm.data import prompt_files


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "paths", nargs="+", help="JSON Lines files of {input, target}"
  )
  parser.add_argument("--output", required=True, help="the model file to write")
  parser.add_argument("--size", type=int, default=8000, help="number of pieces")
  flags = parser.parse_args()
  texts: set[str] = set()
  for path in flags.paths:
    for example in prompt_files.open_prompts(path):
      texts.update([example.input, *example.targets])
  with storage.replacing(flags.output) as output:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(sorted(texts)),
      model_writer=output,
      model_type="unigram",
      vocab_size=flags.size,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      normalization_rule_name="nmt_nfkc",
      max_sentence_length=8192,
    )


if __name__ == "__main__":
  main()
