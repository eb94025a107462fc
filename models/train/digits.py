# mypy: ignore-errors
# The `train` extra (torch) is not part of the type-checked environment.
"""Train tiny-cnn: `python -m qgraph.models.train.digits`. Under a minute on one core."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from qgraph.models import data
from qgraph.models.shapes import CLASSES, CNN, CNN_EPSILON, ConvLayer
from qgraph.models.train import store

EPOCHS, BATCH, RATE = 30, 64, 3e-3


class Layer(nn.Module):
    """One row of the table in `qgraph.models.shapes`."""

    def __init__(self, layer: ConvLayer) -> None:
        super().__init__()
        self.layer = layer
        self.conv = nn.Conv2d(
            layer.inputs,
            layer.outputs,
            layer.kernel,
            layer.stride,
            padding=layer.kernel // 2,
            groups=layer.groups,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(layer.outputs, eps=CNN_EPSILON)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """x: [batch, inputs, h, w] -> [batch, outputs, h / stride, w / stride]."""
        x = self.bn(self.conv(x))
        if residual is not None:
            x = x + residual
        return {"relu": F.relu, "clip": F.relu6, "none": nn.Identity()}[self.layer.activation](x)


class Cnn(nn.Module):
    """image [batch, 1, 8, 8] -> logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        for layer in CNN:
            self.add_module(layer.name, Layer(layer))
        self.classifier = nn.Linear(CNN[-1].outputs, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 1, 8, 8] -> [batch, 10]."""
        outputs = {}
        for layer in CNN:
            x = outputs[layer.name] = getattr(self, layer.name)(x, outputs.get(layer.adds))
        return self.classifier(x.mean((2, 3)))


def main() -> None:
    """Train for a fixed number of epochs, store the weights and record the accuracy."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels = map(torch.from_numpy, data.digits(held_out=False))
    model = Cnn()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    steps = EPOCHS * (len(images) // BATCH)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    random = np.random.default_rng(0)
    for _ in range(steps):
        rows = torch.from_numpy(random.integers(0, len(images), BATCH))
        loss = F.cross_entropy(model(_shift(images[rows], random)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    store.freeze(model)
    parameters = sum(p.numel() for p in model.parameters())
    reached = _accuracy(model)
    store.save("tiny-cnn", model)
    store.record("tiny-cnn", accuracy=reached, parameters=parameters)
    print(f"tiny-cnn: accuracy {reached:.4f}, {parameters} parameters")


def _shift(images: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Move the whole batch by at most one pixel each way, zeros coming in."""
    down, right = random.integers(0, 3, 2)
    padded = F.pad(images, (1, 1, 1, 1))
    return padded[:, :, down : down + 8, right : right + 8]


def _accuracy(model: nn.Module) -> float:
    images, labels = map(torch.from_numpy, data.digits(held_out=True))
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
