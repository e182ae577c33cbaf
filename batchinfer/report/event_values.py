"""Values of an event, whatever wrote it: one that is missing or of another kind is an empty one."""

from batchinfer.storage.events import Event


def text_of(event: Event, name: str) -> str:
    """The value as text; empty without one."""
    value = event.get(name)
    return "" if value is None else str(value)


def integer_of(event: Event, name: str) -> int:
    """The whole number, else 0."""
    value = event.get(name)
    return value if isinstance(value, int) else 0


def number_of(event: Event, name: str) -> float:
    """The number, else 0."""
    value = event.get(name)
    return float(value) if isinstance(value, (int, float)) else 0.0
