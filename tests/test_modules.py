"""Losses and queues as torch's modules: copied, pickled, compiled in place, read by command lines, made fake.

python -m pytest tests/test_modules.py
"""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue, functional, momentum_update
from eqco_loss.settings import Inputs, Settings

ROWS = torch.randn(8, 4), torch.randn(8, 4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_of_a_loss_that_was_compiled_in_place_is_its_own(
    copied: Callable[[nn.Module], Any], fresh_compiler: None
) -> None:
    """A compiled forward belongs to one module: nn.Module leaves it out of copies and files."""
    criterion = EqCoLoss(nn.Parameter(torch.tensor(0.2)))
    criterion.compile(backend="aot_eager")
    criterion(*ROWS)
    other = copied(criterion)
    other.temperature = nn.Parameter(torch.tensor(1.0))
    loss = other(*ROWS)
    torch.testing.assert_close(loss, EqCoLoss(1.0)(*ROWS))
    loss.backward()
    assert other.temperature.grad is not None
    assert isinstance(criterion.temperature, nn.Parameter)
    assert criterion.temperature.grad is None
    assert copy.copy(criterion)._compiled_call_impl is None


def test_a_model_that_holds_a_compiled_queue_is_saved() -> None:
    queue = MomentumQueue(4, 2)
    queue.compile(backend="aot_eager")
    queue.enqueue(torch.randn(3, 2))
    file = io.BytesIO()
    torch.save(nn.ModuleDict({"queue": queue}), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)["queue"].keys, queue.keys)


def test_a_copy_of_torch_compiles_module_is_one() -> None:
    compiled: Any = torch.compile(EqCoLoss(nn.Parameter(torch.tensor(0.2))), backend="aot_eager")
    model = nn.ModuleDict({"criterion": compiled})
    other = copy.deepcopy(model)
    assert type(other["criterion"]) is type(model["criterion"])
    other.load_state_dict(model.state_dict())


class Locked(EqCoLoss):
    """Has what can be neither copied nor saved, and says so by the protocol of pickles."""

    def __init__(self) -> None:
        super().__init__()
        self.lock: Any = inspect.currentframe()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "lock"}


def test_a_subclass_may_say_what_is_copied() -> None:
    assert not hasattr(copy.deepcopy(Locked()), "lock")


@pytest.mark.parametrize(
    "described",
    [
        *(EqCoLoss.__init__, DualTempInfoNCE.__init__, MomentumQueue.__init__, momentum_update, Settings, Inputs),
        *(functional.eqco_loss, functional.dual_temp_infonce, functional.negatives_logsumexp),
    ],
    ids=lambda x: x.__qualname__,
)
def test_hints_can_be_read(described: Any) -> None:
    """As command lines that are made of a signature read them."""
    hints = get_type_hints(described)
    assert set(hints) >= {"temperature"} or described in (MomentumQueue.__init__, momentum_update, Inputs)


@pytest.mark.parametrize("loss", [EqCoLoss, DualTempInfoNCE])
def test_a_loss_does_not_become_the_other_one(loss: type[EqCoLoss] | type[DualTempInfoNCE]) -> None:
    criterion = loss()
    criterion.inter_temperature = 1.0 if loss is EqCoLoss else None
    assert loss.__name__ in repr(nn.ModuleList([criterion]))  # a model with a mistake can be printed
    expected = f"inter_temperature: expected {'None' if loss is EqCoLoss else 'a number'} in {loss.__name__}, got"
    with pytest.raises(ValueError, match=expected):
        criterion(*ROWS)


def test_a_fake_temperature_is_not_read() -> None:
    """Shapes are worked out without values, by FakeTensorMode, by make_fx, and by who exports a program."""
    with FakeTensorMode():
        query = torch.randn(8, 4, requires_grad=True)
        for temperature in (nn.Parameter(torch.empty(())), torch.empty(()).neg().exp()):
            assert functional.eqco_loss(query, torch.randn(8, 4), temperature=temperature).shape == ()

    def loss(q: Tensor, k: Tensor, t: Tensor) -> Tensor:
        return functional.eqco_loss(q, k, temperature=t)

    traced = make_fx(loss)(*ROWS, torch.tensor(0.3))
    torch.testing.assert_close(traced(*ROWS, torch.tensor(0.5)), loss(*ROWS, torch.tensor(0.5)))


class Momentum(nn.Module):
    """A step of MoCo, whose queue changes."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = MomentumQueue(64, 4)
        self.queue.enqueue(torch.randn(5, 4))
        self.criterion = EqCoLoss()

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        loss: Tensor = self.criterion(query, key, self.queue)
        self.queue.enqueue(key)
        return loss


@pytest.mark.parametrize("strict", [False, True])
def test_a_step_with_a_queue_exports_for_every_batch_size(strict: bool, fresh_compiler: None) -> None:
    module, n = Momentum(), torch.export.Dim("n", min=2, max=32)
    program = torch.export.export(module, ROWS, dynamic_shapes=({0: n}, {0: n}), strict=strict).module()
    eager = copy.deepcopy(module)
    for rows in (6, 9, 5):
        query, key = torch.randn(rows, 4), torch.randn(rows, 4)
        torch.testing.assert_close(program(query, key), eager(query, key))
    torch.testing.assert_close(program.state_dict()["queue.contents"], eager.queue.contents)


class Masked(nn.Module):
    def forward(self, query: Tensor, key: Tensor, negatives: Tensor, mask: Tensor) -> Tensor:
        return functional.eqco_loss(query, key, negatives, negative_mask=mask)


@pytest.mark.parametrize("strict", [False, True])
def test_a_mask_for_each_query_exports_for_every_batch_size(strict: bool, fresh_compiler: None) -> None:
    """Also where a batch has as many queries as each of them has keys."""
    given = *ROWS, torch.randn(8, 3, 4), torch.ones(8, 3, dtype=torch.bool)
    n = torch.export.Dim("n", min=2, max=32)
    program = torch.export.export(Masked(), given, dynamic_shapes=({0: n},) * 4, strict=strict).module()
    for rows in (3, 6):
        some = (torch.randn(rows, 4), torch.randn(rows, 4), torch.randn(rows, 3, 4))
        mask = torch.ones(rows, 3, dtype=torch.bool)
        torch.testing.assert_close(program(*some, mask), functional.eqco_loss(*some, negative_mask=mask))
