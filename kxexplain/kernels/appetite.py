"""What one example takes while a kernel is computed, measured on one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kxexplain.gradients.capture import Capture
from kxexplain.gradients.factors import Factors, size
from kxexplain.gradients.ordinary import Select, differentiate, trainable, watched
from kxexplain.gradients.pile import bytes_per_row
from kxexplain.gradients.products import gram, gram_trace, pair_elements
from kxexplain.gradients.traced import passing
from kxexplain.gradients.uses import Layout
from kxexplain.shapes import Inputs
from kxexplain.trajectory.batches import copied


@dataclass(frozen=True)
class Appetite:
    """Bytes, and of what kind the kernel's entries are.

    Attributes:
        like: one entry, a number or for all pairs of outputs [C, C].
        columns: C.
        kept: for one example's gradients.
        working: while one example is differentiated.
        pair: while a pair of examples is multiplied.
        joint: while one example is differentiated and its gradients meet column by column
            (:func:`~kxexplain.gradients.traced.joint_trace`); 0 where none do.
        joint_pair: for a pair of examples, meanwhile.
    """

    like: Tensor
    columns: int
    kept: int
    working: int
    pair: int
    joint: int
    joint_pair: int


def appetite(model: nn.Module, one: Inputs, layout: Layout, select: Select | None, *, full: bool) -> Appetite:
    """Differentiate one example, all outputs in one pass, and see what it takes.

    Args:
        model: in the mode in which it will be evaluated.
        one: a batch of one example.
        layout: of the model.
        select: the quantities to differentiate; every output if ``None``.
        full: all pairs of outputs are wanted, not their trace.
    """
    saved = 0
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        if tensor.untyped_storage().data_ptr() not in own:
            saved += tensor.numel() * tensor.element_size()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        values, capture = watched(model, copied(one), layout, select)
        summed = differentiate(values.sum(1, keepdim=True), capture, trainable(model))
    columns = values.shape[1]
    factors = [factor.repeated(columns) for factor in summed]
    like = gram(factors, factors)[0, :, 0] if full else gram_trace(factors, factors)[0, 0]
    item, kept = like.element_size(), bytes_per_row(factors, 1)
    pair = item * pair_elements(factors, full=full)
    meeting = [] if full else passing(capture)
    joint = 3 * saved + 2 * _roomy(capture, meeting, factors, item) if meeting else 0
    # Every output's pass leaves gradients of about the size of what the forward pass saved.
    working = 2 * kept + (1 + columns) * saved
    return Appetite(like, columns, kept, working, pair, joint, pair + item * len(meeting))


def _roomy(capture: Capture, meeting: list[int], factors: Factors, item: int) -> int:
    """Bytes of the gradients that need room: at the uses that do not meet column by column, and made of them."""
    names = {source.name for number in meeting for source in capture.uses[number].sources.values()}
    others = [factor for factor in factors if factor.weight not in names]
    at_uses = sum(use.shape.numel() for number, use in enumerate(capture.uses) if number not in meeting)
    return size(others) + factors[0].columns * at_uses * item
