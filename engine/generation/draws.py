"""Which uniform number a token is drawn with: number t of the request's own stream, and nothing else.

Counter-based: no state is kept, so slot, batch and timing cannot matter. ``engine.streams`` makes the keys.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniforms(keys_n: npt.NDArray[np.uint64], counters_n: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """[n] float64 in [0, 1) with 53 random bits: number ``counters_n[i]`` of stream ``keys_n[i]``.

    Key and counter are mixed apart before they meet: adding a counter to a key, as plain SplitMix64 does, would let two
    streams whose keys lie close run into each other.
    """
    bits_n = _mix(_mix(keys_n) ^ _mix(counters_n * _GOLDEN + _GOLDEN))
    return (bits_n >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits_n: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64: a bijection in which every input bit moves half of the output bits."""
    bits_n = (bits_n ^ (bits_n >> np.uint64(30))) * _MIX_1
    bits_n = (bits_n ^ (bits_n >> np.uint64(27))) * _MIX_2
    mixed_n: npt.NDArray[np.uint64] = bits_n ^ (bits_n >> np.uint64(31))
    return mixed_n
