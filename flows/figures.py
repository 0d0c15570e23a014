"""How figures are written for people: times, counts, errors, shares.

It owns the form; it does not know what is counted.
"""

import math

TASKS = {
    "t2i": "text to image",
    "t2v": "text to video",
    "ti2v": "text and image to video",
    "prediction": "video prediction",
    "interpolation": "frame interpolation",
    "upsampling": "temporal upsampling",
    "multiview": "views of an object",
    "keyframes": "keyframes of a long video",
}

_NO_FIGURE = "\N{EN DASH}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def duration(seconds: float) -> str:
    """42 ms, 4.2 s, 42 s, 9 min 12 s."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms" if seconds >= 0.00995 else f"{1000 * seconds:.1f} ms"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def count(value: float) -> str:
    """Thousands apart: 1,234,567."""
    return f"{value:,.0f}"


def error(value: float) -> str:
    """A small number as two digits times a power of ten."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} \N{MULTIPLICATION SIGN} 10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def figure(value: float | None) -> str:
    """A whole number in full, any other with four digits; a dash where there is none."""
    if value is None:
        return _NO_FIGURE
    return count(value) if float(value).is_integer() else f"{value:.4g}"


def percent(share: float | None) -> str:
    return _NO_FIGURE if share is None else f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def decibel(value: float | None) -> str:
    return _NO_FIGURE if value is None else f"{value:.1f}\N{NO-BREAK SPACE}dB"


def task_name(task: str) -> str:
    """The task in words; one without words as it is."""
    return TASKS.get(task, task)
