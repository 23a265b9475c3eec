"""seqio tasks: JSON Lines files, the Debian data sets, and the paper's three
from TFDS.

Each function registers its task (or mixture) and returns the name, for T5X's
`MIXTURE_OR_TASK_NAME`, in place of what had that name before. Examples keep
`id`, `references` (all accepted targets), `inputs_pretokenized` and
`targets_pretokenized`; both features end with end-of-text, truncated or not.
Importing this module loads TensorFlow.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from calm import arguments
from calm.calibrate import metrics as text_metrics
from calm.data import prompt_files

Tensors = Mapping[str, Any]
MetricFn = Callable[[Sequence[Sequence[str]], Sequence[str]], dict[str, float]]

_CORPUS = ("bleu", "chrf")


def metric_fn(name: str) -> MetricFn:
  """A seqio metric function of (references of each example, predictions);
  percentages.

  `name` is `bleu` or `chrf` (of the corpus, sacrebleu), or one that
  `metrics.get_metric` knows, such as `rouge_l` (mean over examples of the best
  over references).
  """
  metric = None if name in _CORPUS else text_metrics.get_metric(name)

  def function(targets, predictions):
    if metric is None:
      return {name: text_metrics.corpus_scores(predictions, targets)[name]}
    pairs = zip(predictions, targets, strict=True)
    return {
      name: 100 * float(np.mean([metric(text, texts) for text, texts in pairs]))
    }

  function.__name__ = name.replace(":", "_").replace(".", "_")
  return function


def references_or_text(
  text: str, *, example: Tensors, is_target: bool = False, **_
) -> Any:
  """seqio postprocessor: all references of a target; a prediction as it is."""
  if not is_target:
    return text
  return [tf.compat.as_text(reference) for reference in example["references"]]


@functools.lru_cache(maxsize=16)
def _read(path: str) -> prompt_files.Prompts:
  return prompt_files.open_prompts(path, require_target=True)


class JsonlSource(seqio.DataSource):
  """Examples of JSON Lines files, {split: file}, read whole on first use."""

  def __init__(
    self, paths: Mapping[str, str | os.PathLike[str]], prefix: str = ""
  ):
    super().__init__(splits=tuple(paths), caching_permitted=True)
    self.paths = {split: os.fspath(path) for split, path in paths.items()}
    self.prefix = prefix

  supports_arbitrary_sharding = property(lambda self: True)

  def list_shards(self, split: str) -> Sequence[str]:
    return [self.paths[split]]

  def num_input_examples(self, split: str) -> int:
    return len(_read(self.paths[split]))

  def get_dataset(
    self,
    split: str = "train",
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **_,
  ) -> tf.data.Dataset:
    shard = shard_info or seqio.ShardInfo(0, 1)
    rows = _read(self.paths[arguments.one_of("split", split, self.paths)])[
      shard.index :: shard.num_shards
    ]
    columns: Any = {
      "id": [row.id for row in rows],
      "source": [row.group or "" for row in rows],
      "inputs": [self.prefix + row.input for row in rows],
      "targets": [row.targets[0] for row in rows],
      "references": tf.ragged.constant(
        [list(row.targets) for row in rows], tf.string
      ),
    }
    dataset = tf.data.Dataset.from_tensor_slices(columns)
    # The files are sorted by id; seqio's own buffer would shuffle them only
    # locally.
    return dataset.shuffle(max(1, len(rows)), seed=seed) if shuffle else dataset


def jsonl(
  name: str,
  paths: Mapping[str, str | os.PathLike[str]],
  vocabulary: seqio.Vocabulary | str,
  *,
  prefix: str = "",
  metrics: Sequence[str] = ("rouge_l",),
) -> str:
  """Registers JSON Lines files of {input, target} (see `prompt_files`) as a
  task.

  Args:
    name: name to register; the result.
    paths: split -> file, such as {"train": "train.jsonl.gz", "validation":
      "dev.jsonl"}.
    vocabulary: a seqio vocabulary, or the path of a SentencePiece model.
    prefix: task prefix, put before each input.
    metrics: names for `metric_fn`.
  """
  return _register(name, JsonlSource(paths, prefix), [], vocabulary, metrics)


def debian(
  task: str, root: str | os.PathLike[str], vocabulary: seqio.Vocabulary | str
) -> str:
  """Registers one of the three Debian data sets, under its own name.

  `root` is the folder that holds `<task>/{train,validation,test}.jsonl.gz`.
  """
  known = prompt_files.DEBIAN[
    arguments.one_of("task", task, prompt_files.DEBIAN)
  ]
  paths = {
    split: known.path(root, split) for split in ("train", "validation", "test")
  }
  return jsonl(
    task, paths, vocabulary, prefix=known.prefix, metrics=known.metrics
  )


def debian_mixture(
  root: str | os.PathLike[str], vocabulary: seqio.Vocabulary | str
) -> str:
  """Registers all three Debian data sets, mixed in proportion to their training
  examples.
  """
  members = [debian(task, root, vocabulary) for task in prompt_files.DEBIAN]
  name = "debian"
  seqio.MixtureRegistry.remove(name)
  seqio.MixtureRegistry.add(
    name, members, default_rate=seqio.mixing_rate_num_examples
  )
  return name


def summarization_example(example: Tensors) -> dict[str, Any]:
  """CNN/DailyMail of TFDS (`article`, `highlights`, `id`) -> `summarize:
  <article>`.
  """
  text = tf.strings.join(["summarize: ", example["article"]])
  return _example(example["id"], text, example["highlights"][tf.newaxis])


def translation_example(example: Tensors) -> dict[str, Any]:
  """WMT of TFDS (`en`, `fr`) -> `translate English to French: <en>`.

  TFDS numbers no pairs, so `id` is a hash of the pair: equal pairs share it.
  """
  pair = tf.strings.join([example["en"], "\t", example["fr"]])
  code = tf.strings.as_string(tf.strings.to_hash_bucket_fast(pair, 2**62))
  text = tf.strings.join(["translate English to French: ", example["en"]])
  return _example(
    tf.strings.join(["enfr/", code]), text, example["fr"][tf.newaxis]
  )


def question_example(example: Tensors) -> dict[str, Any]:
  """SQuAD of TFDS -> `question: <question> context: <context>`, as T5 was
  trained on it.

  Like T5's own task it puts spaces around ASCII punctuation, in the answers
  too.
  """
  question = _spaced(example["question"])
  context = _spaced(example["context"])
  text = tf.strings.join(["question: ", question, " context: ", context])
  return _example(example["id"], text, _spaced(example["answers"]["text"]))


def _spaced(text: Any) -> Any:
  text = tf.strings.regex_replace(text, r"([[:punct:]])", r" \1 ")
  return tf.strings.strip(tf.strings.regex_replace(text, r"\s+", " "))


def _example(name: Any, text: Any, references: Any) -> dict[str, Any]:
  return {
    "id": name,
    "inputs": text,
    "targets": references[0],
    "references": references,
  }


def cnn_dailymail(vocabulary: seqio.Vocabulary | str) -> str:
  """Registers CNN/DailyMail of TFDS, as `calm_cnn_dailymail`."""
  source = "cnn_dailymail:3.4.0"
  return _tfds(
    "cnn_dailymail", source, summarization_example, ["rouge_l"], vocabulary
  )


def wmt15_enfr(vocabulary: seqio.Vocabulary | str) -> str:
  """Registers WMT15 English to French of TFDS, as `calm_wmt15_enfr`."""
  source = "wmt15_translate/fr-en:1.0.0"
  return _tfds("wmt15_enfr", source, translation_example, _CORPUS, vocabulary)


def squad(vocabulary: seqio.Vocabulary | str) -> str:
  """Registers SQuAD 1.1 of TFDS, as `calm_squad`."""
  scores = ("token_f1", "exact_match")
  return _tfds(
    "squad", "squad/v1.1:3.0.0", question_example, scores, vocabulary
  )


def _tfds(
  name: str, tfds_name: str, preprocess: Any, metrics: Any, vocabulary: Any
) -> str:
  source = seqio.TfdsDataSource(tfds_name=tfds_name)
  mapped: Any = seqio.map_over_dataset(preprocess)
  return _register(f"calm_{name}", source, [mapped], vocabulary, metrics)


def _register(
  name: str,
  source: Any,
  preprocessors: Sequence[Callable[..., tf.data.Dataset]],
  vocabulary: seqio.Vocabulary | str,
  metrics: Sequence[str],
) -> str:
  if isinstance(vocabulary, str | os.PathLike):
    vocabulary = seqio.SentencePieceVocabulary(os.fspath(vocabulary))
  feature = seqio.Feature(vocabulary, add_eos=True)
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add(
    name,
    source,
    preprocessors=[
      *preprocessors,
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={"inputs": feature, "targets": feature},
    postprocess_fn=references_or_text,
    metric_fns=[metric_fn(metric) for metric in metrics],
  )
  return name
