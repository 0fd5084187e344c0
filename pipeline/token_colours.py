"""How strongly a token is coloured, in classes of the report's style sheet: `up by3`, `down by1`, `even`."""

from collections.abc import Sequence

RATIO_SHADES = (0.05, 0.2, 0.5, 2.0)  # nats of difference from which a token has the next colour
SURPRISE_SHADES = (1.0, 2.0, 4.0, 8.0)  # nats below 0: probabilities of 37%, 14%, 1.8% and 0.03%


def choose_colour(value: float | None, shades: Sequence[float]) -> str:
    if value is None or abs(value) < shades[0]:
        return "even"
    shade = sum(abs(value) >= least for least in shades)
    return f"{'up' if value > 0 else 'down'} by{shade}"
