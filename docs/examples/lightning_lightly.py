"""SimCLR on pairs in PyTorch Lightning, with the loss and the projection head of Lightly.

The sampler chooses the pairs in an ordinary `DataLoader`; their views are made where Lightning has just put the batch.
"""

import sys

import pytorch_lightning as lightning
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from amimv.pipelines import ImageStore, PairSampler, PairViews, load_store


class SimCLR(lightning.LightningModule):
    def __init__(self, store: ImageStore) -> None:
        super().__init__()
        self.dataset, self.labels = TensorDataset(store.gather(torch.arange(len(store)))), store.labels
        self.views = PairViews("A(x)+N(y) | N(x)+A(y)", store.mean, store.std)
        stem = (nn.Conv2d(3, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU())
        body = (nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU())
        self.backbone = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head, self.loss = SimCLRProjectionHead(64, 64, 32), NTXentLoss(temperature=0.2)
        self.losses: list[float] = []

    def train_dataloader(self) -> DataLoader:
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        self.sampler = PairSampler(self.labels, 64 * world_size, "square-root", rank=rank, world_size=world_size)
        self.sampler.set_epoch(self.current_epoch)
        return DataLoader(self.dataset, batch_sampler=self.sampler)

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> tuple[tuple[Tensor, ...], ...]:
        anchors, partners = self.sampler.unflatten(batch[0])
        return self.views(anchors, partners)

    def training_step(self, sides: tuple[tuple[Tensor, ...], ...], batch_idx: int) -> Tensor:
        za, zb = (sum(self.head(self.backbone(view)) for view in side) for side in sides)
        loss = self.loss(za, zb)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 2e-3)


def main(steps: int = 100) -> list[float]:
    module = SimCLR(load_store("phantom"))
    trainer = lightning.Trainer(max_steps=steps, logger=False, use_distributed_sampler=False)
    trainer.fit(module)
    print(f"loss {module.losses[0]:.3f} to {module.losses[-1]:.3f} in {steps} steps")
    return module.losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
