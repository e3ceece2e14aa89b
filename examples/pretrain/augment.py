"""The methods' augmentations: per image in a worker (torchvision's transforms.v2), or per batch on the device.

transforms.v2 draws one set of parameters for a whole batch, so a batch on the device needs a module of its own. It
draws what transforms.v2 draws, image by image, and computes what it computes, without rounding to 8 bits between steps.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ASPECT = (3 / 4, 4 / 3)  # of a crop, width to height
TRIES = 10  # of a crop that fits, before the centre is taken


@dataclass(frozen=True)
class Recipe:
    crop: tuple[float, float]  # share of the image's area
    jitter: tuple[float, float, float, float]  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    flip_p: float = 0.5
    bicubic: bool = False
    gray_first: bool = False  # before the jitter, as MoCo v1 does, and not after it


RECIPES = {
    "mocov1": Recipe((0.2, 1.0), (0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray_first=True),
    "mocov2": Recipe((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), blur_p=0.5),  # SiMo's, too
    "simclr": Recipe((0.08, 1.0), (0.8, 0.8, 0.8, 0.2), blur_p=0.5),
    "simco": Recipe((0.08, 1.0), (0.4, 0.4, 0.4, 0.1), bicubic=True),
}


def blur_width(size: int) -> int:
    """Taps of the blur: a tenth of the image, odd."""
    return max(3, size // 10 // 2 * 2 + 1)


def per_image(recipe: Recipe, size: int) -> v2.Compose:
    """A PIL image or a uint8 tensor (3, H, W) to a normalised float tensor (3, size, size)."""
    interpolation = v2.InterpolationMode.BICUBIC if recipe.bicubic else v2.InterpolationMode.BILINEAR
    jitter = v2.RandomApply([v2.ColorJitter(*recipe.jitter)], p=recipe.jitter_p)
    colour = [jitter, v2.RandomGrayscale(recipe.gray_p)]
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=recipe.crop, ratio=ASPECT, interpolation=interpolation, antialias=True),
            *(reversed(colour) if recipe.gray_first else colour),
            *(
                [v2.RandomApply([v2.GaussianBlur(blur_width(size), recipe.blur_sigma)], p=recipe.blur_p)]
                * bool(recipe.blur_p)
            ),
            v2.RandomHorizontalFlip(recipe.flip_p),
            *to_normalised_tensor(),
        ]
    )


def to_normalised_tensor() -> list[torch.nn.Module]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]


# ---------------------------------------------------------------------------------------------- a batch, on the device


@dataclass(frozen=True)
class Draws:
    """What happens to each image. All (N,), drawn in float64, so that devices agree on every rounding."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor  # bool
    factors: Tensor  # (N, 4) of brightness, contrast, saturation, hue; 1, 1, 1, 0 leave an image as it is
    order: Tensor  # (N, 4), which of the four comes first, second, ...
    gray: Tensor  # bool
    sigma: Tensor  # pixels; 0: no blur

    def on(self, device: torch.device) -> "Draws":
        """The same draws there, in float32 where the device has nothing wider."""
        if not has_float64(device):
            narrow = {name: x.float() for name, x in vars(self).items() if x.dtype == torch.float64}
            return Draws(**{name: x.to(device) for name, x in {**vars(self), **narrow}.items()})
        return self


def has_float64(device: torch.device) -> bool:
    """Apple's GPUs have none."""
    return device.type != "mps"


class OnDevice:
    """The recipe for a batch of equally large images, with parameters of its own for each.

    They are a pure function of (seed, epoch, sample, view): the same on every device, in any batch, on any rank.
    """

    def __init__(self, recipe: Recipe, size: int) -> None:
        self.recipe, self.size = recipe, size

    @torch.no_grad()
    def __call__(self, images: Tensor, *, seed: int, epoch: int, samples: Tensor, view: int) -> Tensor:
        """uint8 (N, 3, H, W) and the samples' numbers (N,) to normalised float32 (N, 3, size, size)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}.")
        if samples.shape != images.shape[:1] or samples.is_floating_point():
            raise ValueError(f"samples: expected {len(images)} integers, got {samples.dtype} {tuple(samples.shape)}.")
        recipe, size = self.recipe, self.size
        samples = samples.to(images.device, non_blocking=True) if has_float64(images.device) else samples.cpu()
        drawn = draw(recipe, *images.shape[2:], seed=seed, epoch=epoch, samples=samples, view=view).on(images.device)
        pixels = resized_crop(images.float() / 255, drawn, size, recipe.bicubic)
        if recipe.gray_first:
            pixels = grayscale(pixels, drawn.gray)
        if recipe.jitter_p:
            pixels = jitter(pixels, drawn.factors, drawn.order, hue=recipe.jitter[3] > 0)
        if not recipe.gray_first:
            pixels = grayscale(pixels, drawn.gray)
        if recipe.blur_p:
            pixels = blur(pixels, drawn.sigma, blur_width(size))
        mean, std = imagenet_statistics(pixels.device)
        return (pixels - mean) / std


@functools.cache  # a copy to the device waits for it
def imagenet_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(numbers, device=device).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def draw(recipe: Recipe, height: int, width: int, *, seed: int, epoch: int, samples: Tensor, view: int) -> Draws:
    numbers = iter(uniform(seed, epoch, samples, view, count=2 * TRIES + 16).unbind(1))  # each (N,), from 0 to below 1

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * next(numbers)

    def chance(p: float) -> Tensor:
        return next(numbers) < p

    top, left, h, w = draw_crop(
        recipe.crop, height, width, torch.stack([next(numbers) for _ in range(2 * TRIES + 2)], 1)
    )
    flip, jittered = chance(recipe.flip_p), chance(recipe.jitter_p)
    *ranges, hue = recipe.jitter
    drawn = [*(between(max(0, 1 - extent), 1 + extent) for extent in ranges), between(-hue, hue)]
    neutral = (1.0, 1.0, 1.0, 0.0)
    factors = torch.stack([torch.where(jittered, f, n) for f, n in zip(drawn, neutral, strict=True)], 1)
    order = torch.stack([next(numbers) for _ in range(4)], 1).argsort(stable=True, dim=1)
    gray = chance(recipe.gray_p)
    sigma = torch.where(chance(recipe.blur_p), between(*recipe.blur_sigma), 0.0)
    return Draws(top, left, h, w, flip, factors, order, gray, sigma)


def draw_crop(
    share: tuple[float, float], height: int, width: int, numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width as RandomResizedCrop draws them, from (N, 2 TRIES + 2) numbers below 1."""
    areas, ratios = numbers[:, :TRIES], numbers[:, TRIES : 2 * TRIES]
    area = height * width * (share[0] + (share[1] - share[0]) * areas)
    low, high = map(math.log, ASPECT)
    ratio = (low + (high - low) * ratios).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)  # (N, TRIES)
    first = fits.to(torch.int8).argmax(1, keepdim=True)
    ratio_of_all = min(max(width / height, ASPECT[0]), ASPECT[1])  # of the largest crop in the centre
    largest = (min(height, round(width / ratio_of_all)), min(width, round(height * ratio_of_all)))
    some = fits.any(1)
    h, w = (torch.where(some, tried.gather(1, first)[:, 0], side) for tried, side in zip((h, w), largest, strict=True))
    top, left = (
        torch.where(some, (number * (side - crop + 1)).floor(), (side - crop).div(2, rounding_mode="floor"))
        for number, side, crop in zip(numbers[:, -2:].unbind(1), (height, width), (h, w), strict=True)
    )
    return top, left, h, w


# Each operation: pixels are float (N, 3, H, W) from 0 to 1; the parameters are (N,), any real dtype.


def resized_crop(pixels: Tensor, drawn: Draws, size: int, bicubic: bool) -> Tensor:
    """torchvision's resized_crop of floats with antialias=True, then the flip.

    Of 8-bit images torchvision's differs by at most 1/255 (bilinear), or a few where a cubic overshoots.
    """
    rows = resampling(drawn.top, drawn.height, pixels.shape[2], size, bicubic)
    columns = resampling(drawn.left, drawn.width, pixels.shape[3], size, bicubic)
    columns = torch.where(drawn.flip[:, None, None], columns.flip(1), columns)
    return separable(pixels, rows, columns).clamp(0, 1)  # bicubic overshoots


def resampling(start: Tensor, length: Tensor, side: int, size: int, bicubic: bool) -> Tensor:
    """(N, size, side): what each pixel weighs in each of ``size``, into which ``length`` from ``start`` are resized."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size
    pixel = torch.arange(side, device=start.device, dtype=start.dtype) - start  # (N, 1, side), in the crop
    target = torch.arange(size, device=start.device, dtype=start.dtype)[:, None]  # (size, 1)
    distance = ((pixel + 0.5 - scale * (target + 0.5)) / scale.clamp(min=1)).abs()
    if bicubic:  # Keys' cubic with a = -0.5, as PIL and torch's antialias
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    else:
        weights = (1 - distance).clamp(min=0)
    weights = torch.where((pixel >= 0) & (pixel < length), weights, 0.0)
    return (weights / weights.sum(2, keepdim=True)).float()


def separable(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(N, 3, H, W), (N, A, H), (N, B, W) -> (N, 3, A, B)."""
    return rows[:, None] @ (pixels @ columns[:, None].mT)


def jitter(pixels: Tensor, factors: Tensor, order: Tensor, hue: bool = True) -> Tensor:
    """torchvision's brightness, contrast, saturation and hue, in each image's own order."""
    factors = factors.to(pixels.dtype)
    for operation in order.unbind(1):  # (N,), which of the four comes now
        gray = luma(pixels)
        is_contrast, is_saturation, is_hue = ((operation == i)[:, None, None, None] for i in (1, 2, 3))
        factor = factors.gather(1, operation[:, None])[:, :, None, None]
        other = torch.where(is_contrast, gray.mean((2, 3), keepdim=True), torch.where(is_saturation, gray, 0.0))
        blended = torch.lerp(other, pixels, torch.where(is_hue, 1.0, factor)).clamp(0, 1)
        pixels = torch.where(is_hue, turn_hue(pixels, factor), blended) if hue else blended
    return pixels


def turn_hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """``turn`` (N, 1, 1, 1) of the colour circle, in HSV."""
    red, green, blue = pixels.unbind(1)  # (N, H, W)
    value = pixels.amax(1)
    chroma = value - pixels.amin(1)
    scale = 1 / torch.where(chroma == 0, 1.0, chroma)
    sector = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    corner = 5 - 2 * torch.arange(3, device=pixels.device).view(3, 1, 1)
    k = torch.remainder(corner + (sector + 6 * turn[:, 0])[:, None], 6)  # (N, 3, H, W)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def grayscale(pixels: Tensor, which: Tensor) -> Tensor:
    return torch.where(which[:, None, None, None], luma(pixels), pixels)


def luma(pixels: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 1, H, W)
    red, green, blue = pixels.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]


def blur(pixels: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """torchvision's gaussian_blur of ``taps`` x ``taps``, reflecting at the edges; sigma 0 leaves an image as it is."""
    rows, columns = (blurring(sigma, side, taps) for side in pixels.shape[2:])
    return separable(pixels, rows, columns)


def blurring(sigma: Tensor, side: int, taps: int) -> Tensor:
    """(N, side, side): the weights of each pixel in each blurred one."""
    if taps // 2 >= side:
        raise ValueError(f"taps: {taps} reflect more than an image of {side} pixels has.")
    offset = torch.arange(taps, device=sigma.device) - taps // 2
    kernel = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2).float()  # (N, taps)
    kernel = kernel / kernel.sum(1, keepdim=True)
    source = (torch.arange(side, device=sigma.device)[:, None] + offset).abs()  # (side, taps), reflected at 0
    source = torch.where(source > side - 1, 2 * (side - 1) - source, source)
    weights = kernel.new_zeros(len(sigma), side, side)
    return weights.scatter_add_(2, source.expand(len(sigma), -1, -1), kernel[:, None].expand(-1, side, -1))


# ---------------------------------------------------------------------------------------------- numbers by counting

GOLDEN, MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64


def uniform(seed: int, epoch: int, samples: Tensor, view: int, count: int) -> Tensor:
    """(N, count) numbers from 0 to below 1, multiples of 2**-32: splitmix64 of (seed, epoch, view, sample, index)."""
    key = 0
    for number in (seed, epoch, view):
        key = mix(key + GOLDEN + number & 2**64 - 1)
    start = splitmix64(samples.long() * signed(GOLDEN) + signed(key))  # (N,)
    index = torch.arange(1, count + 1, device=samples.device) * signed(GOLDEN)
    return shifted(splitmix64(start[:, None] + index), 32).double() / 2**32


def splitmix64(x: Tensor) -> Tensor:
    """int64 to int64; the products overflow, which is meant."""
    x = (x ^ shifted(x, 30)) * signed(MIX[0])
    x = (x ^ shifted(x, 27)) * signed(MIX[1])
    return x ^ shifted(x, 31)


def mix(x: int) -> int:
    """splitmix64 of a Python integer."""
    x = (x ^ x >> 30) * MIX[0] & 2**64 - 1
    x = (x ^ x >> 27) * MIX[1] & 2**64 - 1
    return x ^ x >> 31


def shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros; torch's fills with the sign."""
    return (x >> bits) & (1 << 64 - bits) - 1


def signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
