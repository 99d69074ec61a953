"""Gradients, example by example: ordinary ones at a state, discrete ones between two, and their inner products."""

from kxexplain.gradients.discrete import DiscreteGradient, Secant
from kxexplain.gradients.factors import Dense, Factors, Outer
from kxexplain.gradients.ordinary import StepGradients, layout_of, output_gradients, trainable
from kxexplain.gradients.products import diagonal, dot, gram, gram_trace, squared_norm

__all__ = [
    "Dense",
    "DiscreteGradient",
    "Factors",
    "Outer",
    "Secant",
    "StepGradients",
    "diagonal",
    "dot",
    "gram",
    "gram_trace",
    "layout_of",
    "output_gradients",
    "squared_norm",
    "trainable",
]
