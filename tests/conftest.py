"""What every test runs under."""

from __future__ import annotations

import os

# Before numpy is loaded, and for the workers of pytest-xdist and the processes that tests start. The matrices of tests
# are small: a second thread of OpenBLAS only waits, and costs 10 times the processor time while the cores are busy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
