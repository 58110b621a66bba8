"""CIFAR-10, from a local folder."""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reproductions.errors import DataError

CLASSES = 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of the training images, by channel
IMAGES_PER_FILE = 10_000
_SHAPE = (3, 32, 32)
_RECORD = 1 + math.prod(_SHAPE)  # a label, then the pixels
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST = ("test_batch",)
FILES = (*_TRAIN, *_TEST)
BINARY, PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"
_LAYOUTS = {BINARY: ".bin", PYTHON: ""}


@dataclass(frozen=True)
class Images:
    """Images, uint8 of shape (images, 3, 32, 32), and their labels 0 to 9, int64 of shape (images,)."""

    pixels: Tensor
    labels: Tensor


def load_cifar10(root: Path | str, download: bool = False) -> tuple[Images, Images]:
    """CIFAR-10, training and test images, from the official binary or python files.

    Args:
        root: the folder `cifar-10-batches-bin` or `cifar-10-batches-py`, or the folder that holds one of them.
        download: let torchvision download the python files into `root` where neither is there.

    Raises:
        DataError: a file is missing or damaged.
    """
    folder = folder_of(Path(root), download)
    suffix = _LAYOUTS[folder.name]
    names = [name + suffix for name in FILES]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}; expected are the six files {', '.join(names)}.")
    read = _read_binary if suffix else _read_python
    return _join([read(folder / (name + suffix)) for name in _TRAIN]), read(folder / (_TEST[0] + suffix))


def folder_of(root: Path, download: bool = False) -> Path:
    """The folder of the files, `root` or one in it.

    Raises:
        DataError: there is none.
    """
    if root.name in _LAYOUTS and root.is_dir():
        return root
    found = [root / name for name in _LAYOUTS if (root / name).is_dir()]
    if found:
        return found[0]
    if download:
        try:
            from torchvision.datasets import CIFAR10
        except ImportError:
            raise DataError("downloading needs torchvision; run: pip install 'eulernet[vision]'") from None
        try:
            CIFAR10(str(root), download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(f"torchvision could not download CIFAR-10 into {root}: {error}") from error
        return folder_of(root, download=False)
    raise DataError(
        f"{root} holds no CIFAR-10: expected is a folder {' or '.join(_LAYOUTS)} in it, as the archives of "
        "https://www.cs.toronto.edu/~kriz/cifar.html unpack to. With a network, --download lets torchvision fetch it."
    )


def _read_binary(path: Path) -> Images:
    """Records of one label byte and 3,072 pixel bytes: red, green and blue planes, row by row."""
    size, expected = path.stat().st_size, IMAGES_PER_FILE * _RECORD
    if size != expected:
        raise DataError(
            f"{path} has {size:,} bytes; expected are {expected:,}: {IMAGES_PER_FILE:,} records of {_RECORD:,} "
            "bytes, a label and 32 x 32 pixels of red, green and blue."
        )
    records = np.fromfile(path, dtype=np.uint8).reshape(-1, _RECORD)
    return _images(path, records[:, 1:], records[:, 0])


def _read_python(path: Path) -> Images:
    """A pickled dict of `data`, a uint8 array of shape (images, 3072), and `labels`, a list."""
    try:
        content: Any = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(f"{path} is not a whole pickle of arrays: {type(error).__name__}: {error}") from error
    pixels, labels = (content.get("data"), content.get("labels")) if isinstance(content, dict) else (None, None)
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list):
        raise DataError(f"{path} holds no CIFAR-10 batch: expected is a dict with an array 'data' and a list 'labels'.")
    expected = (IMAGES_PER_FILE, _RECORD - 1)
    if pixels.shape != expected or pixels.dtype != np.uint8 or len(labels) != len(pixels):
        raise DataError(
            f"{path} holds 'data' of shape {pixels.shape} and dtype {pixels.dtype} with {len(labels):,} labels; "
            f"expected are shape {expected}, uint8 and {IMAGES_PER_FILE:,} labels."
        )
    return _images(path, pixels, np.asarray(labels))


class _ArrayUnpickler(pickle.Unpickler):
    """Loads arrays and plain values, and refuses to run anything else that a file may name."""

    _ALLOWED = {  # noqa: RUF012
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # its name before NumPy 2
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _images(path: Path, pixels: np.ndarray, labels: np.ndarray) -> Images:
    bad = np.flatnonzero((labels < 0) | (labels >= CLASSES))
    if len(bad):
        raise DataError(
            f"{path}: image {bad[0]} has the label {labels[bad[0]]}; expected are labels from 0 to {CLASSES - 1}."
        )
    return Images(torch.from_numpy(pixels.reshape(-1, *_SHAPE).copy()), torch.from_numpy(labels.astype(np.int64)))


def _join(parts: list[Images]) -> Images:
    return Images(torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts]))
