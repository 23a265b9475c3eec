"""Checkpoints: a model (configuration, parameters, vocabulary) from disk, and
back.

Our own format is a directory:
  config.json            the fields of `network.T5Config`, the format's name,
                         and whether exits are trained, where that is known
  params.safetensors     leaves by "/"-joined path; float32 or bfloat16 (read as
  float32) vocabulary.json        the kind of the vocabulary and its digest
  (absent: there is none) vocabulary.model       the SentencePiece model, or
  tokenizer.json         the tokenizer of a Hugging Face folder
A folder of any format may also hold `exits.safetensors`: exit parts that were
learned beside its frozen weights, with their digest. `load` opens Hugging
Face's and T5X's folders too.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from calm import arguments
from calm.checkpoints import files, huggingface, t5x
from calm.data import vocabulary as vocabularies
from calm.t5 import limits, network, parameters, platforms

FORMAT = "calm checkpoint 1"
# The file of exit parts beside a base model, and its format.
EXITS = "exits.safetensors"
EXITS_FORMAT = "calm exits 1"
# The files of a base model that are read here; folders may hold weights in
# other formats too.
_BASE_FILES = (
  *("config.json", "params.safetensors", "vocabulary.json", "vocabulary.model"),
  *(
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
  ),
  *(
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
  ),
  *("added_tokens.json", "model-*-of-*.safetensors"),
)
# What `peft` saves of an adapter, alone or beside a model.
_ADAPTER_FILES = (
  "adapter_config.json",
  "adapter_model.safetensors",
  "adapter_model.bin",
)
# The small model inside this package.
PACKED = pathlib.Path(__file__).parents[1] / "assets"
_PIECES = vocabularies.SentencePieceVocabulary
# Kind of vocabulary, which `_RECORD` names -> its class, the file that holds
# it, its numbers.
_RECORD = "vocabulary.json"
_VOCABULARIES: Mapping[str, tuple[Any, str | None, tuple[str, ...]]] = {
  "sentencepiece": (_PIECES, "vocabulary.model", ("extra_ids",)),
  "tokenizer": (
    vocabularies.TokenizerVocabulary,
    "tokenizer.json",
    ("eos_id", "pad_id"),
  ),
  "bytes": (vocabularies.ByteVocabulary, None, ("extra_ids",)),
}
Vocabulary = vocabularies.Vocabulary
parameters_digest = arguments.checked()(parameters.digest)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A model as it was stored.

  Attributes:
    config: sizes and choices.
    params: its tree, of float32 numpy arrays.
    vocabulary: what is stored beside it, or None.
    exits_trained: whether layers before the last have learned to write: False
      in Hugging Face's models and T5X's own; None where it is not known.
  """

  config: network.T5Config
  params: dict[str, Any] = dataclasses.field(repr=False)
  vocabulary: Vocabulary | None = None
  exits_trained: bool | None = None


@arguments.checked()
def save(
  directory: str | pathlib.Path,
  params: Mapping[str, Any],
  config: network.T5Config,
  *,
  vocabulary: Vocabulary | None = None,
  storage_dtype: Literal["float32", "bfloat16"] = "float32",
  exits_trained: bool | None = None,
) -> None:
  """Writes our own format; an earlier checkpoint in `directory` is replaced
  only at the end.

  Args:
    directory: made if missing.
    params: the tree of `config`; checked before anything is written.
    vocabulary: stored in the directory, so that it is whole without other
      files.
    storage_dtype: 'float32', or 'bfloat16' for half the size.
    exits_trained: whether layers before the last have learned to write; None
      says nothing.

  Raises:
    ValueError: `params` is not the tree of `config` or not finite, the
      vocabulary is larger than the embedding, or `storage_dtype` is unknown.
    OSError: `directory` cannot be written.
  """
  directory = pathlib.Path(directory)
  parameters.check(params, config)
  writers = {}
  if vocabulary is not None:
    vocabularies.check_fits(vocabulary, config.vocab_size)
    writers |= _vocabulary_writers(vocabulary)
  writers["params.safetensors"] = files.safetensors_writer(
    parameters.flatten(params), storage_dtype
  )
  fields = dataclasses.asdict(config)
  if exits_trained is not None:
    fields["exits_trained"] = exits_trained
  writers["config.json"] = files.json_writer({"format": FORMAT, **fields})
  files.write_together(directory, writers)
  for name in {_RECORD, *(file for _, file, _ in _VOCABULARIES.values())} - {
    None,
    *writers,
  }:
    # Left by an earlier save with another vocabulary.
    (directory / str(name)).unlink(missing_ok=True)


@arguments.checked()
def load(
  path: str | pathlib.Path, *, exits: str | pathlib.Path | None = None
) -> Checkpoint:
  """Opens a checkpoint of any known format and checks it leaf by leaf.

  Args:
    path: a directory of our own format, of Hugging Face, or of T5X (the
      `checkpoint_N` folder, or the folder above it, whose newest is taken).
    exits: a file of exit parts (`save_exits`), or a folder that holds one; None
      takes the folder's own, where there is one. It replaces exit parts that
      the model brings.

  Raises:
    FileNotFoundError: `path`, or a file that belongs to it, is missing.
    ValueError: no known format, a damaged file, wrong leaves, exits of another
      base model, or a vocabulary larger than the embedding.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    kind = "a file" if path.exists() else "missing"
    raise FileNotFoundError(
      f"Expected `path` to be a checkpoint directory, got {str(path)!r}, "
      f"which is {kind}."
    )
  _refuse_adapters(path)
  platforms.require_platform()
  config, flat, vocabulary, trained = _read(path)
  params = parameters.unflatten(flat)
  if exits is not None or (path / EXITS).is_file():
    config, params = with_exits(
      config, params, path if exits is None else exits
    )
    trained = True
  else:
    parameters.check(params, config)
  if vocabulary is not None:
    vocabularies.check_fits(vocabulary, config.vocab_size)
  return Checkpoint(config, params, vocabulary, trained)


@arguments.checked()
def save_exits(
  file: str | pathlib.Path, leaves: Mapping[str, np.ndarray], base_digest: str
) -> None:
  """Writes exit parts that were learned beside a frozen model.

  Args:
    file: usually `EXITS` in the model's folder.
    leaves: {path: array}, paths as in the model's tree
      ("decoder/exit_translators/...").
    base_digest: `parameters.base_digest` of the model; `load` refuses them
      beside another.
  """
  file = pathlib.Path(file)
  metadata = {"format": EXITS_FORMAT, "base": base_digest}
  writer = files.safetensors_writer(leaves, "float32", **metadata)
  files.write_together(file.parent, {file.name: writer})


@arguments.checked()
def copy_base(source: str | pathlib.Path, target: str | pathlib.Path) -> None:
  """Copies the files of a base model byte for byte.

  Raises:
    ValueError: `source` is a T5X checkpoint.
  """
  source, target = pathlib.Path(source), pathlib.Path(target)
  if not (source / "config.json").is_file():
    raise ValueError(
      f"Expected a base model with a config.json, got {str(source)!r}; "
      "convert a T5X checkpoint"
      " by scripts/from_t5x.py."
    )
  found = (file for name in _BASE_FILES for file in sorted(source.glob(name)))

  def copy(file):
    return lambda path: shutil.copyfile(file, path)

  writers = {file.name: copy(file) for file in found if file.is_file()}
  files.write_together(target, writers)


@arguments.checked()
def with_exits(
  config: network.T5Config, params: Mapping[str, Any], exits: str | pathlib.Path
) -> tuple[network.T5Config, dict[str, Any]]:
  """(configuration, parameters) of a base model with the exits of a file, or of
  its folder.

  Args:
    config: of the base model.
    params: its tree; exit parts in it are replaced.
    exits: a file that `calm fit` wrote, or its folder.

  Raises:
    FileNotFoundError: there is none.
    ValueError: the exits are of other weights, or the file is of something
      else.
  """
  file = pathlib.Path(exits)
  file = file / EXITS if file.is_dir() else file
  if not file.is_file():
    expected = (
      f"Expected `exits` to be a file of exits, or a folder with {EXITS}"
    )
    raise FileNotFoundError(
      f"{expected}, got {str(file)!r}; `calm fit` writes one."
    )
  leaves, metadata = files.read_safetensors(file)
  stored = metadata.get("format")
  base = metadata.get("base")
  parts = tuple(f"decoder/{part}/" for part in parameters.EXIT_PARTS)
  if (
    stored != EXITS_FORMAT
    or not leaves
    or not all(path.startswith(parts) for path in leaves)
  ):
    raise ValueError(
      f"Expected {str(file)!r} to be exits of the format {EXITS_FORMAT!r}, "
      "got the format"
      f" {stored!r} with the leaves {sorted(leaves)[:1]}."
    )
  kept, _ = parameters.split(params)
  digest = parameters.digest(kept)
  if digest != base:
    raise ValueError(
      f"Expected the base model of {str(file)!r}, with the digest "
      f"{str(base)[:12]}..., got"
      f" {digest[:12]}...: another model, or one that was edited since; fit "
      "again."
    )
  with files.naming(file):
    config = dataclasses.replace(config, **parameters.exit_fields(leaves))
  made = parameters.unflatten({**parameters.flatten(kept), **leaves})
  parameters.check(made, config)
  return config, made


def _refuse_adapters(path: pathlib.Path) -> None:
  """ValueError where a folder holds an adapter, which transformers would add to
  the weights: without it the model is another.
  """
  for name in _ADAPTER_FILES:
    if (path / name).exists():
      raise ValueError(
        f"Expected a whole model in {str(path)!r}, got {name!r} of an adapter "
        "(LoRA), which is not read; merge it and save the result: "
        "PeftModel.from_pretrained(MODEL, ADAPTER).merge_and_unload()"
        ".save_pretrained(FOLDER)."
      )


def _read(
  path: pathlib.Path,
) -> tuple[
  network.T5Config, dict[str, np.ndarray], Vocabulary | None, bool | None
]:
  """(configuration, {path: leaf}, vocabulary, exits trained) of whichever
  format it is.
  """
  if (path / "config.json").is_file():
    fields = files.read_json(path / "config.json")
    if "model_type" in fields:
      config, flat = huggingface.read(path)
      return config, flat, huggingface.read_vocabulary(path), False
    trained = fields.pop("exits_trained", None)
    if trained not in (None, True, False):
      where = str(path / "config.json")
      raise ValueError(
        f"Expected `exits_trained` in {where!r} to be true or false, got "
        f"{trained!r}"
      )
    known = {field.name for field in dataclasses.fields(network.T5Config)}
    stored_format = fields.pop("format", None)
    if fields.get("per_layer_heads") is False:  # of earlier versions
      del fields["per_layer_heads"]
    unknown = sorted(set(fields) - known)
    if stored_format != FORMAT or unknown or "vocab_size" not in fields:
      raise ValueError(
        f"Expected a config.json with format {FORMAT!r} and fields of "
        "T5Config, got"
        f" {str(path)!r} with format {stored_format!r}, unknown fields "
        f"{unknown}; open it with"
        " the version of calm that wrote it."
      )
    with files.naming(path / "config.json"):
      config = network.T5Config(**limits.check(fields))
    flat, _ = files.read_safetensors(path / "params.safetensors")
    return config, flat, _read_vocabulary(path), trained
  found = t5x.find(path)
  if found is None:
    names = sorted(child.name for child in path.iterdir())
    got = f"got {str(path)!r} with {names[:6] or 'nothing in it'}"
    raise ValueError(
      f"Expected `path` to be a checkpoint of calm, Hugging Face or T5X, {got}."
    )
  flat = t5x.read(found)
  config = t5x.infer_config(flat)
  # T5X's own models have no exit parts: somebody trained those that are there.
  grown = any(getattr(config, part) for part in parameters.EXIT_PARTS)
  return config, flat, None, None if grown else False


def _vocabulary_writers(
  vocabulary: Vocabulary,
) -> dict[str, Callable[[pathlib.Path], Any]]:
  """Writers for `files.write_together`."""
  base: Any = getattr(vocabulary, "base", vocabulary)
  kind = next(
    k for k, (made_by, *_) in _VOCABULARIES.items() if isinstance(base, made_by)
  )
  _, name, numbers = _VOCABULARIES[kind]
  record = {
    "kind": kind,
    **{number: getattr(base, number) for number in numbers},
  }
  if isinstance(vocabulary, vocabularies.Renumbered):
    record["base_pad_id"] = vocabulary.base_pad_id
  record["digest"] = vocabulary.digest()
  writers = (
    {} if name is None else {name: lambda path: path.write_bytes(base.model)}
  )
  return {**writers, _RECORD: files.json_writer(record)}


def _read_vocabulary(directory: pathlib.Path) -> Vocabulary | None:
  """The vocabulary that was saved in a folder, or None; ValueError where it was
  exchanged.
  """
  if not (directory / _RECORD).is_file():
    return None
  record = files.read_json(directory / _RECORD)
  kind = str(record.get("kind"))
  if kind not in _VOCABULARIES:
    kinds = ", ".join(map(repr, _VOCABULARIES))
    raise ValueError(
      f"Expected {_RECORD} to be of {kinds}, got {kind!r} in "
      f"{str(directory)!r}."
    )
  made_by, name, numbers = _VOCABULARIES[kind]

  def whole(number):
    return limits.whole(number, record.get(number), 0, 2**31)

  with files.naming(directory / _RECORD):
    options: dict[str, Any] = {number: whole(number) for number in numbers}
    if name is not None:
      options["path"] = directory / name
    if made_by is _PIECES:
      options["padded"] = "base_pad_id" not in record
    made = made_by(**options)
    if "base_pad_id" in record:
      made = vocabularies.Renumbered(made, whole("base_pad_id"))
  digest = str(record.get("digest"))
  if name is not None and made.digest() != digest:
    raise ValueError(
      f"Expected {name} to have the digest {digest[:12]}... that was saved "
      "with it, got"
      f" {made.digest()[:12]}... in {str(directory)!r}; it was exchanged."
    )
  return made
