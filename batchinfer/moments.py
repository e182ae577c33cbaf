"""Ends of runs as a job file writes them: a moment, a time of day, or a duration from the run's start. Pure."""

import re
from datetime import datetime, time, timedelta, tzinfo

_DURATION = re.compile(r"(?:(?P<days>\d+)d)?(?:(?P<hours>\d+)h)?(?:(?P<minutes>\d+)m)?(?:(?P<seconds>\d+)s)?")
#: Far beyond any run, and near enough that adding it to a date cannot overflow.
_LONGEST = timedelta(days=3660)
_TIME_OF_DAY = re.compile(r"\d{2}:\d{2}(?::\d{2})?")


def parse_deadline(text: str) -> datetime | time | timedelta:
    """``2026-11-24T06:00:00+09:00``, ``06:00`` or ``8h`` (also ``1d12h``, ``90m``, ``30s``).

    Raises ValueError, which says what would do.
    """
    lacking = ""
    try:
        if _TIME_OF_DAY.fullmatch(text):
            return time.fromisoformat(text)
        found = _DURATION.fullmatch(text)
        if text and found is not None:
            span = timedelta(**{unit: int(number) for unit, number in found.groupdict(default="0").items()})
            if timedelta() < span <= _LONGEST:
                return span
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            return moment
        lacking = "; this moment lacks its zone"
    except (ValueError, OverflowError):
        pass
    raise ValueError(
        "expected a moment with its zone (2026-11-24T06:00:00+09:00), a time of day (06:00) or a duration (8h, 90m), "
        f"got {text!r}{lacking}"
    )


def next_moment(deadline: datetime | time | timedelta, started_at: datetime, zone: tzinfo | None = None) -> datetime:
    """When a run that began at ``started_at`` (with its zone) has to be over.

    A time of day is the next one in ``zone`` (None = this machine's), today's or tomorrow's.
    """
    if isinstance(deadline, datetime):
        return deadline
    if isinstance(deadline, timedelta):
        return started_at + deadline
    today = started_at.astimezone(zone).date()
    for days in (0, 1):
        # Through the wall clock, so that a night in which the clocks change still ends at that time.
        on_the_wall = datetime.combine(today + timedelta(days=days), deadline)
        moment = on_the_wall.replace(tzinfo=zone) if zone is not None else on_the_wall.astimezone()
        if moment > started_at:
            return moment
    return moment
