"""The table of rules: operation name → how it passes between two points.

Adding an operation is a line here: its name among the kinds of :mod:`kxexplain.gradients.rules`, or a function
that writes it in elementary operations (:mod:`~kxexplain.gradients.composites`,
:mod:`~kxexplain.gradients.norms`). What has no line is passed by secant, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from kxexplain.gradients import composites, norms, recurrent, rules
from kxexplain.gradients.rules import Rule

QUADRATIC = """
    add sub rsub neg mul matmul mm bmm mv dot inner outer addmm addbmm baddbmm addmv addr einsum tensordot kron
    linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution conv_tbc
    view reshape view_as reshape_as transpose t permute movedim flatten unflatten squeeze unsqueeze expand expand_as
    getitem select narrow index_select gather take take_along_dim chunk split split_with_sizes unbind tensor_split
    hsplit vsplit cat stack hstack vstack dstack repeat tile repeat_interleave roll flip rot90 diagonal diag diag_embed
    tril triu unfold im2col col2im pad constant_pad_nd sum mean cumsum diff trace lerp addcmul square atleast_1d
    atleast_2d atleast_3d broadcast_to broadcast_tensors meshgrid scatter_add index_add index_copy masked_fill
    masked_select masked_scatter scatter slice_scatter select_scatter float double half bfloat16 to type type_as clone
    contiguous cpu cuda mT get:T get:mT get:H get:mH get:real avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d pixel_shuffle
    pixel_unshuffle channel_shuffle native_channel_shuffle cross vdot fold as_strided new_tensor iter
    where nll_loss_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d _pad_circular _pad
    alias
""".split()
SMOOTH = """
    tanh sigmoid exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan sinh cosh asin acos atan asinh acosh atanh
    erf erfc erfinv reciprocal gelu silu mish softplus logsigmoid softsign tanhshrink lgamma special_erf
    special_expit special_ndtr logit sinc
""".split()
KINKED: dict[str, tuple[float, ...]] = {
    "elu": (0.0,), "selu": (0.0,), "celu": (0.0,), "hardswish": (-3.0, 3.0), "abs": (0.0,),
}  # fmt: skip
PIECEWISE_LINEAR = """
    leaky_relu rrelu relu6 hardtanh hardsigmoid clamp clamp_min clamp_max threshold softshrink hardshrink sign round
    floor ceil trunc frac
""".split()
"""Elementwise and of constant slope between kinks: the plain quotient, which cannot lose digits."""
NEW = "new_zeros new_ones new_full zeros_like ones_like full_like".split()
READS = "item tolist numpy bool int float index array complex contains format repr str".split()
"""A value leaves torch."""


def _by_signature(rule: Callable[..., Any]) -> Rule:
    """For rules written with the operation's own signature."""
    return lambda func, args, kwargs: rule(func, *args, **kwargs)


COMPOSITE: dict[str, Rule] = {
    "embedding": composites.embedding,
    "softmax": composites.softmax,
    "log_softmax": composites.log_softmax,
    "logsumexp": composites.logsumexp,
    "div": composites.divide,
    "pow": composites.power,
    "maximum": composites.maximum,
    "minimum": composites.minimum,
    "prelu": composites.prelu,
    "glu": composites.glu,
    "bilinear": composites.bilinear,
    "embedding_bag": composites.embedding_bag,
    "dropout": composites.dropout,
    "feature_dropout": composites.dropout,
    "alpha_dropout": composites.dropout,
    "feature_alpha_dropout": composites.dropout,
    "scaled_dot_product_attention": _by_signature(composites.attention),
    "cross_entropy_loss": composites.cross_entropy,
    "mse_loss": composites.mse,
    "var": norms.variance,
    "std": norms.deviation,
    "linalg_vector_norm": _by_signature(norms.vector_norm),
    "layer_norm": _by_signature(norms.layer_norm),
    "rms_norm": _by_signature(norms.rms_norm),
    "group_norm": _by_signature(norms.group_norm),
    "batch_norm": _by_signature(norms.batch_norm),
    "instance_norm": _by_signature(norms.instance_norm),
    **dict.fromkeys(recurrent.CELLS, recurrent.rule),
}

RULES: dict[str, Rule] = (
    dict.fromkeys(QUADRATIC, rules.quadratic)
    | dict.fromkeys(SMOOTH, rules.elementwise)
    | {name: partial(rules.elementwise, kinks=kinks) for name, kinks in KINKED.items()}
    | dict.fromkeys(PIECEWISE_LINEAR, rules.piecewise_linear)
    | dict.fromkeys(READS, composites.read)
    | dict.fromkeys(NEW, rules.constant)
    | dict.fromkeys(("detach", "get:data", "requires_grad_", "positive"), rules.same)
    | {"relu": rules.relu, "setitem": rules.assign}
    | COMPOSITE
)

RANDOM = frozenset("dropout feature_dropout alpha_dropout feature_alpha_dropout rrelu bernoulli".split())
DETERMINISTIC = (
    frozenset((*QUADRATIC, *SMOOTH, *KINKED, *PIECEWISE_LINEAR))
    | frozenset(
        "softmax log_softmax logsumexp div pow maximum minimum glu relu var std linalg_vector_norm layer_norm".split()
    )
    | frozenset("rms_norm _weight_norm norm norm_except_dim amax amin prod cumprod".split())
) - RANDOM
"""What may be computed again on the same arguments, with the same result and nothing else changed."""
