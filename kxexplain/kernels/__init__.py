"""Kernels made of gradients: the tangent kernel at a state, the path kernel along training, and quadrature rules."""

from kxexplain.kernels.path import flow_weights, path_kernel
from kxexplain.kernels.quadrature import Rule, gauss_legendre, rule
from kxexplain.kernels.tangent import TangentKernel, tangent_kernel

__all__ = ["Rule", "TangentKernel", "flow_weights", "gauss_legendre", "path_kernel", "rule", "tangent_kernel"]
