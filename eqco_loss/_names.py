"""Arguments that a constructor or a function does not take, or is not given: an error that tells what was meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

# What papers and other packages call our arguments; of several, the first that the class or its call has
OTHER_NAMES = {
    **dict.fromkeys(("t", "tau", "temp", "moco_t", "softmax_temperature"), ("temperature",)),
    **dict.fromkeys(("intra_temperature", "temp_intra", "tau_intra"), ("temperature",)),
    "T": ("inter_temperature", "temperature"),
    **dict.fromkeys(("temperature2", "tau2", "tau_inter", "temp_inter"), ("inter_temperature",)),
    **dict.fromkeys(("k", "K", "n_negatives", "num_neg", "num_keys"), ("num_negatives", "size")),
    **dict.fromkeys(("capacity", "length", "maxlen", "queue_size", "bank_size", "memory_bank_size"), ("size",)),
    **dict.fromkeys(("d", "D", "width", "embed_dim", "embedding_dim", "feature_dim"), ("dim",)),
    **dict.fromkeys(("bank", "memory_bank", "memory", "queue", "negatives", "keys"), ("negative_keys", "keys")),
    "negative_keys": ("keys",),
    "negative_ids": ("key_ids",),
    "negative_mask": ("key_mask",),
    **dict.fromkeys(("ids", "labels"), ("query_ids", "store_ids")),
    **dict.fromkeys(("q", "anchor", "embeddings"), ("query",)),
    **dict.fromkeys(("positive", "positives", "key"), ("positive_key",)),
    "mask": ("negative_mask", "key_mask"),
    **dict.fromkeys(("bidirectional", "symmetrical"), ("symmetric",)),
    **dict.fromkeys(("l2_normalize", "cosine", "norm"), ("normalize",)),
    **dict.fromkeys(("gather_distributed", "distributed", "group", "process_group"), ("gather",)),
    **dict.fromkeys(("reduce", "size_average"), ("reduction",)),
    **dict.fromkeys(("m", "ema", "decay", "ema_decay"), ("momentum",)),
    **dict.fromkeys(("encoder_q", "model", "student", "online"), ("query_encoder",)),
    **dict.fromkeys(("encoder_k", "ema_model", "teacher"), ("key_encoder",)),
    "target": ("key_encoder", "query_ids"),
}
OTHER_WAYS = {
    **dict.fromkeys(("weight", "weights"), 'To weigh the queries give reduction="none", and weigh the loss of each.'),
    "inter_temperature": "DualTempInfoNCE has two temperatures.",
    **dict.fromkeys(
        ("logit_scale", "scale"), "A learned log(1 / t) goes to eqco_loss.functional: temperature=(-scale).exp()."
    ),
}
TO_THE_CALL = "Embeddings go to the call: criterion = EqCoLoss(), then criterion(query, positive_key)."
ONE_BATCH = (
    "positive_key: expected the second view of the batch, got none. Both views in one batch, (2N, D), are "
    "query, positive_key = embeddings.chunk(2); (N, 2, D) is embeddings.unbind(1)."
)
OF_A_CALL = ("query", "positive_key", "negative_keys", "query_ids", "negative_ids", "negative_mask")
OF_A_LOSS = (
    *("temperature", "inter_temperature", "alpha", "in_batch", "num_negatives", "sampling", "symmetric"),
    *("normalize", "gather", "reduction", "backend"),
)
OWNERS = {"forward": "a loss's call", "with_metrics": "with_metrics", "chosen_backend": "chosen_backend"}


def explains_names(function: Function) -> Function:
    """The same function, types included, which explains a keyword that it lacks, and views that came as one batch."""
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters
    known = [name for name, each in parameters.items() if each.kind in by_keyword and name != "self"]
    owner, _, name_of = function.__qualname__.rpartition(".")
    owner = owner if name_of == "__init__" else OWNERS.get(name_of, function.__qualname__)

    needed = sum(each.default is each.empty for each in parameters.values() if each.kind == each.POSITIONAL_OR_KEYWORD)

    @functools.wraps(function)
    def explained(*positional: Any, **keywords: Any) -> Any:
        try:  # to look first would take time at every step
            return function(*positional, **keywords)
        except TypeError:
            for name in keywords:
                if name not in known:
                    raise TypeError(explanation(owner, name, known)) from None
            if len(positional) == needed - 1 and known[1:2] == ["positive_key"] and "positive_key" not in keywords:
                raise TypeError(ONE_BATCH) from None
            raise

    return cast(Function, explained)


def check_positional(positional: tuple[object, ...]) -> None:
    """A second number by position could be alpha or the number of negatives."""
    if not positional:
        return
    got = ", ".join(f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x) for x in positional)
    ways = (
        f"alpha={positional[0]!r} says how many negatives to mimic, num_negatives={positional[0]!r} how many of the "
        "batch's each query meets."
    )
    tensors = any(isinstance(x, Tensor) for x in positional)
    raise TypeError(
        f"alpha: expected it and all that follow by keyword, got {got} by position. {TO_THE_CALL if tensors else ways}"
    )


def explanation(owner: str, name: str, known: list[str]) -> str:
    """What to write instead."""
    wrong = f"{name}: expected an argument of {owner} ({', '.join(known)}), got {name!r}."
    elsewhere, where = _elsewhere(known)
    if name in OTHER_WAYS and name not in elsewhere:
        return f"{wrong} {OTHER_WAYS[name]}"
    meant = [*OTHER_NAMES.get(name, OTHER_NAMES.get(name.lower(), ())), name]
    meant += difflib.get_close_matches(name.lower(), [*known, *elsewhere], n=1)
    for each in meant:
        if each in known:
            return f"{wrong} Write {each}=."
        if each in elsewhere:
            return f"{wrong} {each} belongs in {where.format(each)}."
    return f"{wrong} help({owner}) tells what each does." if owner.isidentifier() else wrong


def _elsewhere(known: list[str]) -> tuple[tuple[str, ...], str]:
    """What a constructor's call takes, or a call's constructor, and how it is written there."""
    if "positive_key" in known and "alpha" not in known:
        return OF_A_LOSS, "the constructor: EqCoLoss({}=...)"
    if "alpha" in known and "positive_key" not in known:
        return OF_A_CALL, "the call: criterion(query, positive_key, {}=...)"
    return (), ""
