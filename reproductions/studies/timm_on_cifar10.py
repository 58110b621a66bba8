"""A network of timm, patched by `eulernet.patch` and trained for some steps on CIFAR-10."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

import eulernet
from reproductions.data.cifar10 import CLASSES, MEAN, STD, Images
from reproductions.records import Record, environment

TITLE = "A network of timm on CIFAR-10"
SHOWN = 10  # steps over which the train loss is averaged, at the start and at the end


@dataclass(frozen=True)
class Config:
    """One training: SGD with momentum, no augmentation, no weight decay, random weights at the start."""

    model: str = "resnet18"
    h: float = 0.1
    steps: int = 100
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    seed: int = 0


def build(config: Config) -> nn.Module:
    """The patched network.

    timm's ResNets start with the last gamma of each branch at zero, where no h would show: here they start at one.
    """
    import timm  # only here: it takes seconds, and no other study wants it

    torch.manual_seed(config.seed)
    resnet = timm.models.is_model_in_modules(config.model, ["resnet"])
    model = timm.create_model(config.model, num_classes=CLASSES, **({"zero_init_last": False} if resnet else {}))
    patched: nn.Module = eulernet.patch(model, h=config.h, example_inputs=torch.zeros(2, 3, 32, 32))
    return patched


def run(
    config: Config,
    train: Images,
    test: Images,
    device: torch.device,
    progress: Callable[[str, int, int], None] = lambda doing, done, total: None,
) -> Record:
    """Test, train, test; `progress` is called with what is being done, how much of it is, and of how much."""
    started = time.perf_counter()
    model = build(config).to(device)
    steps = eulernet.steps(model)
    before = accuracy(model, test, device, progress)

    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=config.momentum)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.empty(0, dtype=torch.int64)
    losses = []
    model.train()
    for step in range(config.steps):
        while len(order) < config.batch_size:
            order = torch.cat([order, torch.randperm(len(train.labels), generator=generator)])
        batch, order = order[: config.batch_size], order[config.batch_size :]
        logits = model(normalise(train.pixels[batch], device))
        loss = nn.functional.cross_entropy(logits, train.labels[batch].to(device))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        progress(f"training, loss {losses[-1]:.3f}", step + 1, config.steps)

    return {
        "study": "cifar10",
        "config": asdict(config),
        "result": {
            "residual_steps": len(steps),
            "train_loss_first": sum(losses[:SHOWN]) / len(losses[:SHOWN]),
            "train_loss_last": sum(losses[-SHOWN:]) / len(losses[-SHOWN:]),
            "test_accuracy_before": before,
            "test_accuracy_after": accuracy(model, test, device, progress),
            "train_loss_curve": losses,
        },
        "seconds": time.perf_counter() - started,
        "environment": environment(device),
    }


@torch.no_grad()
def accuracy(
    model: nn.Module,
    images: Images,
    device: torch.device,
    progress: Callable[[str, int, int], None] = lambda doing, done, total: None,
) -> float:
    """The share of the images that the model classifies rightly, in evaluation mode."""
    model.eval()
    right = done = 0
    for pixels, labels in zip(torch.split(images.pixels, 500), torch.split(images.labels, 500), strict=True):
        right += int((model(normalise(pixels, device)).argmax(dim=1).cpu() == labels).sum())
        done += len(labels)
        progress("testing", done, len(images.labels))
    return right / done


def normalise(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 images to float32 on the device, with the mean and standard deviation of the training images taken off."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels.to(device) / 255 - mean) / std


def statements(record: Record) -> list[str]:
    """What was measured, in words."""
    config, result = record["config"], record["result"]
    return [
        f"{config['model']}: {result['residual_steps']} residual steps, h = {config['h']:g}.",
        f"Train loss, mean of the first and of the last {SHOWN} of {config['steps']} steps: "
        f"{result['train_loss_first']:.3f} -> {result['train_loss_last']:.3f}.",
        f"Test accuracy before and after: {result['test_accuracy_before']:.1%} -> {result['test_accuracy_after']:.1%}.",
    ]
