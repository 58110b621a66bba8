"""The networks, ordinary modules with h = 1; `eulernet.patch` gives them their step factor."""

from reproductions.models.mlp import ResidualBlock, ResidualMLP
from reproductions.models.resnet import CifarResNet, ConvBlock2d
from reproductions.models.vdcnn import VDCNN, ConvBlock1d

__all__ = ["VDCNN", "CifarResNet", "ConvBlock1d", "ConvBlock2d", "ResidualBlock", "ResidualMLP"]
