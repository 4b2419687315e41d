"""What a query finds: recall, reciprocal rank and nDCG of what fits it, among all candidates. No torch.

What: places are counted from the nearest on; a candidate as near as what fits counts behind it. `recall_k`: something
that fits is among the k nearest; nDCG is of all that fits, worth the same.
Source: Järvelin and Kekäläinen, ACM TOIS 20 (2002); sentence-transformers' `InformationRetrievalEvaluator`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CUTS, TIE = (1, 5, 10), 1e-6
NAMES = (*(f"recall_{k}" for k in CUTS), "mrr", f"ndcg_{CUTS[-1]}")


def places(alike: NDArray[np.float32], fitting: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """The places of all that fits, from 0, ascending. alike: of each candidate, (m,)."""
    near, rest = np.sort(alike[np.asarray(fitting)])[::-1], np.delete(alike, fitting)
    return np.array([(rest > value + TIE).sum() for value in near]) + np.arange(len(near))


def values(places: NDArray[np.int64]) -> dict[str, float]:
    first, most = int(places[0]), CUTS[-1]
    gain, ideal = ((1 / np.log2(at[at < most] + 2.0)).sum() for at in (places, np.arange(len(places))))
    return dict(zip(NAMES, (*(float(first < k) for k in CUTS), 1 / (first + 1), gain / ideal), strict=True))
