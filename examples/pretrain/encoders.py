"""Encoders: a backbone, whose features are evaluated, and a projection head, whose output the loss sees."""

import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn


class Encoder(nn.Module):
    def __init__(self, backbone: nn.Module, width: int, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.width, self.head = backbone, width, head
        self.to(memory_format=torch.channels_last)  # twice as fast on CPU

    def features(self, images: Tensor) -> Tensor:  # (N, C, H, W) -> (N, width)
        features: Tensor = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return features

    def forward(self, images: Tensor) -> Tensor:  # (N, C, H, W) -> (N, dim)
        embedding: Tensor = self.head(self.features(images))
        return embedding


def simo_encoder(arch: str, channels: int, image_size: int, dim: int) -> Encoder:
    """Backbone and head of SiMo: Linear-BN-ReLU-Linear-BN without biases, weights from N(0, 0.01)."""
    backbone, width = small(channels) if arch == "small" else resnet(arch, channels, image_size)
    linear_in, linear_out = nn.Linear(width, width, bias=False), nn.Linear(width, dim, bias=False)
    for linear in (linear_in, linear_out):
        nn.init.normal_(linear.weight, std=0.01)
    head = nn.Sequential(linear_in, nn.BatchNorm1d(width), nn.ReLU(inplace=True), linear_out, nn.BatchNorm1d(dim))
    return Encoder(backbone, width, head)


def small(channels: int) -> tuple[nn.Module, int]:
    """Six convolutions for 32 x 32 digits; the pooling comes before batch norm, where it costs least."""

    def block(inputs: int, outputs: int, stride: int = 1, pool: bool = False) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        return [convolution, *([nn.MaxPool2d(2)] if pool else []), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    layers = [
        *block(channels, 16, pool=True),  # 32 x 32 -> 16 x 16
        *block(16, 32),
        *block(32, 32, stride=2),  # 8 x 8
        *block(32, 64),
        *block(64, 64),
        *block(64, 128, stride=2),  # 4 x 4
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 128


def resnet(arch: str, channels: int, image_size: int) -> tuple[nn.Module, int]:
    """torchvision's ResNet without its classifier; under 64 px with a 3 x 3 stem and no max-pool, as for CIFAR."""
    model = torchvision.models.get_model(arch, weights=None, zero_init_residual=True)
    if image_size < 64:
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    width = int(model.fc.in_features)
    model.fc = nn.Identity()
    return model, width
