"""Figures in words."""


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours before them where there are some: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
