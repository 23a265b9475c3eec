"""Labels of some prompts, predictions of all: the mean is kept, whatever the predictions."""

import numpy as np
import pytest
from scipy import stats

from calm.calibrate import SequenceLosses, Support, calibrate
from calm.calibrate.losses import labelling


def made(generator, mean, size=400, probability=0.4, good=True):
  losses = (generator.random((size, 1)) < mean).astype(float)
  guess = np.clip(losses + generator.normal(0, 0.1, losses.shape), 0, 1) if good else 1 - losses
  chosen = labelling.choose(size, probability, seed=int(generator.integers(2**31)))
  hidden = np.where(chosen[:, None], losses, np.nan)
  return losses, labelling.with_predictions(
    SequenceLosses(hidden, [0.5]), guess, chosen, probability
  )


@pytest.mark.parametrize("good", [True, False])
def test_at_the_boundary_it_certifies_no_more_often_than_it_says(good):
  generator = np.random.default_rng(0)
  wrong = 0
  for _ in range(150):
    _, losses = made(generator, 0.2001, good=good)
    wrong += calibrate(losses, tolerance=0.2, error_rate=0.1).certified
  assert stats.binomtest(wrong, 150, 0.1, alternative="greater").pvalue > 1e-3


def test_good_predictions_save_labels_and_bad_ones_cost_power_alone():
  generator = np.random.default_rng(0)
  rates = dict(tolerance=0.2, error_rate=0.05)
  certified = {True: 0, False: 0}
  for good in certified:
    for _ in range(20):
      certified[good] += calibrate(made(generator, 0.08, good=good)[1], **rates).certified
  assert certified[True] >= 18 > certified[False]


def test_the_mean_is_kept_and_the_range_is_as_wide_as_declared():
  generator = np.random.default_rng(0)
  means = [made(generator, 0.3)[1].values.mean() for _ in range(200)]
  assert abs(np.mean(means) - 0.3) < 4 * np.std(means) / np.sqrt(200)
  losses, all_told = made(generator, 0.3, probability=1.0)
  np.testing.assert_array_equal(all_told.values, losses)
  assert (all_told.support.lower, all_told.support.upper) == (0.0, 1.0)
  _, some = made(generator, 0.3, probability=0.25, good=False)
  assert some.support.lower == -3.0 and some.support.upper == 4.0
  assert some.values.min() >= -3.0 and some.values.max() <= 4.0


def test_what_is_made_of_a_label_and_a_prediction_by_hand():
  signed = SequenceLosses([[1.0], [np.nan], [-1.0]], [0.5], Support(-1.0, 1.0))
  chosen = np.array([True, False, True])
  guess = np.array([[0.5], [0.25], [1.0]])  # the ends of the range are in it
  found = labelling.with_predictions(signed, guess, chosen, [0.25, 0.5, 1.0])
  np.testing.assert_array_equal(found.values, [[0.5 + 0.5 / 0.25], [0.25], [-1.0]])
  # The widest is that of the least probability: 2 / 0.25.
  assert found.support == Support(1.0 - 8.0, -1.0 + 8.0)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("binary", [True, False])
def test_only_labels_of_all_leave_losses_binary(share, binary):
  losses = SequenceLosses([[1.0], [0.0]], [0.5], Support(binary=binary))
  found = labelling.with_predictions(losses, [[0.0], [1.0]], np.ones(2, bool), share)
  assert found.support.binary == (binary and share == 1.0)
  wide = SequenceLosses([[1.0], [0.0]], [0.5], Support(0.0, 2.0))
  assert not labelling.with_predictions(
    wide, [[0.0], [1.0]], np.ones(2, bool), 1
  ).support.binary


def test_misuse_is_refused():
  losses = SequenceLosses(np.zeros((4, 1)), [0.5])
  flags = np.ones(4, bool)
  for guess, chosen, share, message in (
    (np.zeros((3, 1)), flags, 0.5, "`predicted` of shape"),
    (np.zeros((4, 1)), flags.astype(int), 0.5, "4,. flags"),
    (np.full((4, 1), 2.0), flags, 0.5, "`predicted` in the range"),
    (np.array([[0.5], [0.5], [0.5], [1.5]]), flags, 0.5, "`predicted` in the range"),
    (np.array([[0.5], [-0.5], [0.5], [0.5]]), flags, 0.5, "`predicted` in the range"),
    (np.zeros((4, 1)), flags, 0.0, "`probability` in"),
    (np.zeros((4, 1)), flags, [0.5, 0.5, 1.5, 1], "`probability` in"),
  ):
    with pytest.raises(ValueError, match=message):
      labelling.with_predictions(losses, guess, chosen, share)
