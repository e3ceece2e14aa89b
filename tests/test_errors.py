"""Every error is a ValueError or a TypeError that names the argument, what was expected, what came, and the way out.

Each row of the table: the call, and what its text must contain: the argument first, then what was expected, what came,
and the next step.
"""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue, functional, momentum_update
from tests import cases

N, K, D = 4, 6, 3
Call = Callable[[], object]


def rows(n: int = N, d: int = D, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1, 1, n * d).reshape(n, d).cos().to(dtype)


Q = rows()
SCALE = torch.tensor(1.6, requires_grad=True)  # CLIP's parameter
KEYS = rows(K)
IDS = torch.arange(N)
NAN: Any = float("nan")
KEY_IDS = torch.arange(K)


def filled(*, store_ids: bool = False, dim: int = D) -> MomentumQueue:
    queue = MomentumQueue(5, dim, store_ids=store_ids)
    queue.enqueue(rows(5, dim), torch.arange(5) if store_ids else None)
    return queue


class Row:
    """`kind` of two: a wrong type of a whole number, where either exception is a fair answer."""

    def __init__(
        self, name: str, call: Call, kind: type[Exception] | tuple[type[Exception], ...], *fragments: str
    ) -> None:
        self.name, self.call, self.kind, self.fragments = name, call, kind, fragments


def loss(*args: Any, **settings: Any) -> Call:
    """EqCoLoss(**settings)(*args, **tensors), with the tensors taken out of the settings."""
    names = ("query_ids", "negative_ids", "negative_mask")
    tensors = {name: settings.pop(name) for name in names if name in settings}
    return lambda: EqCoLoss(**settings)(*args, **tensors)


def lse(**arguments: Any) -> Call:
    return lambda: functional.negatives_logsumexp(Q, KEYS, **arguments)


def dual(**settings: Any) -> Call:
    return lambda: DualTempInfoNCE(**settings)(Q, Q)


def new_queue(*args: Any) -> Call:
    return lambda: MomentumQueue(*args)


def enqueue(queue: MomentumQueue, *args: Any) -> Call:
    return lambda: queue.enqueue(*args)


def update(*args: Any, **kwargs: Any) -> Call:
    return lambda: momentum_update(*args, **kwargs)


def net(out: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(3, out), nn.BatchNorm1d(out)).to(dtype)


TABLE = [
    # --------------------------------------------------------------------------------------------------------- settings
    Row("temperature 0", loss(Q, Q, temperature=0), ValueError, "temperature", "> 0", "0", "0.2"),
    Row("temperature < 0", loss(Q, Q, temperature=-0.5), ValueError, "temperature", "> 0", "-0.5", "0.2"),
    Row("alpha beyond floats", loss(Q, Q, KEYS, alpha=10**400), ValueError, "alpha", "1e+38", "1000", "65536"),
    Row("temperature of no float", loss(Q, Q, temperature=1e-40), ValueError, "temperature", "1e-37", "1e-40", "0.2"),
    Row("temperature nan", loss(Q, Q, temperature=float("nan")), ValueError, "temperature", "> 0", "nan", "0.2"),
    Row("temperature inf", loss(Q, Q, temperature=float("inf")), ValueError, "temperature", "finite", "inf", "0.2"),
    Row("temperature text", loss(Q, Q, temperature="0.2"), TypeError, "temperature", "number", "str", "tensor"),
    Row("temperature None", loss(Q, Q, temperature=None), TypeError, "temperature", "number", "NoneType", "tensor"),
    Row("temperature bool", loss(Q, Q, temperature=True), TypeError, "temperature", "number", "bool", "tensor"),
    Row(
        "temperature vector",
        loss(Q, Q, temperature=torch.ones(4)),
        ValueError,
        "temperature",
        "0-dim",
        "(4,)",
        "squeeze",
    ),
    Row(
        "temperature (1,)", loss(Q, Q, temperature=torch.ones(1)), ValueError, "temperature", "0-dim", "(1,)", "squeeze"
    ),
    Row(
        "temperature int tensor",
        loss(Q, Q, temperature=torch.tensor(1)),
        ValueError,
        "temperature",
        "floating",
        "int64",
    ),
    Row("temperature embeddings", lambda: EqCoLoss(Q), ValueError, "temperature", "0-dim", "(4, 3)", "to the call"),
    Row("embeddings by position", lambda: EqCoLoss(Q, Q), TypeError, "alpha", "a tensor (4, 3)", "to the call"),  # type: ignore[arg-type]
    Row(
        "learned temperature 0",
        loss(Q, Q, temperature=torch.tensor(0.0)),
        ValueError,
        "temperature",
        "> 0",
        "0.0",
        "exp",
    ),
    Row(
        "learned temperature < 0",
        loss(Q, Q, temperature=torch.tensor(-2.0)),
        ValueError,
        "temperature",
        "> 0",
        "-2.0",
        "exp",
    ),
    Row(
        "learned temperature nan",
        loss(Q, Q, temperature=torch.tensor(float("nan"))),
        ValueError,
        "temperature",
        "> 0",
        "nan",
    ),
    Row(
        "learned temperature inf",
        loss(Q, Q, temperature=torch.tensor(float("inf"))),
        ValueError,
        "temperature",
        "finite",
        "inf",
    ),
    Row(
        "a temperature with a graph",
        lambda: EqCoLoss((-SCALE).exp()),
        ValueError,
        "temperature",
        "nn.Parameter",
        "ExpBackward0",
        "in each step",
        "functional.eqco_loss(query, positive_key, temperature=(-scale).exp())",
    ),
    Row(
        "a temperature with a graph, dual",
        lambda: DualTempInfoNCE(1 / SCALE),
        ValueError,
        "temperature",
        "nn.Parameter",
        "Backward0",
        "in each step",
    ),
    Row(
        "alpha by position",
        lambda: EqCoLoss(0.2, 16),  # type: ignore[arg-type]
        TypeError,
        "alpha",
        "keyword",
        "16",
        "alpha=16",
        "num_negatives=16",
    ),
    Row(
        "alpha by position, dual",
        lambda: DualTempInfoNCE(0.2, 1.0, 16),  # type: ignore[arg-type]
        TypeError,
        "alpha",
        "keyword",
        "16",
        "alpha=16",
        "num_negatives=16",
    ),
    Row("alpha 0", loss(Q, Q, alpha=0), ValueError, "alpha", "> 0", "0", "None"),
    Row("alpha < 0", loss(Q, Q, alpha=-1.5), ValueError, "alpha", "> 0", "-1.5", "65536"),
    Row("alpha nan", loss(Q, Q, alpha=float("nan")), ValueError, "alpha", "> 0", "nan", "65536"),
    Row("alpha inf", loss(Q, Q, alpha=float("inf")), ValueError, "alpha", "finite", "inf", "65536"),
    Row("alpha text", loss(Q, Q, alpha="256"), TypeError, "alpha", "number", "str", "None"),
    Row("alpha tensor", loss(Q, Q, alpha=torch.tensor(256.0)), TypeError, "alpha", "number", "Tensor"),
    Row("inter_temperature 0", dual(inter_temperature=0.0), ValueError, "inter_temperature", "> 0", "0.0", "1.0"),
    Row("inter_temperature < 0", dual(inter_temperature=-1), ValueError, "inter_temperature", "> 0", "-1", "1.0"),
    Row(
        "inter_temperature tensor",
        dual(inter_temperature=torch.tensor(1.0)),
        TypeError,
        "inter_temperature",
        "number",
        "tensor",
        "float",
    ),
    Row(
        "inter_temperature None", dual(inter_temperature=None), TypeError, "inter_temperature", "number", "None", "1.0"
    ),
    Row("dual temperature 0", dual(temperature=0.0), ValueError, "temperature", "> 0", "0.0"),
    Row("dual alpha 0", dual(alpha=0), ValueError, "alpha", "> 0", "0", "None"),
    Row("num_negatives 0", loss(Q, Q, num_negatives=0), ValueError, "num_negatives", ">= 1", "0", "None"),
    Row("num_negatives < 0", loss(Q, Q, num_negatives=-3), ValueError, "num_negatives", ">= 1", "-3", "None"),
    Row(
        "num_negatives float",
        loss(Q, Q, num_negatives=2.0),
        (ValueError, TypeError),
        "num_negatives",
        "integer",
        "2.0",
        "None",
    ),
    Row(
        "num_negatives bool",
        loss(Q, Q, num_negatives=True),
        (ValueError, TypeError),
        "num_negatives",
        "integer",
        "True",
    ),
    Row(
        "num_negatives with keys",
        loss(Q, Q, KEYS, num_negatives=2),
        ValueError,
        "num_negatives",
        "negative_keys",
        "2",
        "negative_keys[:K]",
    ),
    Row(
        "num_negatives with a queue",
        loss(Q, Q, filled(), num_negatives=2),
        ValueError,
        "num_negatives",
        "negative_keys",
        "2",
    ),
    Row("sampling", loss(Q, Q, sampling="uniform"), ValueError, "sampling", "'rolled'", "'random'", "'uniform'"),
    Row("reduction", loss(Q, Q, reduction="avg"), ValueError, "reduction", "'none'", "'mean'", "'sum'", "'avg'"),
    Row("in_batch nearly", loss(Q, Q, in_batch="view"), ValueError, "in_batch", "'keys'", "'view'", "Write 'views'."),
    Row("backend's case", loss(Q, Q, backend="Triton"), ValueError, "backend", "'Triton'", "Write 'triton'."),
    Row("backend of no near name", loss(Q, Q, backend="gpu"), ValueError, "backend", "'gpu'", "Pick one of these."),
    Row("reduction None", loss(Q, Q, reduction=None), (ValueError, TypeError), "reduction", "'none'", "None"),
    Row("unhashable setting", loss(Q, Q, reduction=["mean"]), (ValueError, TypeError), "reduction", "'mean'"),
    Row("backend", loss(Q, Q, backend="cuda"), ValueError, "backend", "'auto'", "'torch'", "'cuda'"),
    Row(
        "temperature elsewhere",
        loss(Q, Q, temperature=torch.tensor(0.2, device="meta")),
        ValueError,
        "temperature",
        "cpu",
        "meta",
        "temperature.to(query.device)",
    ),
    Row(
        "backend that cannot serve",
        loss(Q.double(), Q.double(), backend="triton"),
        ValueError,
        "backend",
        "'auto'",
        "'torch'",
        "'triton'",
    ),
    # ------------------------------------------------------------------------------------------------ shapes and dtypes
    Row("query vector", loss(Q[0], Q), ValueError, "query", "(N, D)", "(3,)", "flatten"),
    Row("query feature map", loss(Q[:, :, None, None], Q), ValueError, "query", "(N, D)", "(4, 3, 1, 1)", "flatten"),
    Row("query of views", loss(torch.stack([Q, Q], 1), Q), ValueError, "query", "(N, D)", "(4, 2, 3)", "x.unbind(1)"),
    Row("query list", loss([[1.0]], Q), TypeError, "query", "Tensor", "list", "as_tensor"),
    Row("query list of rows", loss(list(Q), Q), TypeError, "query", "Tensor", "list", "torch.stack(query)"),
    Row("query array", loss(Q.numpy(), Q), TypeError, "query", "Tensor", "ndarray", "as_tensor"),
    Row("labels first", loss(IDS, Q), TypeError, "query", "float32", "int64", "query_ids=labels"),
    Row("query integers", loss(Q.long(), Q), TypeError, "query", "float32", "int64", "query.float()"),
    Row("query complex", loss(Q.to(torch.complex64), Q), TypeError, "query", "float32", "complex64"),
    Row("query no rows", loss(Q[:0], Q[:0]), ValueError, "query", "N >= 1", "(0, 3)", "drop_last"),
    Row("query no features", loss(Q[:, :0], Q[:, :0]), ValueError, "query", "D >= 1", "(4, 0)"),
    Row("query None", loss(None, Q), TypeError, "query", "Tensor", "NoneType"),
    Row("positive rows", loss(Q, Q[:3]), ValueError, "positive_key", "(4, 3)", "(3, 3)"),
    Row("positive width", loss(Q, rows(4, 2)), ValueError, "positive_key", "(4, 3)", "(4, 2)"),
    Row("positive rank", loss(Q, Q[0]), ValueError, "positive_key", "(N, D)", "(3,)"),
    Row("labels", loss(Q, IDS), TypeError, "positive_key", "float32", "int64 of shape (4,)", "query_ids=labels"),
    Row("labels of two dims", loss(Q, IDS[:, None]), TypeError, "positive_key", "int64 of shape (4, 1)", "query_ids="),
    Row("labels, bool", loss(Q, IDS > 1), TypeError, "positive_key", "float32", "bool", "query_ids=labels"),
    Row("labels third", loss(Q, Q, IDS), TypeError, "negative_keys", "float32", "int64", "query_ids", "negative_ids"),
    Row("positive array", loss(Q, Q.numpy()), TypeError, "positive_key", "Tensor", "ndarray", "as_tensor"),
    Row(
        "several positives",
        loss(Q, torch.stack([Q, Q], 1)),
        ValueError,
        "positive_key",
        "(N, D)",
        "(4, 2, 3)",
        "query.repeat_interleave(2, 0), positive_key.flatten(0, 1)",
        "torch.arange(4, device=query.device).repeat_interleave(2)",
    ),
    Row("positive integers", loss(Q, Q.long()), TypeError, "positive_key", "float32", "int64", "positive_key.float()"),
    Row("positive dtype", loss(Q, Q.double()), ValueError, "positive_key", "float32", "float64", "positive_key.to"),
    Row("positive device", loss(Q, Q.to("meta")), ValueError, "positive_key", "cpu", "meta", "positive_key.to"),
    Row("negatives width", loss(Q, Q, rows(6, 2)), ValueError, "negative_keys", "(K, D)", "(6, 2)", "D = 3"),
    Row("negatives MoCo layout", loss(Q, Q, rows(D, 7)), ValueError, "negative_keys", "(K, D)", "(3, 7)", ".T"),
    Row("negatives rank 1", loss(Q, Q, Q[0]), ValueError, "negative_keys", "(K, D)", "(3,)"),
    Row("negatives rank 4", loss(Q, Q, Q[None, None]), ValueError, "negative_keys", "(K, D)", "(1, 1, 4, 3)"),
    Row(
        "negatives of other queries",
        loss(Q, Q, Q[None]),
        ValueError,
        "negative_keys",
        "(N, K, D)",
        "(1, 4, 3)",
        "N = 4",
    ),
    Row("no negatives", loss(Q, Q, KEYS[:0]), ValueError, "negative_keys", "K >= 1", "(0, 3)"),
    Row("no negatives per query", loss(Q, Q, Q[:, None][:, :0]), ValueError, "negative_keys", "K >= 1", "(4, 0, 3)"),
    Row("negatives integers", loss(Q, Q, KEYS.long()), TypeError, "negative_keys", "float32", "int64"),
    Row("negatives list", loss(Q, Q, [KEYS]), TypeError, "negative_keys", "Tensor", "MomentumQueue", "list"),
    Row(
        "negatives device", loss(Q, Q, KEYS.to("meta")), ValueError, "negative_keys", "cpu", "meta", "negative_keys.to"
    ),
    Row(
        "one row, no other negatives", loss(Q[:1], Q[:1]), ValueError, "query", "at least 2", "(1, 3)", "negative_keys"
    ),
    Row(
        "one row, num_negatives",
        loss(Q[:1], Q[:1], num_negatives=1),
        ValueError,
        "query",
        "at least 2",
        "(1, 3)",
        "drop_last",
    ),
    # -------------------------------------------------------------------------------------------------------------- ids
    Row("ids too short", loss(Q, Q, query_ids=IDS[:3]), ValueError, "query_ids", "(4,)", "(3,)"),
    Row("ids of two dims", loss(Q, Q, query_ids=IDS[:, None]), ValueError, "query_ids", "(4,)", "(4, 1)"),
    Row("ids float", loss(Q, Q, query_ids=IDS.float()), TypeError, "query_ids", "integer", "float32", "long"),
    Row("ids unsigned", loss(Q, Q, query_ids=IDS.to(torch.uint32)), TypeError, "query_ids", "int64", "uint32", "long"),
    Row(
        "queue ids unsigned",
        enqueue(filled(store_ids=True), Q, IDS.to(torch.uint64)),
        TypeError,
        "ids",
        "integer",
        "uint64",
        "long",
    ),
    Row("ids bool", loss(Q, Q, query_ids=IDS > 1), TypeError, "query_ids", "integer", "bool", "long"),
    Row("ids list", loss(Q, Q, query_ids=[0, 1, 2, 3]), TypeError, "query_ids", "tensor", "list", "torch.tensor"),
    Row("ids device", loss(Q, Q, query_ids=IDS.to("meta")), ValueError, "query_ids", "cpu", "meta"),
    Row("ids, one side", loss(Q, Q, KEYS, query_ids=IDS), ValueError, "negative_ids", "(K,)", "None", "both"),
    Row("ids, the other side", loss(Q, Q, KEYS, negative_ids=KEY_IDS), ValueError, "query_ids", "(N,)", "None", "both"),
    Row(
        "negative ids in a batch",
        loss(Q, Q, query_ids=IDS, negative_ids=IDS),
        ValueError,
        "negative_ids",
        "None",
        "query_ids",
    ),
    Row("only negative ids in a batch", loss(Q, Q, negative_ids=IDS), ValueError, "negative_ids", "None", "query_ids"),
    Row(
        "negative ids too long",
        loss(Q, Q, KEYS, query_ids=IDS, negative_ids=torch.arange(7)),
        ValueError,
        "negative_ids",
        "(6,)",
        "(4, 6)",
        "(7,)",
    ),
    Row(
        "negative ids transposed",
        loss(Q, Q, KEYS, query_ids=IDS, negative_ids=torch.zeros(6, 4, dtype=torch.long)),
        ValueError,
        "negative_ids",
        "(4, 6)",
        "(6, 4)",
    ),
    Row(
        "negative ids float",
        loss(Q, Q, KEYS, query_ids=IDS, negative_ids=KEY_IDS.float()),
        TypeError,
        "negative_ids",
        "integer",
        "float32",
    ),
    Row("queue without ids", loss(Q, Q, filled(), query_ids=IDS), ValueError, "query_ids", "None", "store_ids=True"),
    Row(
        "negative ids with a queue",
        loss(Q, Q, filled(store_ids=True), query_ids=IDS, negative_ids=torch.arange(5)),
        ValueError,
        "negative_ids",
        "None",
        "store_ids",
    ),
    Row(
        "ids leave a row nothing",
        loss(Q, Q, KEYS, query_ids=torch.tensor([0, 7, 7, 7]), negative_ids=torch.zeros(6, dtype=torch.long)),
        ValueError,
        "query 0",
        "no negatives",
        "ids",
    ),
    Row(
        "one image in the whole batch",
        loss(Q, Q, query_ids=torch.zeros(4, dtype=torch.long)),
        ValueError,
        "query 0",
        "no negatives",
        "ids",
    ),
    Row(
        "ids leave a queue's row nothing",
        lambda: EqCoLoss()(Q, Q, one_id_queue(), query_ids=torch.tensor([1, 1, 3, 1])),
        ValueError,
        "query 2",
        "no negatives",
        "ids",
    ),
    # ------------------------------------------------------------------------------------------------------------- mask
    Row("mask in a batch", loss(Q, Q, negative_mask=IDS > 1), ValueError, "negative_mask", "None", "query_ids"),
    Row("mask list", loss(Q, Q, KEYS, negative_mask=[True] * K), TypeError, "negative_mask", "(6,)", "list", "tensor"),
    Row("mask array", loss(Q, Q, KEYS, negative_mask=IDS.numpy()), TypeError, "negative_mask", "bool", "ndarray"),
    Row(
        "mask of ones and zeros",
        loss(Q, Q, KEYS, negative_mask=KEY_IDS),
        TypeError,
        "negative_mask",
        "bool, True where a key is a negative",
        "int64",
        "negative_mask.bool()",
    ),
    Row(
        "mask as it is added to logits",
        loss(Q, Q, KEYS, negative_mask=torch.zeros(N, K)),
        TypeError,
        "negative_mask",
        "bool",
        "float32",
        "negative_mask == 0",
    ),
    Row(
        "mask transposed",
        loss(Q, Q, KEYS, negative_mask=torch.ones(K, N, dtype=torch.bool)),
        ValueError,
        "negative_mask",
        "(6,) or (4, 6)",
        "(6, 4)",
        "one place for each key",
    ),
    Row(
        "mask of the rows",
        loss(Q, Q, Q[:, None], negative_mask=IDS > 1),
        ValueError,
        "negative_mask",
        "(1,) or (4, 1)",
        "(4,)",
    ),
    Row(
        "mask device",
        loss(Q, Q, KEYS, negative_mask=(KEY_IDS > 1).to("meta")),
        ValueError,
        "negative_mask",
        "cpu",
        "meta",
    ),
    Row(
        "mask of a queue's keys and not of its slots",
        lambda: EqCoLoss()(Q, Q, one_id_queue(), query_ids=IDS, negative_mask=torch.ones(2, dtype=torch.bool)),
        ValueError,
        "negative_mask",
        "(5,) or (4, 5)",
        "(2,)",
        "each slot of queue.contents",
    ),
    Row(
        "mask leaves a row nothing",
        loss(Q, Q, KEYS, negative_mask=(IDS != 2)[:, None].expand(N, K)),
        ValueError,
        "query 2",
        "no negatives",
        "mask",
    ),
    Row(
        "mask leaves all rows nothing",
        loss(Q, Q, filled(), negative_mask=torch.zeros(5, dtype=torch.bool)),
        ValueError,
        "query 0",
        "no negatives",
        "mask",
    ),
    # ------------------------------------------------------------------------------------------------------------ queue
    Row(
        "queue never filled",
        loss(Q, Q, MomentumQueue(5, D)),
        ValueError,
        "negative_keys",
        "MomentumQueue",
        "empty",
        "enqueue",
    ),
    Row("queue width", loss(Q, Q, filled(dim=2)), ValueError, "negative_keys", "dim 3", "dim 2", "MomentumQueue(5, 3)"),
    Row("queue device", loss(Q, Q, filled().to("meta")), ValueError, "negative_keys", "cpu", "meta", "queue.to"),
    Row("queue size 0", lambda: MomentumQueue(0, 3), ValueError, "size", ">= 1", "0", "65536"),
    Row("queue size float", new_queue(4.0, 3), (ValueError, TypeError), "size", "integer", "4.0"),
    Row("queue dim", lambda: MomentumQueue(4, -1), ValueError, "dim", ">= 1", "-1", "128"),
    Row(
        "queue dtype", lambda: MomentumQueue(4, 3, dtype=torch.int8), TypeError, "dtype", "floating", "int8", "float32"
    ),
    Row("enqueue width", enqueue(MomentumQueue(5, 3), rows(4, 2)), ValueError, "keys", "(N, 3)", "(4, 2)", "dim"),
    Row("enqueue one key", enqueue(MomentumQueue(5, 3), Q[0]), ValueError, "keys", "(N, 3)", "(3,)"),
    Row("enqueue integers", enqueue(MomentumQueue(5, 3), Q.long()), TypeError, "keys", "floating", "int64", "float()"),
    Row("enqueue list", enqueue(MomentumQueue(5, 3), [[1.0, 2.0, 3.0]]), TypeError, "keys", "tensor", "list"),
    Row("enqueue device", enqueue(MomentumQueue(5, 3), Q.to("meta")), ValueError, "keys", "cpu", "meta", "to("),
    Row(
        "enqueue without ids",
        enqueue(MomentumQueue(5, 3, store_ids=True), Q),
        ValueError,
        "ids",
        "(N,)",
        "None",
        "store_ids",
    ),
    Row("enqueue unasked ids", enqueue(MomentumQueue(5, 3), Q, IDS), ValueError, "ids", "None", "store_ids"),
    Row(
        "enqueue too few ids",
        enqueue(MomentumQueue(5, 3, store_ids=True), Q, IDS[:2]),
        ValueError,
        "ids",
        "(4,)",
        "(2,)",
    ),
    Row(
        "enqueue float ids",
        enqueue(MomentumQueue(5, 3, store_ids=True), Q, IDS.float()),
        TypeError,
        "ids",
        "integer",
        "float32",
        "long",
    ),
    Row(
        "enqueue ids device",
        enqueue(MomentumQueue(5, 3, store_ids=True), Q, IDS.to("meta")),
        ValueError,
        "ids",
        "cpu",
        "meta",
        "to('cpu')",
    ),
    Row(
        "enqueue sparse ids",
        enqueue(MomentumQueue(5, 3, store_ids=True), Q, IDS.to_sparse()),
        TypeError,
        "ids",
        "dense",
        "sparse",
        "to_dense()",
    ),
    # --------------------------------------------------------------------------------------------------------- momentum
    Row("momentum > 1", update(net(), net(), 1.5), ValueError, "momentum", "1.5", "0.999"),
    Row("momentum < 0", update(net(), net(), -0.1), ValueError, "momentum", "-0.1", "0.999"),
    Row("momentum nan", update(net(), net(), float("nan")), ValueError, "momentum", "nan", "0.999"),
    Row("momentum text", update(net(), net(), "0.9"), (ValueError, TypeError), "momentum", "number", "'0.9'"),
    Row("buffers", update(net(), net(), buffers="all"), ValueError, "buffers", "'none'", "'copy'", "'ema'", "'all'"),
    Row(
        "encoder shapes",
        update(net(2), net(4)),
        ValueError,
        "key_encoder",
        "'0.weight'",
        "(2, 3)",
        "(4, 3)",
        "deepcopy",
    ),
    Row(
        "encoder names", update(net(), nn.Linear(3, 2)), ValueError, "key_encoder", "'0.weight'", "'weight'", "deepcopy"
    ),
    Row(
        "encoder lacks some",
        update(net(), nn.Sequential(nn.Linear(3, 2))),
        ValueError,
        "key_encoder",
        "'1.weight'",
        "missing",
    ),
    Row(
        "encoder has more",
        update(nn.Sequential(nn.Linear(3, 2)), net()),
        ValueError,
        "key_encoder",
        "'1.weight'",
        "deepcopy",
    ),
    Row("query encoder is no module", update([1], net()), TypeError, "query_encoder", "Module", "list"),
    Row(
        "key encoder is no module", update(net(), net().state_dict()), TypeError, "key_encoder", "Module", "OrderedDict"
    ),
    Row(
        "too coarse",
        update(net(dtype=torch.bfloat16), net(dtype=torch.bfloat16), 0.999),
        ValueError,
        "key_encoder",
        "bfloat16",
        "0.999",
        "float32",
    ),
    Row("cosine_momentum total", lambda: functional.cosine_momentum(0, 0), ValueError, "total_steps", "0"),
    Row("cosine_momentum step < 0", lambda: functional.cosine_momentum(-1, 10), ValueError, "step", "-1"),
    Row("cosine_momentum nan", lambda: functional.cosine_momentum(NAN, 10), ValueError, "step", "nan"),
    Row("cosine_momentum text", lambda: functional.cosine_momentum("1", 10), TypeError, "step", "number", "str"),  # type: ignore
    Row("cosine_momentum base", lambda: functional.cosine_momentum(1, 10, base=1.1), ValueError, "base", "1.1"),
    Row("cosine_momentum final", lambda: functional.cosine_momentum(1, 10, final=-0.1), ValueError, "final", "-0.1"),
    # ---------------------------------------------------------------------------------------------- negatives_logsumexp
    Row("lse query", lambda: functional.negatives_logsumexp(Q[0], KEYS), ValueError, "query", "(N, D)", "(3,)"),
    Row("lse keys", lambda: functional.negatives_logsumexp(Q, rows(6, 2)), ValueError, "keys", "(K, D)", "(6, 2)"),
    Row(
        "lse keys of other rows",
        lambda: functional.negatives_logsumexp(Q, Q[None]),
        ValueError,
        "keys",
        "(N, K, D)",
        "(1, 4, 3)",
    ),
    Row("lse no keys", lambda: functional.negatives_logsumexp(Q, KEYS[:0]), ValueError, "keys", "K >= 1", "(0, 3)"),
    Row(
        "lse temperature",
        lambda: functional.negatives_logsumexp(Q, KEYS, temperature=0.0),
        ValueError,
        "temperature",
        "> 0",
        "0.0",
    ),
    Row(
        "lse one side",
        lambda: functional.negatives_logsumexp(Q, KEYS, query_ids=IDS),
        ValueError,
        "query_ids, key_ids",
        "both",
    ),
    Row(
        "lse other side",
        lambda: functional.negatives_logsumexp(Q, KEYS, key_ids=KEY_IDS),
        ValueError,
        "query_ids, key_ids",
        "both",
    ),
    Row(
        "lse ids",
        lambda: functional.negatives_logsumexp(Q, KEYS, query_ids=IDS, key_ids=KEY_IDS[:2]),
        ValueError,
        "key_ids",
        "(6,)",
        "(2,)",
    ),
    Row("lse mask", lse(key_mask=KEY_IDS), TypeError, "key_mask", "bool", "int64", "key_mask.bool()"),
    Row("lse mask shape", lse(key_mask=IDS > 1), ValueError, "key_mask", "(6,) or (4, 6)", "(4,)", "each key"),
    Row("lse mask leaves nothing", lse(key_mask=KEY_IDS > 9), ValueError, "query 0", "no negatives", "mask"),
]


def one_id_queue() -> MomentumQueue:
    queue = MomentumQueue(5, D, store_ids=True)
    queue.enqueue(rows(2), torch.tensor([3, 3]))
    return queue


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_text(row: Row) -> None:
    with pytest.raises(row.kind) as caught:
        row.call()
    text = str(caught.value)
    assert type(caught.value) in (ValueError, TypeError)
    for fragment in row.fragments:
        assert fragment in text, f"{fragment!r} is not in: {text}"
    assert row.fragments[0] in text.split(":")[0] or text.startswith(row.fragments[0]), (
        f"does not start with the argument: {text}"
    )
    assert ("expected" in text and "got" in text) or "no negatives" in text, f"expected ..., got ...: {text}"
    # The way out is a sentence of its own after what came.
    assert re.search(r"got .*?[.:,;] \S.+$|\. [A-Z].+\.$", text), f"no next step in: {text}"
    assert text.endswith((".", ")")), text


def test_a_refused_enqueue_leaves_the_queue_alone() -> None:
    """Nothing half done: after an error the queue is what it was."""
    queue = filled(store_ids=True)
    before = copy.deepcopy(queue.state_dict())
    others = ((Q, IDS.to("meta")), (Q, IDS.to_sparse()), (Q.to("meta"), IDS))
    for bad in ((rows(4, 2), IDS), (Q, None), (Q, IDS[:2]), (Q.long(), IDS), *others):
        with pytest.raises((ValueError, TypeError)):
            queue.enqueue(*bad)
    assert all(torch.equal(before[name], value) for name, value in queue.state_dict().items())


@pytest.mark.parametrize("make", [EqCoLoss, DualTempInfoNCE])
@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 0.0},
        {"alpha": -1.0},
        {"num_negatives": 0},
        {"sampling": "x"},
        {"reduction": "x"},
        {"backend": "x"},
    ],
    ids=str,
)
def test_settings_are_checked_when_they_are_given(make: Callable[..., nn.Module], bad: dict[str, Any]) -> None:
    """In the constructor, not at the first batch; and in the functions just the same."""
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        make(**bad)
    function = functional.eqco_loss if make is EqCoLoss else functional.dual_temp_infonce
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        function(Q, Q, **{"temperature": 0.2, "alpha": 256.0, **bad})


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("method", ["__call__", "with_metrics"])
def test_every_door_checks_its_inputs(method: str, mode: str) -> None:
    """forward and with_metrics alike."""
    case = cases.Case(mode=mode)
    sample = cases.make(case)
    with pytest.raises(ValueError, match=r"positive_key.*\(7, 5\).*\(6, 5\)"):
        getattr(cases.criterion(case), method)(sample.query, sample.positive[:6], sample.negatives)


def test_momentum_update_changes_nothing_when_it_fails() -> None:
    """Names that differ in the buffers alone are found before the parameters move."""
    query, key = net(), net()
    key.register_buffer("more", torch.zeros(3))
    before = copy.deepcopy(key.state_dict())
    with pytest.raises(ValueError, match="more"):
        momentum_update(query, key, 0.5, buffers="ema")
    assert all(torch.equal(before[name], value) for name, value in key.state_dict().items())
    momentum_update(query, key, 0.5, buffers="none")  # with "none", buffers are nobody's business


def test_the_ways_out_lead_out() -> None:
    """What a message tells to write instead is accepted."""
    positives = torch.stack([Q, rows().flip(0)], 1)  # (N, P, D)
    repeated = EqCoLoss()(
        Q.repeat_interleave(2, 0),
        positives.flatten(0, 1),
        query_ids=IDS.repeat_interleave(2),
    )
    assert repeated.isfinite()
    EqCoLoss()(*torch.stack([Q, Q], 1).unbind(1), query_ids=IDS)
    for step in range(2):
        SCALE.grad = None
        functional.eqco_loss(Q, Q + step, temperature=(-SCALE).exp()).backward()
        assert SCALE.grad is not None
    with torch.no_grad():
        EqCoLoss((-SCALE).exp())(Q, Q)
    EqCoLoss((-SCALE).exp().detach())(Q, Q)
    EqCoLoss(SCALE)(Q, Q)


def test_choices_are_typed() -> None:
    """mypy checks this file, and an ignored error that it does not find is an error."""
    x, criterion = Q, EqCoLoss()
    returned: Tensor = criterion(x, x)
    assert returned.dim() == 0
    for wrong in (
        lambda: EqCoLoss(reduction="avg"),  # type: ignore[arg-type]
        lambda: EqCoLoss(in_batch="both"),  # type: ignore[arg-type]
        lambda: DualTempInfoNCE(sampling="uniform"),  # type: ignore[arg-type]
        lambda: functional.eqco_loss(x, x, backend="cuda"),  # type: ignore[arg-type]
        lambda: functional.dual_temp_infonce(x, x, reduction="avg"),  # type: ignore[arg-type]
        lambda: criterion(x, x, queue=x),  # type: ignore[call-arg]
        lambda: criterion(x, "x"),  # type: ignore[arg-type]
    ):
        with pytest.raises((ValueError, TypeError)):
            wrong()


@pytest.mark.parametrize("make", [EqCoLoss, DualTempInfoNCE])
def test_a_negative_temperature_in_a_graph_is_seen(make: Any, fresh_compiler: None) -> None:
    """Where nobody may ask for its value, as under torch.compile and on a GPU, loss and gradients are NaN."""
    temperature = nn.Parameter(torch.tensor(0.2))
    for settings in ({}, {"symmetric": True}, {"num_negatives": 2}, {"reduction": "none"}):
        criterion: Any = torch.compile(make(temperature, **settings), fullgraph=True, backend="aot_eager")
        query = Q.clone().requires_grad_()
        for value in (-0.2, 0.0, 0.2):
            with torch.no_grad():
                temperature.fill_(value)
            result = criterion(query, Q.flip(0))
            gradients: tuple[Tensor, ...] = torch.autograd.grad(result.sum(), (query, temperature))
            assert all(bool(x.isnan().all()) == (value <= 0) for x in (result, *gradients)), (settings, value)


def test_the_backend_of_what_is_no_call_is_an_error() -> None:
    criterion: Any = EqCoLoss()
    for wrong in ((Q.numpy(), Q), (Q, Q[:3]), (Q, Q, "keys"), (Q, Q, Q[:, 1:])):
        with pytest.raises((TypeError, ValueError), match=r"^(query|positive_key|negative_keys): expected"):
            criterion.chosen_backend(*wrong)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_not_dense() -> None:
    keys, queue = KEYS[: len(Q)], MomentumQueue(8, D)
    nested = [torch.nested.nested_tensor([Q, Q]), torch.nested.nested_tensor([Q, Q], layout=torch.jagged)]
    for x in (Q.to_sparse(), Q.to_sparse_csr(), Q.to_mkldnn(), *nested):
        calls: dict[str, Callable[[], Any]] = {
            "query": lambda x=x: EqCoLoss()(x, keys),  # type: ignore[misc]
            "negative_keys": lambda x=x: EqCoLoss()(Q, keys, x),  # type: ignore[misc]
            "keys": lambda x=x: queue.enqueue(x),  # type: ignore[misc]
        }
        for name, call in calls.items():
            way = rf"{name}\.to_padded_tensor" if name == "negative_keys" else rf"torch\.cat\({name}\.unbind\(\)\)"
            way = way if x.is_nested else rf"Use {name}\.to_dense\(\)"
            with pytest.raises(TypeError, match=rf"^{name}: expected a dense tensor, got .*{way}"):
                call()
    with pytest.raises(TypeError, match=r"Use query_ids\.to_dense\(\)"):
        EqCoLoss()(Q, keys, query_ids=torch.arange(len(Q)).to_sparse())
    with pytest.raises(TypeError, match=r"Use negative_mask\.to_dense\(\)"):
        EqCoLoss()(Q, keys, keys, negative_mask=torch.ones(len(Q), dtype=torch.bool).to_sparse())


def test_sharded_tensors() -> None:
    """A rank's own rows, or all of them, are what a loss takes."""
    queue = MomentumQueue(5, D)
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        sharded = DTensor.from_local(Q, init_device_mesh("cpu", (1,)), [Shard(0)])
        for name, call in {
            "query": lambda: EqCoLoss()(sharded, sharded),
            "negative_keys": lambda: EqCoLoss()(Q, Q, sharded),
            "keys": lambda: queue.enqueue(sharded),
        }.items():
            with pytest.raises(TypeError, match=rf"^{name}: expected a plain tensor, got a DTensor.*full_tensor\(\)"):
                call()  # type: ignore[no-untyped-call]
    finally:
        dist.destroy_process_group()
    assert not queue.primed


def test_backend_says_what_it_chose() -> None:
    name, reason = EqCoLoss().chosen_backend(Q, Q, KEYS)
    assert name == "torch"
    assert len(reason) > 10
    assert EqCoLoss(backend="torch").chosen_backend(Q, Q)[0] == "torch"
