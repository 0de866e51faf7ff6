"""The modules of github.com/ndrplz/ConvLSTM_pytorch, whose contract is that of fastris' own.

What differs: a ``hidden_state`` works, ``kernel_size`` may be an int or even, the zero state has the module's dtype,
and ``layer_outputs`` are transposed views (``.reshape`` where a caller has ``.view``).
"""

from fastris.nn.convlstm import ConvLSTM, ConvLSTMCell

__all__ = ["ConvLSTM", "ConvLSTMCell"]
