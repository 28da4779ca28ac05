"""Formatting of quantities for people: one place, so that every table and log line reads alike."""

_LARGE = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_count(value: float) -> str:
    """A plain count with a decimal prefix: 124_400_000 -> "124.4 M", 950 -> "950"."""
    value = float(f"{value:.4g}")  # first, so that 999_999 is 1 M and not 1000 k
    for factor, prefix in _LARGE:
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}"
    return f"{value:.4g}"


def format_bytes(value_bytes: float) -> str:
    """A size in binary units: 6_442_450_944 -> "6.00 GiB"."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if round(1024 * abs(value_bytes) / factor, 2) >= 1024:  # would print as 1024.00 of the unit below
            return f"{value_bytes / factor:.2f} {unit}"
    return f"{value_bytes:.0f} B"


def format_duration(value_s: float) -> str:
    """A duration: 3725 -> "1 h 02 min", 75 -> "1 min 15 s", 3.2 -> "3.2 s"."""
    value_s = round(value_s, 1)
    if value_s >= 3600:
        return f"{int(value_s // 3600)} h {int(value_s % 3600 // 60):02d} min"
    if value_s >= 60:
        return f"{int(value_s // 60)} min {int(value_s % 60):02d} s"
    return f"{value_s:.1f} s"
