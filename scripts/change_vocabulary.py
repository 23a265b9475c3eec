r"""Gives a checkpoint another SentencePiece vocabulary, ready for further training.

  python scripts/change_vocabulary.py --model=packed --vocabulary=debian_4000.model \
      --vocab_size=4096 --extra_ids=90 --output=runs/smaller_vocabulary

A smaller vocabulary makes the output head cheaper, and with it every token and every softmax
confidence. A piece that both vocabularies have keeps its embedding; another one begins as the
mean of the pieces that the old vocabulary spells it with. Train on afterwards.
"""

import argparse
import dataclasses
import pathlib

import numpy as np

from calm import checkpoints, inference, parameters, vocabulary


def row_sources(old: checkpoints.Vocabulary, new: checkpoints.Vocabulary) -> list[list[int]]:
  """For each id of the new vocabulary, the old ids whose rows it begins as the mean of."""
  ids = {old.piece(i): i for i in range(old.vocab_size)}

  def sources(piece: str) -> list[int]:
    if piece in ids:
      return [ids[piece]]
    return list(old.encode(piece)) or [old.unk_id]

  return [sources(new.piece(i)) for i in range(new.vocab_size)]


def change_rows(table: np.ndarray, sources: list[list[int]], vocab_size: int) -> np.ndarray:
  """[old_vocab, emb_dim] -> [vocab_size, emb_dim]; rows of no piece are the table's last."""
  rows = [table[ids].mean(axis=0) for ids in sources]
  spare = vocab_size - len(rows)
  return np.concatenate([np.stack(rows), table[len(table) - spare :]]).astype(table.dtype)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", required=True, help="checkpoint folder, or `packed`")
  parser.add_argument("--vocabulary", required=True, help="SentencePiece model file")
  parser.add_argument("--vocab_size", type=int, required=True, help="embedding rows")
  parser.add_argument("--extra_ids", type=int, default=100, help="sentinels after the pieces")
  parser.add_argument("--output", required=True, type=pathlib.Path, help="folder to write")
  flags = parser.parse_args()
  packed = flags.model == "packed"
  stored = checkpoints.load(inference.PACKED if packed else pathlib.Path(flags.model))
  new = vocabulary.SentencePieceVocabulary(flags.vocabulary, flags.extra_ids)
  vocabulary.check_fits(new, flags.vocab_size)
  if stored.vocabulary is None:
    parser.error(f"expected {flags.model!r} to hold its vocabulary; got a checkpoint without")
  sources = row_sources(stored.vocabulary, new)
  flat = parameters.flatten(stored.params)
  for path, leaf in flat.items():
    if path == "token_embedder/embedding":
      flat[path] = change_rows(np.asarray(leaf), sources, flags.vocab_size)
    elif path.startswith("decoder/logits_dense"):
      flat[path] = change_rows(np.asarray(leaf).T, sources, flags.vocab_size).T
  config = dataclasses.replace(stored.config, vocab_size=flags.vocab_size)
  checkpoints.save(flags.output, parameters.unflatten(flat), config, vocabulary=new)
  kept = sum(len(ids) == 1 for ids in sources)
  print(f"{flags.output}: {new.vocab_size} ids, {kept} of them with one old row each.")


if __name__ == "__main__":
  main()
