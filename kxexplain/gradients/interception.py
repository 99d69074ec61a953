"""Reading calls to torch: what a function is called, and what runs beneath a composite one.

Both tracers (:mod:`kxexplain.gradients.capture` and :mod:`kxexplain.gradients.two_point`) see a model's
forward code through PyTorch's ``__torch_function__`` protocol. Two questions arise for every call, and
this module answers them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch

_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_ALIASES = {
    "truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "negative": "neg",
    "concat": "cat", "concatenate": "cat", "radd": "add", "rmul": "mul", "absolute": "abs", "swapaxes": "transpose",
    "swapdims": "transpose", "moveaxis": "movedim", "clip": "clamp", "iadd": "add_", "isub": "sub_", "imul": "mul_",
    "idiv": "div_", "itruediv": "div_", "ipow": "pow_", "rmatmul": "rmatmul", "log_sigmoid": "logsigmoid",
}  # fmt: skip


@cache
def name_of(function: Callable[..., Any]) -> str:
    """The operation's plain name: ``x + y``, ``x.add(y)`` and ``torch.add`` are all ``"add"``.

    Reading an attribute gives ``"get:shape"`` and the like.

    >>> import torch
    >>> name_of(torch.Tensor.__matmul__), name_of(torch.Tensor.shape.__get__)
    ('matmul', 'get:shape')
    """
    name = getattr(function, "__name__", type(function).__name__)
    if name in ("__get__", "__set__"):
        return f"{name.strip('_')}:{getattr(getattr(function, '__self__', None), '__name__', '?')}"
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
    return _ALIASES.get(name, name)


@cache
def transparent(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """A copy of a composite torch function that skips its own override check.

    ``torch.nn.functional.multi_head_attention_forward`` and its like are Python: they first ask whether
    an argument overrides torch functions and, if so, hand themselves over whole. The copy runs their body
    instead, so that the elementary operations inside are seen one by one. ``None`` for anything that is not
    such a function.

    >>> import torch
    >>> transparent(torch.nn.functional.layer_norm) is None, transparent(torch.tanh) is None
    (False, True)
    """
    if not isinstance(function, FunctionType) or not any(check in function.__globals__ for check in _CHECKS):
        return None
    if "__class__" in function.__code__.co_freevars:  # calls super(), which would hand itself over again
        return None
    blind = dict.fromkeys((c for c in _CHECKS if c in function.__globals__), _never)
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **blind},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@cache
def out_of_place(name: str) -> Callable[..., Any] | None:
    """The function that an in-place operation's name is the in-place version of.

    >>> import torch
    >>> out_of_place("relu_") is torch.Tensor.relu, out_of_place("relu") is None
    (True, True)
    """
    if not name.endswith("_") or name == "requires_grad_":
        return None
    for space in (torch.Tensor, torch, torch._C._nn):
        found: Callable[..., Any] | None = getattr(space, name[:-1], None)
        if found is not None:
            return found
    return None


def _never(*_: Any) -> bool:
    return False
