"""Numbers with their units, for people."""

_SIZES = ("B", "KiB", "MiB", "GiB")


def size(count: int) -> str:
    """Bytes: 8192 are 8 KiB."""
    power = min(max(count, 1).bit_length() - 1, 39) // 10
    value = count / 1024**power
    return f"{value:.0f} {_SIZES[power]}" if value >= 100 else f"{value:.3g} {_SIZES[power]}"


def work(flops: float) -> str:
    """FLOPs: 85065728 are 85.1 MFLOPs."""
    value = float(flops)
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {unit}FLOPs"
        value /= 1000
    return f"{value:.3g} TFLOPs"


def duration(seconds: float) -> str:
    """Seconds, of which 0 means that nobody measured."""
    if not seconds:
        return "—"
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits; what is not known is a dash."""
    return "—" if value is None else f"{value:.{digits}g}"


def fixed(value: float | None, digits: int) -> str:
    """Decimal places; what is not known is a dash."""
    return "—" if value is None else f"{value:.{digits}f}"
