"""The Debian data sets, and scores of a whole corpus; without TensorFlow."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class TextTask:
  """A text-to-text task kept as `<root>/<name>/<split>.jsonl.gz` (or `.jsonl`)."""

  name: str  # its folder, and its name in a mixture
  prefix: str  # what T5 reads before the input to know the task
  metrics: tuple[str, ...]  # names that `seqio_tasks.metric_fn` knows, the usual one first

  def path(self, root: str | pathlib.Path, split: str) -> pathlib.Path:
    """The file of one split; the plain `.jsonl` only where there is no `.jsonl.gz`."""
    folder = pathlib.Path(root) / self.name
    packed, plain = folder / f"{split}.jsonl.gz", folder / f"{split}.jsonl"
    return plain if plain.exists() and not packed.exists() else packed


# Descriptions of Debian packages: summaries, French translations, questions about them.
DEBIAN: Mapping[str, TextTask] = {
  task.name: task
  for task in (
    TextTask("debian_synopsis", "summarize: ", ("rouge_l",)),
    TextTask("debian_enfr", "translate English to French: ", ("bleu", "chrf", "token_f1")),
    # Its inputs already read `question: ... context: ...`.
    TextTask("debian_qa", "", ("token_f1", "exact_match")),
  )
}


def corpus_scores(
  predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
  """{'bleu', 'chrf'}: of the corpus (sacrebleu, 0 to 100), which no mean over prompts is.

  Texts are [num_examples], `references` those accepted of each, at least one.
  """
  import sacrebleu

  most = max(map(len, references))
  # sacrebleu wants one stream a reference number; a repeated reference changes nothing.
  streams = [[texts[min(i, len(texts) - 1)] for texts in references] for i in range(most)]
  return {
    "bleu": sacrebleu.corpus_bleu(list(predictions), streams).score,
    "chrf": sacrebleu.corpus_chrf(list(predictions), streams).score,
  }
