"""Any network on any data: frozen features, probes, training on the labels; a table and a file of results.

The network is a model of timm's, from scratch here, so that nothing is downloaded; with `pretrained=True` it gets
interesting. Choices (k, the penalty, the learning rate) are made on val, and test is looked at once.
"""

import sys
from typing import Any

import timm
import torch

from amimv.pipelines import load_store, long_tail
from amimv.trainers.evaluation import (
    Judged,
    best_supervised,
    extract_features,
    fit_linear,
    judge_features,
    majority,
    print_table,
    result_row,
    write_results,
)


def main(steps: int = 100) -> list[dict[str, Any]]:
    train, val, test = (load_store("phantom", split=split) for split in ("train", "val", "test"))
    train = train.subset(long_tail(train.labels, rho=20, total=700))
    stores = (train, val, test)
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=0)

    judged = [majority(*stores)]
    for name, model in (("raw pixels", None), ("resnet10t", network)):
        features = [extract_features(model, store, like=train) for store in stores]  # (N, D) each
        judged += judge_features(name, features, *stores)
    tuned, *scores = best_supervised(network, *stores, steps=steps, batch_size=64, lrs=(1e-3, 5e-3))
    judged.append(Judged("resnet10t", "fine-tuned", "", *scores))
    rows = [result_row(one, *stores) for one in judged]
    print_table(rows, "phantom (synthetic), test split, %")
    write_results(rows, "results.csv")

    features = [extract_features(tuned, store, like=train) for store in stores]
    probe = fit_linear(features[0], train.labels, features[1], val.labels, train.n_classes)  # kept for images to come
    best = probe.scores(features[2][:3]).max(dim=1)
    for label, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        print(f"{train.class_names[label]}, {score:.2f}")
    return rows


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
