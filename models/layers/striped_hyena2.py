"""The short and medium explicit Hyena operators of StripedHyena 2 (Ku et al. 2025, arXiv 2503.01868)."""

from __future__ import annotations

from madkernels.models.layers.base import StateOption, check_positive
from madkernels.models.layers.filters import RegularisedFilter
from madkernels.models.layers.hyena import LongConvLayer
from madkernels.models.layers.linear import Linear


def by_taps(taps: int, state: int, wanted: int) -> float:
    return 1 + (taps - 1) * wanted / state


class HyenaSE(LongConvLayer):
    """Short explicit: ``out(q * (filter conv (k * v)))`` with q, k, v through a short convolution, and a filter of few taps.

    Args:
        groups: filters; dim / groups neighbouring channels share one.
        taps: of a filter; the state is the last taps - 1 inputs.
        width: of the short convolution.
    """

    state_option = StateOption("taps", by_taps)

    def __init__(self, dim: int, *, groups: int = 16, taps: int = 7, width: int = 3) -> None:
        check_positive(groups=groups, taps=taps, width=width)
        if dim % groups:
            raise ValueError(f"dim {dim} does not divide into {groups} groups")
        super().__init__(
            dim, projected=3 * dim, repeats=1, width=width, channels=dim, filters=groups, order=1, horizon=1, taps=taps
        )
        self.out = Linear(dim, dim)

    def flops(self, seqlen: int) -> int:
        """Projections 8 L D^2, short convolution 6 L D W, filter 2 L D for each tap, gates 4 L D."""
        return seqlen * self.dim * (8 * self.dim + 6 * self.width + 2 * self.taps + 4)


class HyenaMR(HyenaSE):
    """Medium regularised: as :class:`HyenaSE`, with more taps, under a decay that gets faster from filter to filter."""

    def __init__(self, dim: int, *, groups: int = 16, taps: int = 128, width: int = 3) -> None:
        super().__init__(dim, groups=groups, taps=taps, width=width)
        self.filter = RegularisedFilter(groups, taps)
