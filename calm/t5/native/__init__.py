"""What XLA:CPU computes slowly, as functions of this process that XLA calls.

XLA:CPU makes the small products of one query with its keys in one thread. Here they are calls
of a function (`attention_kernel`) that do a part of the heads each: more calls than XLA runs
one after another, so that the threads that it has share them. And it shares what is too small:
products of the few rows of a pass over drafts and a small model's matrices, whose second
thread takes longer to wake than to work (`product_kernel`, `greedy_kernel`). And every
operation takes longer than a small one's numbers: keys and values of all layers are written in
one call (`writes_kernel`), and what a text begins with is made in one (`zeros_kernel`).
Products of many rows in 8 bits scale their sums as they make them (`codes_kernel`).

The functions are written in LLVM's own language (`instructions`) and compiled in a tenth of a
second. Without llvmlite (`pip install 'calm-t5x[cpu]'`), or on another platform, XLA computes
all of it; texts are the same but for what a last bit decides.
"""

from calm.t5.native.attention import NativeAttention, attend, attends, takes
from calm.t5.native.calls import available
from calm.t5.native.codes import pack, product_in_8_bits
from calm.t5.native.heads import greedy
from calm.t5.native.logits import likeliest
from calm.t5.native.products import alone, product, small
from calm.t5.native.writes import write
from calm.t5.native.zeros import zeros_like

__all__ = [
  "NativeAttention",
  "alone",
  "attend",
  "attends",
  "available",
  "greedy",
  "likeliest",
  "pack",
  "product",
  "product_in_8_bits",
  "small",
  "takes",
  "write",
  "zeros_like",
]
