"""Noise on data, drawn once: mosaics and Gaussian noise on images, random letters in texts, wrong labels.

The paper names the kinds; the generator of its mosaics and the levels of all are unknown, and chosen here.
"""

from __future__ import annotations

import torch
from einops import reduce, repeat
from torch import Tensor

IMAGES, TEXTS = ("mosaic", "gaussian"), ("letters",)
KINDS = (*IMAGES, *TEXTS, "labels")


def mosaic(images: Tensor, side: int) -> Tensor:
    """Replace the tiles of `side` x `side` pixels by their mean colours.

    Args:
        images: uint8 of shape (images, channels, height, width); `side` divides height and width.
        side: of a tile, in pixels; 1 leaves the images as they are.

    Example:
        >>> mosaic(torch.tensor([[[[0, 10], [20, 30]]]], dtype=torch.uint8), 2).tolist()
        [[[[15, 15], [15, 15]]]]
    """
    means = reduce(images.float(), "n c (y a) (x b) -> n c y x", "mean", a=side, b=side).round().to(torch.uint8)
    tiles: Tensor = repeat(means, "n c y x -> n c (y a) (x b)", a=side, b=side)
    return tiles


def gaussian(images: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise to uint8 images; `std` is its standard deviation as a share of the range of a pixel."""
    noise = torch.randn(images.shape, generator=generator) * (255 * std)
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def letters(texts: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Make `int(share * length)` places of each text, drawn with replacement, a random letter from a to z.

    Args:
        texts: numbers of letters, uint8 of shape (texts, places), padded with zeros, which are not part of the text.
        share: of the length of the text.
        generator: where the randomness comes from.
    """
    lengths = (texts != 0).sum(dim=1)
    noisy, longest = texts.clone(), int(share * int(lengths.max()))
    places = (torch.rand(len(texts), longest, generator=generator) * lengths[:, None]).long()
    drawn = torch.randint(1, 27, places.shape, generator=generator, dtype=torch.uint8)
    counts = (share * lengths.double()).long()
    row, column = torch.nonzero(torch.arange(longest) < counts[:, None], as_tuple=True)
    noisy[row, places[row, column]] = drawn[row, column]
    return noisy


def labels(right: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Make a `share` of the labels, rounded down, another class, each of the others alike."""
    wrong = torch.randperm(len(right), generator=generator)[: int(share * len(right))]
    shift = torch.randint(1, classes, wrong.shape, generator=generator)
    noisy = right.clone()
    noisy[wrong] = (right[wrong] + shift) % classes
    return noisy


def corrupt(inputs: Tensor, kind: str, level: float, seed: int) -> Tensor:
    """Inputs with noise of a kind, the same for the same seed; level 0 leaves them as they are."""
    if not level:
        return inputs
    generator = torch.Generator().manual_seed(seed)
    if kind == "mosaic":
        return mosaic(inputs, int(level))
    return gaussian(inputs, level, generator) if kind == "gaussian" else letters(inputs, level, generator)
