"""Arguments that a constructor does not take, by name or by position: an error that tells what was meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor

Init = TypeVar("Init", bound=Callable[..., None])

# What papers and other packages call our arguments; of several, the first that the class or its call has
OTHER_NAMES = {
    **dict.fromkeys(("t", "tau", "temp", "moco_t", "softmax_temperature"), ("temperature",)),
    "T": ("inter_temperature", "temperature"),
    **dict.fromkeys(("temperature2", "tau2", "tau_inter", "temp_inter"), ("inter_temperature",)),
    **dict.fromkeys(("k", "K", "n_negatives", "num_neg", "num_keys"), ("num_negatives", "size")),
    **dict.fromkeys(("capacity", "length", "maxlen", "queue_size", "bank_size", "memory_bank_size"), ("size",)),
    **dict.fromkeys(("d", "D", "width", "embed_dim", "embedding_dim", "feature_dim"), ("dim",)),
    **dict.fromkeys(("bank", "memory_bank", "memory", "queue", "negatives", "keys"), ("negative_keys",)),
    **dict.fromkeys(("ids", "labels"), ("query_ids", "store_ids")),
    "mask": ("negative_mask",),
    **dict.fromkeys(("bidirectional", "symmetrical"), ("symmetric",)),
    **dict.fromkeys(("l2_normalize", "cosine", "norm"), ("normalize",)),
    **dict.fromkeys(("gather_distributed", "distributed", "group", "process_group"), ("gather",)),
    **dict.fromkeys(("reduce", "size_average"), ("reduction",)),
}
OTHER_WAYS = {
    **dict.fromkeys(("weight", "weights"), 'To weigh the queries give reduction="none", and weigh the loss of each.'),
    "inter_temperature": "DualTempInfoNCE has two temperatures.",
}
TO_THE_CALL = "Embeddings go to the call: criterion = EqCoLoss(), then criterion(query, positive_key)."
OF_A_CALL = ("query", "positive_key", "negative_keys", "query_ids", "negative_ids", "negative_mask")


def explains_names(init: Init) -> Init:
    """The same constructor, signature and types included, which explains a keyword that it does not have."""
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [name for name, each in inspect.signature(init).parameters.items() if each.kind in by_keyword][1:]

    @functools.wraps(init)
    def explained(self: Any, *positional: Any, **keywords: Any) -> None:
        for name in keywords:
            if name not in known:
                raise TypeError(explanation(init.__qualname__.split(".")[0], name, known))
        init(self, *positional, **keywords)

    return cast(Init, explained)


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
    callable_with = OF_A_CALL if "alpha" in known else ()
    if name in OTHER_WAYS:
        return f"{wrong} {OTHER_WAYS[name]}"
    meant = [*OTHER_NAMES.get(name, OTHER_NAMES.get(name.lower(), ())), name]
    meant += difflib.get_close_matches(name.lower(), [*known, *callable_with], n=1)
    for each in meant:
        if each in known:
            return f"{wrong} Write {each}=."
        if each in callable_with:
            return f"{wrong} {each} belongs in the call: criterion(query, positive_key, {each}=...)."
    return f"{wrong} help({owner}) tells what each does."
