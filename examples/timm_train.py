"""The shape of timm's own `train.py`, made of timm's public parts, with one line added: `eulernet.patch`.

On random images, in seconds: `python examples/timm_train.py`. With `--resume output/last.pth.tar` it goes on with the
steps that the checkpoint holds. Needs `pip install "eulernet[timm]"`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, NativeScaler, accuracy, random_seed
from torch import nn
from torchvision.datasets import FakeData

import eulernet

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="test_resnet")
parser.add_argument("--h", type=float, default=0.1)
parser.add_argument("--resume", default="")
parser.add_argument("--output", default="output")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--opt", default="adamw")
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--weight-decay", type=float, default=0.05)
parser.add_argument("--sched", default="cosine")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--warmup-epochs", type=int, default=1)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--images", type=int, default=32)
parser.add_argument("--num-classes", type=int, default=10)
parser.add_argument("--model-ema-decay", type=float, default=0.9)


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    args = parser.parse_args(arguments)
    random_seed(0)
    device = torch.device(args.device)
    model = timm.create_model(args.model, num_classes=args.num_classes)
    eulernet.patch(model, h=Path(args.resume) if args.resume else args.h)  # the added line
    model.to(device)

    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    loss_scaler = NativeScaler(device=device.type) if device.type == "cuda" else None
    start_epoch = 0
    if args.resume:
        start_epoch = resume_checkpoint(model, args.resume, optimizer, loss_scaler, weights_only=False) or 0
    model_ema = ModelEmaV3(model, decay=args.model_ema_decay)

    config = resolve_data_config(model=model)
    size = config["input_size"]
    loaders = [
        create_loader(
            FakeData(args.images, size, args.num_classes, random_offset=offset),
            size,
            args.batch_size,
            is_training=offset == 0,
            use_prefetcher=False,
            num_workers=0,
            device=device,
        )
        for offset in (0, args.images)
    ]
    train_loader, eval_loader = loaders
    scheduler, epochs = create_scheduler_v2(
        optimizer, args.sched, args.epochs, warmup_epochs=args.warmup_epochs, updates_per_epoch=len(train_loader)
    )
    loss_fn = LabelSmoothingCrossEntropy()
    Path(args.output).mkdir(exist_ok=True)
    saver = CheckpointSaver(model, optimizer, args, model_ema, loss_scaler, checkpoint_dir=args.output)
    if start_epoch:
        scheduler.step(start_epoch)

    for epoch in range(start_epoch, epochs):
        loss = train_one_epoch(model, train_loader, optimizer, loss_fn, model_ema, loss_scaler, device)
        top1 = validate(model_ema.module, eval_loader, device)
        scheduler.step(epoch + 1, top1)
        saver.save_checkpoint(epoch, metric=top1)
        print(f"epoch {epoch}: loss {loss:.3f}, top-1 of the average {top1:.1f} %")
    return model


def train_one_epoch(
    model: nn.Module,
    loader: Any,
    optimizer: torch.optim.Optimizer,
    loss_fn: nn.Module,
    model_ema: Any,
    loss_scaler: Any,
    device: torch.device,
) -> float:
    model.train()
    losses = AverageMeter()
    for images, target in loader:
        images, target = images.to(device), target.to(device)
        with torch.autocast(device.type, enabled=loss_scaler is not None):
            loss = loss_fn(model(images), target)
        optimizer.zero_grad()
        if loss_scaler is not None:
            loss_scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        else:
            loss.backward()
            optimizer.step()
        model_ema.update(model)
        losses.update(loss.item(), len(images))
    return float(losses.avg)


@torch.no_grad()
def validate(model: nn.Module, loader: Any, device: torch.device) -> float:
    model.eval()
    top1 = AverageMeter()
    for images, target in loader:
        (right,) = accuracy(model(images.to(device)), target.to(device))
        top1.update(right.item(), len(images))
    return float(top1.avg)


if __name__ == "__main__":
    main()
