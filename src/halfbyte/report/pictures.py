"""What a page draws of a run's labels: the confusion matrix, and how often it is right where it is so sure.

Cost: a cell for each pair of labels, of at most `MOST` labels, those with the most rows.
"""

import numpy as np
from markupsafe import Markup

from halfbyte.report import plots
from halfbyte.report.series import Series
from halfbyte.types import Document

MOST = 30


def of_scores(scores: Document) -> list[Markup]:
    """None where no labels were scored."""
    side = (scores.get("sides") or {}).get("adapter") or {}
    names, pictures = [str(name) for name in scores.get("labels") or ()], list[Markup]()
    if confusion := side.get("confusion"):
        counts = np.array(confusion, float)
        some = np.sort(np.argsort(-counts.sum(1), kind="stable")[:MOST])
        few = [names[i] for i in some]
        cells = np.where(counts > 0, counts, np.nan)[np.ix_(some, some)]
        pictures.append(plots.heat_map("Rows by label (down) and prediction (across)", few, few, cells.tolist()))
    if bins := side.get("reliability"):
        sure = np.array([one["sure"] for one in bins])
        right = np.array([one["right"] for one in bins], float)
        curves = [plots.Curve("right", Series(sure, right), "eval"), plots.Curve("sure", Series(sure, sure), "plan")]
        pictures.append(plots.svg(plots.Chart("How often it is right", "share", "probability", curves, from_zero=True)))
    return pictures
