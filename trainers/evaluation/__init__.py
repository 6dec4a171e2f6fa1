"""How good features are: of any network, on any store, without a run or its settings.

A run's own evaluation, which composes these, is in `amimv.trainers.evaluation.run`.
"""

from amimv.trainers.evaluation.features import build_random, extract_features, stream_features
from amimv.trainers.evaluation.metrics import Scores, balanced_accuracy, class_thirds, compute_scores
from amimv.trainers.evaluation.probes import (
    KnnProbe,
    LinearProbe,
    fit_knn,
    fit_linear,
    knn_probe,
    knn_scores,
    linear_probe,
)
from amimv.trainers.evaluation.results import (
    COLUMNS,
    ORDER,
    Judged,
    judge_features,
    majority,
    print_table,
    result_row,
    write_results,
)
from amimv.trainers.evaluation.supervised import best_supervised, classify, train_supervised
from amimv.trainers.evaluation.without_labels import cluster_knn, judge_without_labels, rankme

__all__ = [
    "COLUMNS",
    "ORDER",
    "Judged",
    "KnnProbe",
    "LinearProbe",
    "Scores",
    "balanced_accuracy",
    "best_supervised",
    "build_random",
    "class_thirds",
    "classify",
    "cluster_knn",
    "compute_scores",
    "extract_features",
    "fit_knn",
    "fit_linear",
    "judge_features",
    "judge_without_labels",
    "knn_probe",
    "knn_scores",
    "linear_probe",
    "majority",
    "print_table",
    "rankme",
    "result_row",
    "stream_features",
    "train_supervised",
    "write_results",
]
