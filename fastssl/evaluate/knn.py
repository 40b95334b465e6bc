"""k-nearest-neighbour classification with frozen features.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, section 3.4: cosine
similarity, each neighbour votes for its label with weight exp(cosine / T). Majority vote is the limit T -> infinity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastssl.evaluate.base import Evaluation, Results, Task
from loaders.errors import UserError


@dataclass(kw_only=True)
class Knn(Evaluation):
    """k-nearest-neighbour classification"""

    k: tuple[int, ...] = (10, 20, 100, 200)
    """Neighbours that vote; several values are all reported."""
    temperature: float = 0.07
    """T of the weighted vote, exp(cosine / T)."""
    vote: Literal["weighted", "majority", "both"] = "both"
    """How neighbours vote."""

    def check(self, task: Task) -> None:
        """Raise UserError for more neighbours than there are images."""
        for k in self.k:
            if k > len(task.train):
                raise UserError(f"--k {k}: {task.train.path} holds only {len(task.train)} images")

    def run(self, task: Task) -> Results:
        """Classify the validation images of a task by their neighbours among its training images."""
        return accuracy(task.features(task.train), task.features(task.val), self)


def classify(
    bank_ND: Tensor,
    bank_label_N: Tensor,
    query_MD: Tensor,
    *,
    k: int,
    temperature: float,
    vote: str = "weighted",
    num_classes: int | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Class scores [M, C] of unit-length queries by their k nearest unit-length neighbours in the bank.

    Ties are broken in favour of the class with the nearer neighbours (then the lower class number).
    """
    if k > len(bank_ND):
        raise UserError(f"k = {k} neighbours asked of {len(bank_ND)} images: use a smaller --k")
    num_classes = num_classes or int(bank_label_N.max()) + 1
    scores = []
    for query in query_MD.split(chunk):
        cosine, nearest = (query @ bank_ND.T).topk(k, dim=1)
        # Subtracting the largest cosine changes no vote and keeps exp finite for small T.
        weight = torch.exp((cosine - cosine[:, :1]) / temperature) if vote == "weighted" else torch.ones_like(cosine)
        label = bank_label_N[nearest]
        score = torch.zeros(len(query), num_classes, device=query.device, dtype=torch.float64)
        score.scatter_add_(1, label, weight.double())
        # Majority votes tie often: cosines, far below one vote each, decide.
        score.scatter_add_(1, label, cosine.double().clamp(min=0) * 1e-9)
        scores.append(score)
    return torch.cat(scores)


def top_k_accuracy(scores_MC: Tensor, label_M: Tensor, k: int) -> float:
    """Share of rows, in %, whose label is among the k best scores (k is cut to the number of classes)."""
    best = scores_MC.topk(min(k, scores_MC.shape[1]), dim=1).indices
    return 100.0 * (best == label_M[:, None]).any(1).double().mean().item()


def accuracy(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], settings: Knn) -> Results:
    """Accuracies in % per setting, `{"weighted k=20": {"top1": ..., "top5": ...}}`, from (features, labels) pairs."""
    (bank, bank_label), (query, label) = train, val
    num_classes = int(max(bank_label.max(), label.max())) + 1
    votes = ("weighted", "majority") if settings.vote == "both" else (settings.vote,)
    result = {}
    for vote in votes:
        for k in settings.k:
            scores = classify(
                bank, bank_label, query, k=k, temperature=settings.temperature, vote=vote, num_classes=num_classes
            )
            name = f"{vote} k={k}"
            result[name] = {"top1": top_k_accuracy(scores, label, 1), "top5": top_k_accuracy(scores, label, 5)}
    return result
