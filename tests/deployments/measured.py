"""What tests have measured, to be shown once at the end of the run."""

_lines: list[str] = []


def note(line: str) -> None:
    """Show this line at the end."""
    _lines.append(line)


def lines() -> list[str]:
    return list(_lines)
