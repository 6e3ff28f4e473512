"""Stand-ins that tests share."""

from collections.abc import Sequence


class FixedRates:
    """Rates of round figures, at no cost."""

    def __init__(self, multiplied: Sequence[str] = ()) -> None:
        self.multiply: dict[str, list[float]] = {name: [] for name in multiplied}
        self.exp2: list[float] = []
        self.copy: list[float] = []
        self.states: list[dict[str, object]] = []

    def measure(self) -> None:
        self.exp2.append(1e9)
        self.copy.append(1e10)
        for found in self.multiply.values():
            found.append(1e11)
