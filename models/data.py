"""Held-out data for the reference models, the same on every machine.

Decoders: the last tenth of the token stream, committed. Digits: scikit-learn carries the images; a
fixed permutation decides which fifth is held out.
"""

import numpy as np
import numpy.typing as npt

from qgraph.models import checkpoint

Images = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

DIGITS_HELD_OUT = 360


def eval_tokens() -> Integers:
    """Return the held-out token ids, [T] int64, T = 16 035."""
    tokens: npt.NDArray[np.uint16] = np.load(checkpoint.HELD_OUT_TOKENS)
    return tokens.astype(np.int64)


def digits(*, held_out: bool) -> tuple[Images, Integers]:
    """Return one part of the digits: images [N, 1, 8, 8] float32 in [0, 1] and labels [N]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn, which is missing here. "
            "Install it with: pip install 'qgraph[test]'"
        ) from error
    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.images))
    chosen = order[-DIGITS_HELD_OUT:] if held_out else order[:-DIGITS_HELD_OUT]
    images = (raw.images[chosen, None] / 16).astype(np.float32)
    return images, raw.target[chosen].astype(np.int64)
