"""What words alone reach on the tickets: TF-IDF and logistic regression, on the example's own rows.

scikit-learn's own defaults, with the strength of its regularisation and the kind of n-grams chosen by cross-validation
on the training rows; beside it what a run with a head has, from its `eval/scores.json`.

    python benchmarks/tickets.py [RUN]        # needs scikit-learn
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline

from halfbyte.recipe.evaluation import Eval
from halfbyte.scoring import labels

TICKETS = Path(__file__).parents[1] / "examples" / "tickets"


def rows(split: str) -> tuple[list[str], list[str]]:
    with (TICKETS / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        every = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    return [text for text, _ in every], [label for _, label in every]


def main() -> None:
    texts, names = rows("train")
    words = Pipeline([("tfidf", TfidfVectorizer(sublinear_tf=True)), ("lr", LogisticRegression(max_iter=2000))])
    grams = [("word", (1, 1)), ("word", (1, 2)), ("char_wb", (2, 5))]
    grid = [
        {"tfidf__analyzer": [kind], "tfidf__ngram_range": [spread], "lr__C": [10.0, 100.0]} for kind, spread in grams
    ]
    search = GridSearchCV(words, grid, cv=3).fit(texts, names)
    test, truth = rows("test")
    every = search.predict_proba(test)
    have = [[name == label for name in search.classes_] for label in truth]
    import numpy as np

    scored = labels.of_labels(every, np.array(have), Eval(), several=False)["scores"]
    table = {"TF-IDF + logistic regression": scored}
    if len(sys.argv) > 1:
        sides = json.loads((Path(sys.argv[1]) / "eval" / "scores.json").read_text())["sides"]
        table |= {name: side["scores"] for name, side in sides.items()}
    print(f"chosen by cross-validation: {search.best_params_}")
    for name, scores in table.items():
        shown = ("{} {:.3f} [{:.3f}, {:.3f}]".format(n, v["value"], *v["interval"]) for n, v in scores.items())
        print(f"{name:30}", "  ".join(shown))


if __name__ == "__main__":
    main()
