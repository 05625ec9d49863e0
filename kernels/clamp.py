"""A soft upper bound for the squared ReLU: g = s tanh(r / s) takes the place of r = relu(h).

    z = r / s >= 0      q = e^(-2 z)      g = s (1 - q) / (1 + q)      dg/dr = 4 q / (1 + q)^2

Where r is small beside s nothing changes; a = p g^2 stays below p s^2. Later Megatron-Core calls s
`activation_func_tanh_clamp_scale`. q lies between 0 and 1, so nothing overflows, and the slope never is 1 - tanh^2,
which has no digits left where tanh is near 1. 1 - q has none near z = 0: there tanh is its series.
"""

import triton
import triton.language as tl


@triton.jit
def soft_clamp(r, s):
    """g for r = relu(h), float32; NaN stays NaN."""
    z = r / s
    q = tl.exp(-2.0 * z)
    # Below 1/4 the series' first absent term, 1382/155925 z^10 of the sum, is 8e-9: an eighth of float32's half unit.
    zz = z * z
    series = z + z * zz * (-1.0 / 3 + zz * (2.0 / 15 + zz * (-17.0 / 315 + zz * (62.0 / 2835))))
    return s * tl.where(z < 0.25, series, (1.0 - q) / (1.0 + q))


@triton.jit
def soft_clamp_slope(r, s):
    """dg/dr for r = relu(h), float32; NaN stays NaN."""
    q = tl.exp(-2.0 * r / s)
    return 4.0 * q / ((1.0 + q) * (1.0 + q))
