"""Every test runs with deterministic algorithms, with fresh memory that is NaN, and from one seed."""

import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest's workers share the cores; torch reads it as it is imported

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
import torch.utils.deterministic
from hypothesis import HealthCheck, settings

from tests.interpreter import exact_bfloat16, quicker

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it
if not torch.cuda.is_available():  # kernels asked for by name run in Triton's interpreter, on CPU tensors
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile(
    "ci", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("dev", settings.get_profile("ci"), derandomize=False)
settings.register_profile("long", settings.get_profile("dev"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True, scope="session")
def fresh_memory_is_nan() -> Iterator[None]:
    """Whatever reads memory that nobody wrote reads NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def interpreted_as_on_a_gpu() -> Iterator[None]:
    """Kernels multiply float32 in pieces of bfloat16, which Triton's interpreter alone gets wrong."""
    with ExitStack() as stack:
        if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
            stack.enter_context(exact_bfloat16())
            stack.enter_context(quicker())
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    from eqco_loss import repeats  # which imports Triton, whose interpreter must have been asked for

    torch.manual_seed(0)
    repeats.forget()  # or a knob that a test turns would be one that calls of another test have read already


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No graph of another test counts towards a recompile limit here."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
