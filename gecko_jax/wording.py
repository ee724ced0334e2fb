"""How messages word what they count."""


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 pair", "2,000 pairs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
