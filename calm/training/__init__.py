"""Stage one (Eq. 6) and stage two (the exit classifier): objectives, updates, runs."""

from calm.training.loop import History, Listener, check_writable, fit, read_history
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
  "configs",
  "distillation",
  "fit",
  "init_params",
  "init_state",
  "losses",
  "make_eval_fn",
  "make_optimizer",
  "make_train_step",
  "objectives",
  "read_history",
  "run",
  "sources",
]
