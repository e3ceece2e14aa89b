"""The package's inner knobs, turned by tests: wherever they live, all of them."""

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

import eqco_loss.ops


@contextmanager
def patched(name: str, value: object) -> Iterator[None]:
    """Every module of the operators that has this name sees this value."""
    modules = [importlib.import_module(f"eqco_loss.ops.{m.name}") for m in pkgutil.iter_modules(eqco_loss.ops.__path__)]
    having = [module for module in modules if hasattr(module, name)]
    assert having, f"no module of eqco_loss.ops has {name}"
    with ExitStack() as stack:
        for module in having:
            stack.enter_context(mock.patch.object(module, name, value))
        yield


@contextmanager
def tiles(elements: int | None = None, *, flash: bool = True) -> Iterator[None]:
    """At most `elements` similarities per tile, and numbers of keys ready at once; flash attention only if `flash`.

    With `elements`, equal ids are found one by one however few queries or many of them there are.
    """
    with ExitStack() as stack:
        if elements is not None:
            stack.enter_context(patched("TILE_ELEMENTS", elements))
            stack.enter_context(patched("FLASH_ELEMENTS", elements))
            stack.enter_context(patched("SMALL_ELEMENTS", 0))
            stack.enter_context(patched("SEARCH_ELEMENTS", 0))
            stack.enter_context(patched("SEARCH_ROWS", 0))
            stack.enter_context(patched("MOST_ALIKE", 2**62))
        if not flash:
            stack.enter_context(patched("flash_works", lambda *_: False))
        yield


@contextmanager
def float16_summed_in_float16() -> Iterator[None]:
    """torch's own setting for products, of which torch refuses those that come out in float32 while it is on."""
    before = torch.backends.cuda.matmul.allow_fp16_accumulation
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = before
