"""Encoders: a backbone, whose features are evaluated, and a projection head, whose output the loss sees."""

from itertools import pairwise
from typing import Any, get_args

import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn

from .choices import Arch as Arch
from .choices import Head as Head
from .norms import Norm, convert_norm

# What checkpoints call the heads that were made before each method's file had its own
FORMER_HEADS = {
    "mocov1": Head(layers=1),
    "mocov2": Head(),
    "simco": Head(hidden="outputs"),
    "simo": Head(batch_norm=True, last_norm="affine", std=0.01),
}


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


def make_encoder(
    arch: Arch,
    *,
    channels: int,
    image_size: int,
    head: Head,
    dim: int,
    norm: Norm = "batch",
    splits: int = 8,
    zero_init_residual: bool = False,
) -> Encoder:
    """An encoder with fresh weights, drawn from torch's default generator."""
    if arch not in get_args(Arch):
        raise ValueError(f"arch: expected one of {', '.join(get_args(Arch))}, got {arch!r}.")
    if arch == "small":
        backbone, width = small(channels)
    else:
        backbone, width = resnet(arch, channels, image_size, zero_init_residual=zero_init_residual)
    encoder = Encoder(backbone, width, perceptron(head, width, dim))
    convert_norm(encoder, norm, splits)
    return encoder


def encoder_of(spec: dict[str, Any]) -> Encoder:
    """``make_encoder`` of what a checkpoint says about its encoder."""
    head = spec["head"]
    if not isinstance(head, str):
        return make_encoder(**{**spec, "head": Head(**head)})
    if head not in FORMER_HEADS:
        raise ValueError(f"head: expected one of {', '.join(FORMER_HEADS)}, got {head!r}.")
    return make_encoder(**{**spec, "head": FORMER_HEADS[head], "zero_init_residual": head == "simo"})


def perceptron(head: Head, inputs: int, outputs: int) -> nn.Module:
    """(N, inputs) -> (N, outputs)."""
    hidden = {"inputs": inputs, "outputs": outputs}[head.hidden] if isinstance(head.hidden, str) else head.hidden
    widths = [inputs, *[hidden] * (head.layers - 1), outputs]
    linears = [nn.Linear(a, b, bias=not head.batch_norm) for a, b in pairwise(widths)]
    if head.std is not None:
        for linear in linears:
            nn.init.normal_(linear.weight, std=head.std)
    layers: list[nn.Module] = []
    for linear in linears[:-1]:
        layers += [linear, *([nn.BatchNorm1d(hidden)] if head.batch_norm else []), nn.ReLU(inplace=True)]
    layers.append(linears[-1])
    if head.last_norm != "none":
        layers.append(nn.BatchNorm1d(outputs, affine=head.last_norm == "affine"))
    return nn.Sequential(*layers) if len(layers) > 1 else layers[0]


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


def resnet(arch: Arch, channels: int, image_size: int, *, zero_init_residual: bool) -> tuple[nn.Module, int]:
    """torchvision's ResNet without its classifier; under 64 px with a 3 x 3 stem and no max-pool, as for CIFAR."""
    name, _, factor = arch.partition("x")
    model: Any
    if factor:
        model = WideResNet50(int(factor), zero_init_residual=zero_init_residual)
    else:
        model = torchvision.models.get_model(name, weights=None, zero_init_residual=zero_init_residual)
    if image_size < 64:
        model.conv1 = convolution(channels, model.conv1.out_channels, kernel=3)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = convolution(channels, model.conv1.out_channels, kernel=7, stride=2)
    width = int(model.fc.in_features)
    model.fc = nn.Identity()
    return model, width


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A stem, initialised as torchvision does."""
    stem = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem


class WideResNet50(torchvision.models.ResNet):  # type: ignore[misc]
    """ResNet-50 with every convolution ``factor`` times as wide; wide_resnet50_2 widens only a third of them."""

    def __init__(self, factor: int, *, zero_init_residual: bool) -> None:
        self.factor = factor
        super().__init__(
            torchvision.models.resnet.Bottleneck, [3, 4, 6, 3], num_classes=1, zero_init_residual=zero_init_residual
        )
        self.conv1 = convolution(3, 64 * factor, kernel=7, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * factor)
        self.fc = nn.Linear(2048 * factor, 1000)

    def _make_layer(self, block: Any, planes: int, *arguments: Any, **options: Any) -> nn.Sequential:
        if planes == 64:  # the first stage reads what the stem above writes
            self.inplanes = 64 * self.factor
        stage: nn.Sequential = super()._make_layer(block, planes * self.factor, *arguments, **options)
        return stage
