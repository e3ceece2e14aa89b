"""Augmentation on the device: torchvision's operations, drawn from its distributions, as a function of the sample."""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]
from torchvision.transforms.v2 import functional as V  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "measure"))

import augmentation_cost
from pretrain import augment
from pretrain.augment import RECIPES, Draws, OnDevice, Recipe

STILL = Recipe((1.0, 1.0), (0.0, 0.0, 0.0, 0.0), jitter_p=0, gray_p=0, flip_p=0)  # leaves an image as it is


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 (count, 3, height, width): smooth colours with noise, among them saturated and grey pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = V.resize(coarse, [height, width], antialias=True) * 1.4 - 0.2
    noisy = smooth + 0.1 * torch.randn(count, 3, height, width, generator=generator)
    noisy[:, :, :2] = noisy[:, :1, :2]
    found: Tensor = (noisy.clamp(0, 1) * 255).round().byte()
    return found


def draws_of(recipe: Recipe, count: int, height: int = 32, width: int = 32) -> Draws:
    return augment.draw(
        recipe, height, width, samples=torch.arange(count), keys=torch.tensor([augment.key_of(0, 0, 0)])
    )


def uniform(seed: int, epoch: int, view: int) -> Tensor:
    return augment.uniform(torch.tensor([augment.key_of(seed, epoch, view)]), torch.arange(4096), 36)


def view_of(recipe: Recipe, images: Tensor, samples: Tensor, *, seed: int = 0, epoch: int = 0, view: int = 0) -> Tensor:
    """One of the two views, 32 x 32."""
    return OnDevice(recipe, 32)(images, seed=seed, epoch=epoch, samples=samples)[view]


# ------------------------------------------------------------------------------------------------ the numbers


def splitmix64(state: int) -> int:
    """Vigna's, literally: the next output after ``state``."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_tensors_count_as_splitmix64_does() -> None:
    states = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, *(splitmix64(i) for i in range(50))]
    signed = torch.tensor([augment.signed((s + augment.GOLDEN) % 2**64) for s in states])
    assert [x % 2**64 for x in augment.splitmix64(signed).tolist()] == [splitmix64(s) for s in states]
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # its published first output for seed 0


def test_the_numbers_are_uniform_and_independent() -> None:
    numbers = uniform(7, 3, 1)  # (4096, 36)
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    bins = torch.histc(numbers, 64, 0, 1)
    expected = numbers.numel() / 64
    chi2 = float(((bins - expected) ** 2 / expected).sum())
    assert 63 - 4 * math.sqrt(126) < chi2 < 63 + 4 * math.sqrt(126)
    others = [uniform(8, 3, 1), uniform(7, 4, 1), uniform(7, 3, 0)]
    others.append(numbers.roll(1, 0))
    others.append(numbers.roll(1, 1))
    for other in others:
        correlation = float(torch.corrcoef(torch.stack([numbers.flatten(), other.flatten()]))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(numbers.numel())
    columns = torch.corrcoef(numbers.T) - torch.eye(36)
    assert float(columns.abs().max()) < 5 / math.sqrt(len(numbers))


@pytest.mark.parametrize("name", RECIPES)
def test_a_view_belongs_to_its_sample(name: str) -> None:
    """Whatever the batch, the place in it, and the state of the default generator."""
    images, samples = pictures(12, 40, 36), torch.tensor([5, 90000, 7, 0, 1, 2, 3, 11, 13, 17, 19, 23])
    state = torch.get_rng_state()
    whole = view_of(RECIPES[name], images, samples, seed=1, epoch=2)
    assert torch.equal(state, torch.get_rng_state())
    assert whole.shape == (12, 3, 32, 32)
    assert whole.dtype == torch.float32
    torch.manual_seed(99)
    for rows in ([3], [11, 3, 0], list(range(11, -1, -1))):
        part = view_of(RECIPES[name], images[rows], samples[rows], seed=1, epoch=2)
        torch.testing.assert_close(part, whole[rows], atol=1e-5, rtol=0)
    for other in ({"seed": 2}, {"epoch": 3}, {"view": 1}, {"samples": samples + 1}):
        key: dict[str, Any] = {"seed": 1, "epoch": 2, "samples": samples, "view": 0}
        changed = view_of(RECIPES[name], images, **{**key, **other})
        assert bool(((changed - whole).abs().amax((1, 2, 3)) > 0.05).all())


def test_the_images_of_a_batch_get_views_of_their_own() -> None:
    same = pictures(1, 32, 32).expand(64, -1, -1, -1)
    for recipe in RECIPES.values():
        views = view_of(recipe, same, torch.arange(64))
        distances = torch.cdist(views.flatten(1), views.flatten(1)) + 1e9 * torch.eye(64)
        assert float(distances.min()) > 1
    drawn = draws_of(RECIPES["mocov2"], 64)
    crops = torch.stack([drawn.top, drawn.left, drawn.height, drawn.width], 1)
    assert len(torch.unique(crops, dim=0)) > 55


# ------------------------------------------------------------------------------------------------ the distributions


def close_distributions(ours: Tensor, theirs: Tensor) -> bool:
    """Kolmogorov and Smirnov's test of two samples, at a level of 1e-4."""
    ours, theirs = ours.double().sort().values, theirs.double().sort().values
    points = torch.cat([ours, theirs]).sort().values
    gap = (torch.searchsorted(ours, points, right=True) / len(ours)) - (
        torch.searchsorted(theirs, points, right=True) / len(theirs)
    )
    limit = math.sqrt(-math.log(1e-4 / 2) / 2 * (1 / len(ours) + 1 / len(theirs)))
    return float(gap.abs().max()) < limit


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 40), (30, 100)])
@pytest.mark.parametrize("name", ["mocov2", "simclr"])
def test_crops_are_random_resized_crops(name: str, height: int, width: int) -> None:
    """Two shapes of image where often no crop fits."""
    recipe, count = RECIPES[name], 3000
    drawn = draws_of(recipe, 4 * count, height, width)
    theirs = v2.RandomResizedCrop(32, scale=recipe.crop)
    image = torch.zeros(3, height, width)
    found = [theirs.make_params([image]) for _ in range(count)]
    for key, ours in (("top", drawn.top), ("left", drawn.left), ("height", drawn.height), ("width", drawn.width)):
        assert close_distributions(ours, torch.tensor([params[key] for params in found])), key
    area = torch.tensor([params["height"] * params["width"] for params in found])
    aspect = torch.tensor([params["width"] / params["height"] for params in found], dtype=torch.float64)
    assert close_distributions(drawn.height * drawn.width, area)
    assert close_distributions(drawn.width / drawn.height, aspect)
    assert bool((drawn.top + drawn.height <= height).all())
    assert bool((drawn.left + drawn.width <= width).all())
    assert float(torch.minimum(drawn.height, drawn.width).min()) >= 1


@pytest.mark.parametrize("name", RECIPES)
def test_the_rest_is_drawn_as_torchvision_does(name: str) -> None:
    recipe, count = RECIPES[name], 20000
    drawn = draws_of(recipe, count)

    def rate(hits: Tensor, p: float) -> None:
        assert abs(float(hits.double().mean()) - p) <= 4 * math.sqrt(p * (1 - p) / count)

    rate(drawn.flip, recipe.flip_p)
    rate(drawn.gray, recipe.gray_p)
    rate(drawn.sigma > 0, recipe.blur_p)
    factors = torch.stack(drawn.factors, 1)  # (M, 4)
    jittered = factors[:, 3] != 0
    rate(jittered, recipe.jitter_p)
    assert bool((factors[~jittered] == torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)).all())
    theirs = v2.ColorJitter(*recipe.jitter)
    params = [theirs.make_params([]) for _ in range(3000)]
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for key, ours in zip(names, factors[jittered].unbind(1), strict=True):
        assert close_distributions(ours, torch.tensor([p[key] for p in params])), key
    orders = torch.unique(torch.stack(drawn.places, 1), dim=0, return_counts=True)[1]
    assert len(orders) == 24
    assert float((orders - count / 24).abs().max()) < 4.5 * math.sqrt(count / 24)
    if recipe.blur_p:
        blurs = v2.GaussianBlur(3, recipe.blur_sigma)
        sigmas = torch.tensor([blurs.make_params([])["sigma"][0] for _ in range(3000)])
        assert close_distributions(drawn.sigma[drawn.sigma > 0], sigmas)


# ------------------------------------------------------------------------------------------------ the operations


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (50, 41, 16), (20, 30, 48)])
@pytest.mark.parametrize("bicubic", [False, True])
def test_crop_and_resize(height: int, width: int, size: int, bicubic: bool) -> None:
    """Up and down, with antialias, as torchvision in float; in 8 bits it rounds, and clips between rows and columns."""
    images, drawn = pictures(40, height, width), draws_of(RECIPES["simclr"], 40, height, width)
    ours = augment.resized_crop(images.float() / 255, drawn, size, bicubic)
    kind = v2.InterpolationMode.BICUBIC if bicubic else v2.InterpolationMode.BILINEAR
    for i, image in enumerate(images):
        box = [int(x[i]) for x in (drawn.top, drawn.left, drawn.height, drawn.width)]
        exact = V.resized_crop(image.float() / 255, *box, [size, size], kind, antialias=True).clamp(0, 1)
        rounded = V.resized_crop(image, *box, [size, size], kind, antialias=True).float() / 255
        if drawn.flip[i]:
            exact, rounded = exact.flip(-1), rounded.flip(-1)
        torch.testing.assert_close(ours[i], exact, atol=5e-6, rtol=0)
        difference = 255 * (ours[i] - rounded).abs()
        assert float(difference.max()) < (16 if bicubic else 1.01)  # a cubic overshoots at the edges that it clips
        assert float((difference < 1.01).float().mean()) > 0.96
    assert {True, False} == set(drawn.flip.tolist())


def jitter(images: Tensor, factors: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(augment.jitter(images.unbind(1), factors, places)), 1)


@pytest.mark.parametrize("operation", range(4))
def test_each_colour_operation(operation: int) -> None:
    images = pictures(64, 12, 10).float() / 255
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(64, 1)
    low, high = (-0.5, 0.5) if operation == 3 else (0.0, 2.0)
    factors[:, operation] = torch.linspace(low, high, 64)
    theirs = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue)[operation]
    expected = torch.stack([theirs(image, float(f)) for image, f in zip(images, factors[:, operation], strict=True)])
    places = torch.stack([torch.randperm(4) for _ in range(64)])
    ours = jitter(images, factors.unbind(1), places.unbind(1))
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
    eight_bits = (255 * images).round().byte()  # torchvision truncates the grey image, and the result
    rounded = torch.stack([theirs(x, float(f)) for x, f in zip(eight_bits, factors[:, operation], strict=True)])
    bound = 1 + (1 - factors[:, operation]).abs() if operation in (1, 2) else torch.ones(64)
    difference = (255 * ours - rounded).abs().amax((1, 2, 3))
    assert bool((difference <= bound + 0.01).all())


def test_colour_operations_in_their_order() -> None:
    images, drawn = pictures(96, 12, 10).float() / 255, draws_of(RECIPES["simclr"], 96)
    ours = jitter(images, drawn.factors, drawn.places)
    orders = torch.stack(drawn.places, 1).argsort(1)
    operations = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue)
    for i, image in enumerate(images):
        for operation in orders[i].tolist():
            image = operations[operation](image, float(drawn.factors[operation][i]))
        torch.testing.assert_close(ours[i], image, atol=1e-4, rtol=0)


def test_grayscale() -> None:
    images, which = pictures(6, 8, 9).float() / 255, torch.tensor([True, False] * 3)
    ours = torch.stack(list(augment.grayscale(images.unbind(1), which)), 1)
    torch.testing.assert_close(ours[::2], V.rgb_to_grayscale(images[::2], 3), atol=1e-6, rtol=0)
    assert torch.equal(ours[1::2], images[1::2])


@pytest.mark.parametrize(("side", "taps"), [(32, 3), (40, 23), (12, 23)])
def test_blur(side: int, taps: int) -> None:
    images, sigma = pictures(12, side, side + 3).float() / 255, torch.linspace(0.1, 2, 12, dtype=torch.float64)
    sigma[5] = 0
    ours = augment.blur(images, sigma, taps)
    for i, image in enumerate(images):
        expected = V.gaussian_blur(image, [taps, taps], [float(sigma[i])] * 2) if i != 5 else image
        torch.testing.assert_close(ours[i], expected, atol=1e-5, rtol=0)


def test_a_recipe_that_does_nothing_only_normalises() -> None:
    images = pictures(5, 32, 32)
    ours = view_of(STILL, images, torch.arange(5))
    theirs = torch.stack([augment.per_image(STILL, 32)(image) for image in images])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_both_paths_make_the_same_pictures_on_average(name: str) -> None:
    """Means, spreads and edges of many views of one picture."""
    image, count = pictures(1, 40, 36)[0], 300

    def statistics(views: Tensor) -> Tensor:
        edges = (views[..., 1:] - views[..., :-1]).abs().mean((1, 2, 3))
        return torch.stack([*views.mean((2, 3)).unbind(1), *views.std((2, 3)).unbind(1), edges], 1)  # (M, 7)

    samples = torch.arange(4 * count)
    every = image.expand(4 * count, -1, -1, -1)
    ours = statistics(view_of(RECIPES[name], every, samples))
    transform, picture = augment.per_image(RECIPES[name], 32), V.to_pil_image(image)
    assert isinstance(picture, Image.Image)
    theirs = statistics(torch.stack([transform(picture) for _ in range(count)]))
    for column in range(7):
        assert close_distributions(ours[:, column], theirs[:, column]), column


@pytest.mark.parametrize("name", RECIPES)
def test_a_device_without_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs: the same draws, the same views but for float32's rounding."""
    images, samples = pictures(5, 40, 36), torch.arange(5)
    expected = view_of(RECIPES[name], images, samples, view=1)
    monkeypatch.setattr(augment, "has_float64", lambda device: False)
    seen = []

    def resized_crop(pixels: Tensor, drawn: Draws, size: int, bicubic: bool) -> Tensor:
        flat = [x for field in vars(drawn).values() for x in (field if isinstance(field, tuple) else (field,))]
        seen.append({x.dtype for x in flat})
        return crop(pixels, drawn, size, bicubic)

    crop = augment.resized_crop
    monkeypatch.setattr(augment, "resized_crop", resized_crop)
    views = view_of(RECIPES[name], images, samples, view=1)
    assert seen == [{torch.float32, torch.int64, torch.bool}]
    torch.testing.assert_close(views, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_ten_launches() -> None:
    """Of a batch of CIFAR's on a GPU, in the recipe that has every operation; inductor writes its code without one."""
    pytest.importorskip("triton")
    found = augmentation_cost.launches(RECIPES["mocov2"], 32, 512)
    assert found["bmm"] == 4, found  # crop and blur, rows and columns: its lines are found
    assert 0 < found["Triton"] <= 6, found


@pytest.mark.parametrize("name", ["mocov2", "simco"])
def test_compiled_views_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph without a break, which another epoch does not compile again."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    once = torch.compile(augment.make_views, fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(augment, "compiled_views", lambda: once)
    images, samples = pictures(4, 40, 36), torch.arange(4)
    for epoch in (0, 1):
        expected = OnDevice(RECIPES[name], 32)(images, seed=0, epoch=epoch, samples=samples)
        views = OnDevice(RECIPES[name], 32, compiled=True)(images, seed=0, epoch=epoch, samples=samples)
        torch.testing.assert_close(views, expected, atol=1e-6, rtol=0)
    assert len(graphs) == 1


def test_bad_input() -> None:
    transform = OnDevice(RECIPES["mocov2"], 32)
    good: dict[str, Any] = {"seed": 0, "epoch": 0, "samples": torch.arange(2)}
    with pytest.raises(ValueError, match=r"images: expected uint8 \(N, 3, H, W\), got torch.float32 \(2, 3, 32, 32\)"):
        transform(torch.zeros(2, 3, 32, 32), **good)
    with pytest.raises(ValueError, match=r"images: .*, got torch.uint8 \(2, 1, 32, 32\)"):
        transform(pictures(2, 32, 32)[:, :1], **good)
    with pytest.raises(ValueError, match=r"samples: expected 3 integers, got torch.int64 \(2,\)"):
        transform(pictures(3, 32, 32), **good)
    with pytest.raises(ValueError, match="taps: 23 reflect more than an image of 11 pixels has"):
        augment.blur(torch.zeros(1, 3, 11, 40), torch.ones(1, dtype=torch.float64), 23)
