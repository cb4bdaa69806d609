"""The layers of time sequences, under the book's name: `from nnx.time_layers import *`.

As in the book, this gives all of `nnx.layers` too, the functions sigmoid, softmax and cross_entropy_error, and `np` and
`GPU`.
"""

from nnx import layers
from nnx.functions import cross_entropy_error, sigmoid, softmax
from nnx.layers import *
from nnx.np import GPU, np

__all__ = ["GPU", "cross_entropy_error", "np", "sigmoid", "softmax"]
__all__ += layers.__all__
