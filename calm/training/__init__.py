"""Stage one (Eq. 6) and stage two (the exit classifier): objectives, updates, runs."""

from calm.training.loop import History, Listener, fit
from calm.training.saving import check_writable, checkpointer, restore, save
from calm.training.updates import (
  Schedule,
  TrainConfig,
  TrainState,
  adafactor,
  adam,
  init_params,
  init_state,
  make_eval_fn,
  make_optimizer,
  make_train_step,
)

__all__ = [
  "History",
  "Listener",
  "Schedule",
  "TrainConfig",
  "TrainState",
  "adafactor",
  "adam",
  "check_writable",
  "checkpointer",
  "fit",
  "init_params",
  "init_state",
  "make_eval_fn",
  "make_optimizer",
  "make_train_step",
  "restore",
  "save",
]
