"""The networks, ordinary modules with h = 1; `eulernet.patch` gives them their step factor."""

from reproductions.models.block import ConvBlock
from reproductions.models.mlp import ResidualBlock, ResidualMLP
from reproductions.models.resnet import CifarResNet
from reproductions.models.vdcnn import VDCNN

__all__ = ["VDCNN", "CifarResNet", "ConvBlock", "ResidualBlock", "ResidualMLP"]
