"""Early stopping: transformers' own callback, which a resumed run goes on counting with.

Source: `transformers/trainer_callback.py` (EarlyStoppingCallback; the Trainer keeps `state.best_metric`).
"""

from collections.abc import Sequence

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from halfbyte.recipe.schema import Train
from halfbyte.runs.checkpoint import metric_name
from halfbyte.types import Document


class EarlyStopping(EarlyStoppingCallback):
    """Stops after `early_stopping_patience` evaluations that were not better. `earlier`: rows of the evaluations of
    this run's earlier processes; what was counted then is counted again, since a checkpoint can be older than they."""

    def __init__(self, train: Train, earlier: Sequence[Document]) -> None:
        super().__init__(train.early_stopping_patience, train.early_stopping_threshold)
        metric = metric_name(train)
        self.earlier = [row[metric] for row in earlier if metric in row]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        state.best_metric = None
        for value in self.earlier:
            self.check_metric_value(args, state, control, value)
            better = max if args.greater_is_better else min
            state.best_metric = value if state.best_metric is None else better(value, state.best_metric)

    @property
    def stops(self) -> bool:
        return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)
