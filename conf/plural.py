"""Writes a number with its unit for messages: `1 rank`, `2 ranks`."""


def plural(count: int, unit: str) -> str:
    """`1 row`, `2 rows`, `1,000 rows`, `2 copies`."""
    if count == 1:
        return f"{count} {unit}"
    return f"{count:,} {unit.removesuffix('y') + 'ies' if unit.endswith('y') else unit + 's'}"
