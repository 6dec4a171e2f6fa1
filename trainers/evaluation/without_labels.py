"""How good frozen features are, as far as that can be said without a label: for ranking runs where there are none.

Whether they rank runs as a linear probe does is not yet measured.
"""

import warnings
from math import sqrt

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.functional import normalize

from amimv.pipelines.images import spaced
from amimv.pipelines.rng import library_seed
from amimv.trainers.evaluation.probes import knn_scores

#: Images that RankMe looks at: more than most features have dimensions, and a Gram matrix of seconds.
RANKED = 2048
#: Images that k-means looks at, so that its cost is bounded.
CLUSTERED = 2**14
#: Neighbours of `cluster_knn`, the middle one of those that `fit_knn` chooses from.
NEIGHBOURS = 20


def rankme(embeddings: Tensor, eps: float = 1e-7) -> float:
    """Effective rank of embeddings ``(N, D)`` (Garrido et al. 2023, arXiv 2210.02885, equations 1 and 2).

    The exponential of the entropy of the singular values, each divided by their sum, plus ``eps``: from 1, where all
    embeddings lie on a line, to min(N, D), where all directions are used alike. The singular values are the roots of
    the eigenvalues of the smaller Gram matrix, in ``float64``.
    """
    z = embeddings.double()
    gram = z.T @ z if z.shape[0] > z.shape[1] else z @ z.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + eps
    return float(torch.exp(-(shares * shares.log()).sum()))


def cluster_knn(train: Tensor, val: Tensor, views: Tensor, seed: int = 0) -> float:
    """How well nearest neighbours tell, from an augmented view of an unseen image, the cluster that the image lies in.

    All features are divided by their length. k-means cuts those of the training images into ``K = round(sqrt(N / 2))``
    clusters (the rule of thumb of Mardia, Kent and Bibby, "Multivariate Analysis", 1979), whose mean size,
    ``sqrt(2 N)``, is above the 20 neighbours from 200 images on. ``c_i`` is the cluster whose centre is nearest to
    image ``i`` of val, ``p_i`` what `knn_scores` with 20 neighbours of the training images, by cosine, says of its
    augmented view. Over the clusters in which val has images (``I_c`` of them in cluster ``c``), ``M`` in number::

        score = sum over c of (share of I_c with p_i = c) / (M + E)

    where ``E`` of the ``K`` clusters stayed empty in training, because there are fewer distinct features than
    clusters: otherwise a network that says the same of all images would have the best score, 1, instead of ``1 / K``.
    Without that it is the balanced accuracy; chance is about ``1 / K``.

    After Cluster Learnability, the accuracy with which kNN says the clusters of k-means for held-out images (Lu et al.
    2023, "Using representation expressiveness and learnability to evaluate self-supervised learning methods", TMLR,
    arXiv 2206.01251). This project's own are the augmented view, the mean over clusters, the correction for empty ones
    and ``K``. Scores compare runs on the same images with the same augmentation alone.

    Args:
        train: ``(N, D)`` features of the normalised views of training images; of more than 16,384 as many, evenly
            spaced, are looked at.
        val, views: ``(M, D)`` features of the normalised and augmented views of other images.
        seed: of the starts of k-means.

    Returns:
        In [0, 1]; the same in every call on a CPU, whatever the number of threads.

    Raises:
        InputError: features that are empty, not finite, or of different widths.
    """
    train = train[spaced(len(train), CLUSTERED, train.device)]
    k = max(1, round(sqrt(len(train) / 2)))
    rows, queries = (normalize(x.float(), dim=1).cpu().numpy() for x in (train, val))
    # Several threads would add up centres in whatever order they finish; fewer clusters than asked for are counted.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        kmeans = KMeans(k, n_init=1, random_state=library_seed(seed)).fit(rows)
        own, truth = (torch.from_numpy(one).long() for one in (kmeans.labels_, kmeans.predict(queries)))
    scores = knn_scores(train, own.to(train.device), views, k, min(NEIGHBOURS, len(train)))
    right = (scores.argmax(dim=1).cpu() == truth).double()
    counts = torch.bincount(truth, minlength=k)
    recalls = torch.bincount(truth, right, minlength=k)[counts > 0] / counts[counts > 0]
    empty = k - len(own.unique())
    return float(recalls.sum() / (len(recalls) + empty))


@torch.inference_mode()
def judge_without_labels(
    train: Tensor, val: Tensor, views: Tensor, seed: int = 0, projector: nn.Module | None = None
) -> dict[str, float]:
    """The scores of one network's features, by their columns in ``results.csv``.

    Args:
        train, val, views, seed: as for `cluster_knn`.
        projector: what the training put behind the backbone, where it is at hand; in evaluation mode during the call.

    Returns:
        ``rankme`` (of up to 2,048 training images, evenly spaced), with a projector ``rankme_embeddings`` (of what it
        makes of them), and ``cluster_knn``; without those that are undefined, as numbers are not finite.
    """
    found: dict[str, float] = {}
    ranked = train[spaced(len(train), RANKED, train.device)]
    if ranked.isfinite().all():
        found["rankme"] = rankme(ranked)
    if projector is not None and (embeddings := embed(projector, ranked)).isfinite().all():
        found["rankme_embeddings"] = rankme(embeddings)
    if all(bool(x.isfinite().all()) for x in (train, val, views)):
        found["cluster_knn"] = cluster_knn(train, val, views, seed)
    return found


def embed(projector: nn.Module, features: Tensor) -> Tensor:
    """What a projector makes of features ``(N, D)`` in evaluation mode; it is left in the mode that it was in."""
    was_training = projector.training
    embeddings: Tensor = projector.eval()(features)
    projector.train(was_training)
    return embeddings
