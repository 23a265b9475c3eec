"""What functions that numba compiles to vector instructions share."""

from typing import Any

import numpy as np
from numba import njit

# Sums may be made in another order, so that they are made in vectors; NaN and infinity stay.
FAST = {"reassoc", "contract", "arcp", "nsz"}
_HALF, _ONE = np.float32(0.5), np.float32(1)
# Cephes' expf: e^x = 2^n e^r, |r| <= log(2) / 2, with a polynomial for e^r.
_LOWEST, _LOG2_E = np.float32(-87), np.float32(1.44269504)
_LOG_2_HIGH, _LOG_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_P5, _P4 = np.float32(1.98756915e-4), np.float32(1.39819995e-3)
_P3, _P2, _P1 = np.float32(8.3334519e-3), np.float32(4.16657959e-2), np.float32(0.166666655)


@njit(inline="always", fastmath=FAST)
def exp(x: Any) -> Any:
  """e^x of x <= 0, to 3e-7 of itself; e^-87 below -87. Unlike numpy's, in vectors."""
  x = _LOWEST if x < _LOWEST else x  # NaN stays
  n = np.int32(x * _LOG2_E - _HALF)  # towards 0, so to the nearest of x log2(e)
  r = x - np.float32(n) * _LOG_2_HIGH - np.float32(n) * _LOG_2_LOW
  p = ((((_P5 * r + _P4) * r + _P3) * r + _P2) * r + _P1) * r + _HALF
  return (p * r * r + r + _ONE) * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)
