"""Stand-ins that tests share."""


class FixedRates:
    """Rates of round figures, at no cost."""

    def __init__(self) -> None:
        self.exp2: list[float] = []
        self.copy: list[float] = []
        self.states: list[dict[str, object]] = []

    def measure(self) -> None:
        self.exp2.append(1e9)
        self.copy.append(1e10)
