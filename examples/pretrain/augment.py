"""The methods' augmentations: per image in a worker (torchvision's transforms.v2), or per batch on the device.

transforms.v2 draws one set of parameters for a whole batch, so a batch on the device needs a module of its own. It
draws what transforms.v2 draws, image by image, and computes what it computes, without rounding to 8 bits between steps.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INDUCTOR = {
    "realize_opcount_threshold": 60
}  # the default of 30 stores what is drawn, and colours, in passes of their own
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


Channels = Sequence[Tensor]  # red, green, blue, each (M, H, W)


@dataclass(frozen=True)
class Draws:
    """What happens to each view. All (M,), drawn in float64, so that devices agree on every rounding."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor  # bool
    factors: tuple[Tensor, ...]  # of brightness, contrast, saturation, hue; 1, 1, 1, 0 leave an image as it is
    places: tuple[Tensor, ...]  # of the four in an image's order of them, from 0 to 3
    gray: Tensor  # bool
    sigma: Tensor  # pixels; 0: no blur

    def on(self, device: torch.device) -> "Draws":
        """The same draws there, in float32 where the device has nothing wider."""
        if has_float64(device):
            return self

        def moved(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(moved, x))
            return x.to(device, torch.float32 if x.dtype == torch.float64 else x.dtype)

        return Draws(**{name: moved(x) for name, x in vars(self).items()})


def has_float64(device: torch.device) -> bool:
    """Apple's GPUs have none."""
    return device.type != "mps"


class OnDevice:
    """The recipe for the views of a batch of equally large images, with parameters of its own for each view.

    They are a pure function of (seed, epoch, sample, view): the same on every device, in any batch, on any rank.
    ``compiled`` makes all of it one graph of torch.compile, which a GPU runs in at most ten kernels.
    """

    def __init__(self, recipe: Recipe, size: int, *, views: int = 2, compiled: bool = False) -> None:
        self.recipe, self.size, self.views = recipe, size, views
        self.make_views = compiled_views() if compiled else make_views

    @torch.no_grad()
    def __call__(
        self, images: Tensor, *, seed: int, epoch: int, samples: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """uint8 (N, 3, H, W) and the samples' numbers (N,) to views, each normalised float32 (N, 3, size, size).

        With ``rows`` (N,) it is these of the images, of which there may be any number.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}.")
        count = len(images) if rows is None else len(rows)
        if samples.shape != (count,) or samples.is_floating_point():
            raise ValueError(f"samples: expected {count} integers, got {samples.dtype} {tuple(samples.shape)}.")
        home = images.device if has_float64(images.device) else torch.device("cpu")  # where the numbers are drawn
        keys = keys_of(seed, epoch, self.views, home)
        views = self.make_views(self.recipe, self.size, images, rows, samples.to(home, non_blocking=True), keys)
        return views.unbind()


@functools.cache
def compiled_views() -> Callable[..., Tensor]:
    return torch.compile(make_views, fullgraph=True, dynamic=False, options=dict(INDUCTOR))


def make_views(recipe: Recipe, size: int, images: Tensor, rows: Tensor | None, samples: Tensor, keys: Tensor) -> Tensor:
    """``OnDevice`` as a function of tensors, (V, N, 3, size, size).

    Between the products the three channels are tensors of their own, so that all operations on colours, means of whole
    images among them, can be one kernel. Normalisation comes before the blur, with which it commutes, because it costs
    no pass of its own there.
    """
    drawn = draw(recipe, *images.shape[2:], samples=samples, keys=keys).on(images.device)
    images = images if rows is None else images[rows]
    channels: Channels = resized_crop(images.float() / 255, drawn, size, recipe.bicubic).unbind(1)
    if recipe.gray_first:
        channels = grayscale(channels, drawn.gray)
    if recipe.jitter_p:
        channels = jitter(channels, drawn.factors, drawn.places, hue=recipe.jitter[3] > 0)
    if not recipe.gray_first:
        channels = grayscale(channels, drawn.gray)
    normalised = [(x - mean) / std for x, mean, std in zip(channels, IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    pixels = torch.stack(normalised, 2).movedim(2, 1)  # (M, 3, size, size), in memory as ``separable`` reads it
    if recipe.blur_p:
        pixels = blur(pixels, drawn.sigma, blur_width(size))
    views: Tensor = pixels.unflatten(0, (-1, len(keys)))
    return views.movedim(1, 0)


def draw(recipe: Recipe, height: int, width: int, *, samples: Tensor, keys: Tensor) -> Draws:
    """One view of each sample (N,) for each key (V,): M = N V rows, the views of a sample one after another."""
    numbers = iter(uniform(keys, samples, count=2 * TRIES + 16).unbind(1))  # each (M,), from 0 to below 1

    def take(count: int) -> list[Tensor]:
        return [next(numbers) for _ in range(count)]

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * next(numbers)

    def chance(p: float) -> Tensor:
        return next(numbers) < p

    top, left, h, w = draw_crop(recipe.crop, height, width, take(TRIES), take(TRIES), take(2))
    flip, jittered = chance(recipe.flip_p), chance(recipe.jitter_p)
    *ranges, hue = recipe.jitter
    drawn = [*(between(max(0, 1 - extent), 1 + extent) for extent in ranges), between(-hue, hue)]
    neutral = (1.0, 1.0, 1.0, 0.0)
    factors = tuple(torch.where(jittered, f, n) for f, n in zip(drawn, neutral, strict=True))
    places = ranks_of(take(4))
    gray = chance(recipe.gray_p)
    sigma = torch.where(chance(recipe.blur_p), between(*recipe.blur_sigma), 0.0)
    return Draws(top, left, h, w, flip, factors, places, gray, sigma)


def ranks_of(numbers: list[Tensor]) -> tuple[Tensor, ...]:
    """How many of the others are smaller, or equal and before it. A sort would be a kernel of its own."""
    start = torch.zeros_like(numbers[0], dtype=torch.int64)
    return tuple(
        sum(((other <= x if j < i else other < x).long() for j, other in enumerate(numbers) if j != i), start)
        for i, x in enumerate(numbers)
    )


def draw_crop(
    share: tuple[float, float], height: int, width: int, areas: list[Tensor], ratios: list[Tensor], place: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width (M,) as RandomResizedCrop draws them, from numbers below 1."""
    low, high = map(math.log, ASPECT)
    ratio_of_all = min(max(width / height, ASPECT[0]), ASPECT[1])  # of the largest crop in the centre
    largest = (min(height, round(width / ratio_of_all)), min(width, round(height * ratio_of_all)))
    h, w = (torch.full_like(areas[0], side) for side in largest)
    some = torch.zeros_like(h, dtype=torch.bool)
    for number, other in zip(reversed(areas), reversed(ratios), strict=True):  # the first that fits is the last word
        area = height * width * (share[0] + (share[1] - share[0]) * number)
        ratio = (low + (high - low) * other).exp()
        wide, tall = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
        h, w, some = torch.where(fits, tall, h), torch.where(fits, wide, w), some | fits
    top, left = (
        torch.where(some, (number * (side - crop + 1)).floor(), (side - crop).div(2, rounding_mode="floor"))
        for number, side, crop in zip(place, (height, width), (h, w), strict=True)
    )
    return top, left, h, w


# Each operation: pixels are float, from 0 to 1; channels are three of (M, H, W); parameters are (M,), any real dtype.


def resized_crop(pixels: Tensor, drawn: Draws, size: int, bicubic: bool) -> Tensor:
    """torchvision's resized_crop of floats with antialias=True, then the flip: (N, 3, H, W) to (M, 3, size, size).

    Of 8-bit images torchvision's differs by at most 1/255 (bilinear), or a few where a cubic overshoots.
    """
    height, width = pixels.shape[2:]
    of_rows = torch.arange(2, device=pixels.device)[:, None] == 0
    start = torch.where(of_rows, drawn.top, drawn.left)  # (2, M), without a copy, which stacking them would be
    length = torch.where(of_rows, drawn.height, drawn.width)
    rows, columns = resampling(start, length, ~of_rows & drawn.flip, max(height, width), size, bicubic)
    return separable(pixels, rows[..., :height], columns[..., :width]).clamp(0, 1)  # bicubic overshoots


def resampling(start: Tensor, length: Tensor, mirrored: Tensor, side: int, size: int, bicubic: bool) -> Tensor:
    """(..., size, side): what each pixel weighs in each of the ``size`` that ``length`` from ``start`` become."""
    start, length = start[..., None, None], length[..., None, None]
    scale = length / size
    pixel = torch.arange(side, device=start.device, dtype=start.dtype) - start  # (..., 1, side), in the crop
    target = torch.arange(size, device=start.device, dtype=start.dtype)[:, None]  # (size, 1)
    target = torch.where(mirrored[..., None, None], size - 1 - target, target)
    distance = ((pixel + 0.5 - scale * (target + 0.5)) / scale.clamp(min=1)).abs()
    if bicubic:  # Keys' cubic with a = -0.5, as PIL and torch's antialias
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    else:
        weights = (1 - distance).clamp(min=0)
    weights = torch.where((pixel >= 0) & (pixel < length), weights, 0.0)
    return (weights / weights.sum(-1, keepdim=True)).float()


def separable(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(N, 3, H, W), (M, A, H), (M, B, W) -> (M, 3, A, B), of M / N views of each image.

    The result is in memory as (M, A, 3, B), so that neither product, nor one after it, copies what it reads.
    """
    n, channels, height, width = pixels.shape
    m, a, b = len(rows), rows.shape[1], columns.shape[1]
    resized = rows.view(n, m // n * a, height) @ pixels.transpose(1, 2).reshape(n, height, channels * width)
    return (resized.view(m, a * channels, width) @ columns.mT).view(m, a, channels, b).transpose(1, 2)


def jitter(channels: Channels, factors: Sequence[Tensor], places: Sequence[Tensor], hue: bool = True) -> Channels:
    """torchvision's brightness, contrast, saturation and hue, in each image's own order.

    Turning the hue costs most. It is done once, between what comes before it in the image's order and what comes after.
    """
    *blends, turn = (factor.to(channels[0].dtype) for factor in factors)
    *others, of_hue = places
    for now in range(3 if hue else 4):
        channels = blend(
            channels, blends, [(place == now) & (of_hue > now) if hue else place == now for place in others]
        )
    if hue:
        channels = turn_hue(channels, turn[:, None, None])
        for now in range(1, 4):
            channels = blend(channels, blends, [(place == now) & (of_hue < now) for place in others])
    return channels


def blend(channels: Channels, factors: Sequence[Tensor], now: Sequence[Tensor]) -> Channels:
    """Brightness, contrast or saturation, the one whose turn it is ``now``; where it is nobody's, nothing changes."""
    brightness, contrast, saturation = (torch.where(mine, f, 1.0) for mine, f in zip(now, factors, strict=True))
    gray = luma(channels)
    constant = (1 - contrast) * gray.mean((1, 2))
    added = (1 - saturation)[:, None, None] * gray + constant[:, None, None]
    factor = (brightness * contrast * saturation)[:, None, None]  # two of them are 1
    return [torch.addcmul(added, x, factor).clamp(0, 1) for x in channels]


def turn_hue(channels: Channels, turn: Tensor) -> Channels:
    """``turn`` (M, 1, 1) of the colour circle, in HSV."""
    red, green, blue = channels
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    scale = 1 / torch.where(chroma == 0, 1.0, chroma)
    sector = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    sector = sector + 6 * turn
    places = [torch.remainder(sector + corner, 6) for corner in (5, 3, 1)]
    return [value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in places]


def grayscale(channels: Channels, which: Tensor) -> Channels:
    gray = luma(channels)
    return [torch.where(which[:, None, None], gray, x) for x in channels]


def luma(channels: Channels) -> Tensor:  # (M, H, W)
    red, green, blue = channels
    return (0.2989 * red).add(green, alpha=0.587).add(blue, alpha=0.114)


def blur(pixels: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """torchvision's gaussian_blur of ``taps`` x ``taps``, reflecting at the edges; sigma 0 leaves an image as it is."""
    height, width = pixels.shape[2:]
    rows = blurring(sigma, height, taps)
    return separable(pixels, rows, rows if height == width else blurring(sigma, width, taps))


def blurring(sigma: Tensor, side: int, taps: int) -> Tensor:
    """(M, side, side): the weights of each pixel in each blurred one."""
    if taps // 2 >= side:
        raise ValueError(f"taps: {taps} reflect more than an image of {side} pixels has.")
    pixel = torch.arange(side, device=sigma.device)
    source, target = pixel, pixel[:, None]
    mirrored = source + target, 2 * (side - 1) - source - target  # how far the reflections at both edges are
    sigma = sigma.float().clamp(min=1e-3)[:, None, None]
    weights: Tensor | float = 0.0
    for distance, there in (
        ((source - target).abs(), True),
        (mirrored[0], source > 0),
        (mirrored[1], source < side - 1),
    ):
        weight = torch.exp(-0.5 * (distance / sigma) ** 2)
        weights = weights + torch.where((distance <= taps // 2) & there, weight, 0.0)
    assert isinstance(weights, Tensor)
    return weights / weights.sum(2, keepdim=True)


# ---------------------------------------------------------------------------------------------- numbers by counting

GOLDEN, MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64


def uniform(keys: Tensor, samples: Tensor, count: int) -> Tensor:
    """(N V, count) numbers from 0 to below 1, multiples of 2**-32: splitmix64 of (key, sample, index)."""
    start = splitmix64(samples.long()[:, None] * signed(GOLDEN) + keys).flatten()  # (N V,)
    index = torch.arange(1, count + 1, device=samples.device) * signed(GOLDEN)
    return shifted(splitmix64(start[:, None] + index), 32).double() / 2**32


@functools.lru_cache(maxsize=4)  # a copy to the device, once an epoch
def keys_of(seed: int, epoch: int, views: int, device: torch.device) -> Tensor:
    """(V,)"""
    return torch.tensor([key_of(seed, epoch, view) for view in range(views)], device=device)


def key_of(*numbers: int) -> int:
    """Of (seed, epoch, view)."""
    key = 0
    for number in numbers:
        key = mix(key + GOLDEN + number & 2**64 - 1)
    return signed(key)


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
