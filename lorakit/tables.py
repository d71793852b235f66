"""Reports as plain text: aligned columns that survive a log file."""

from collections.abc import Sequence

from lorakit.errors import printable


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Rows under their headers; the columns named in `right` are aligned to the right."""
    lines = [list(headers), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if header in right else cell.ljust(width)
            for cell, width, header in zip(line, widths, headers, strict=True)
        ).rstrip()
        for line in lines
    )


def shape(size: Sequence[int]) -> str:
    """1000×784."""
    return "×".join(map(str, size))


def size(count: int) -> str:
    """Bytes for a person: 28.2 kB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
