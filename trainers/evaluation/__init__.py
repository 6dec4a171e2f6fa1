"""How good features are: of any network, on any store, without a run or its settings.

A run's own evaluation, which composes these, is in `amimv.trainers.evaluation.run`.
"""

from amimv.trainers.evaluation.features import build_random, extract_features
from amimv.trainers.evaluation.metrics import Scores, class_thirds, compute_scores
from amimv.trainers.evaluation.probes import balanced_accuracy, knn_probe, knn_scores, linear_probe
from amimv.trainers.evaluation.results import COLUMNS, ORDER, Judged, print_table, write_results
from amimv.trainers.evaluation.supervised import best_supervised, train_supervised

__all__ = [
    "COLUMNS",
    "ORDER",
    "Judged",
    "Scores",
    "balanced_accuracy",
    "best_supervised",
    "build_random",
    "class_thirds",
    "compute_scores",
    "extract_features",
    "knn_probe",
    "knn_scores",
    "linear_probe",
    "print_table",
    "train_supervised",
    "write_results",
]
