"""Ends of runs as a job file writes them, and the moments they mean."""

from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest

from batchinfer.moments import next_moment, parse_deadline

SEOUL = ZoneInfo("Asia/Seoul")
BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("2026-11-24T06:00:00+09:00", datetime(2026, 11, 24, 6, tzinfo=SEOUL)),
        ("2026-11-23T21:00:00Z", datetime(2026, 11, 23, 21, tzinfo=UTC)),
        ("06:00", time(6)),
        ("23:59:30", time(23, 59, 30)),
        ("8h", timedelta(hours=8)),
        ("1d12h", timedelta(hours=36)),
        ("90m", timedelta(minutes=90)),
        ("1h30m10s", timedelta(seconds=5410)),
    ],
)
def test_what_is_understood(text: str, meaning: object) -> None:
    assert parse_deadline(text) == meaning


@pytest.mark.parametrize(
    "text", ["", "8", "8 h", "h8", "0s", "24:00", "6:00", "tomorrow", "2026-11-24", "99999999999d"]
)
def test_what_is_not_says_what_would_do(text: str) -> None:
    with pytest.raises(ValueError, match=r"a time of day \(06:00\) or a duration"):
        parse_deadline(text)


def test_a_moment_without_its_zone_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="lacks its zone"):
        parse_deadline("2026-11-24T06:00:00")


@pytest.mark.parametrize(
    ("started_at", "ends_at"),
    [
        (datetime(2026, 11, 23, 22, tzinfo=SEOUL), datetime(2026, 11, 24, 6, tzinfo=SEOUL)),
        (datetime(2026, 11, 24, 5, 59, tzinfo=SEOUL), datetime(2026, 11, 24, 6, tzinfo=SEOUL)),
        (datetime(2026, 11, 24, 6, tzinfo=SEOUL), datetime(2026, 11, 25, 6, tzinfo=SEOUL)),
        # In UTC it is still the day before.
        (datetime(2026, 11, 23, 20, tzinfo=UTC), datetime(2026, 11, 24, 6, tzinfo=SEOUL)),
    ],
)
def test_a_time_of_day_is_the_next_one(started_at: datetime, ends_at: datetime) -> None:
    assert next_moment(time(6), started_at, SEOUL) == ends_at


def test_a_night_in_which_the_clocks_change_ends_by_the_wall_clock() -> None:
    started_at = datetime(2026, 10, 24, 22, tzinfo=BERLIN)
    ends_at = next_moment(time(6), started_at, BERLIN)
    assert ends_at == datetime(2026, 10, 25, 6, tzinfo=BERLIN)
    assert ends_at.astimezone(UTC) - started_at.astimezone(UTC) == timedelta(hours=9)


def test_durations_count_from_the_start_and_moments_stay() -> None:
    started_at = datetime(2026, 11, 23, 22, tzinfo=UTC)
    assert next_moment(timedelta(hours=8), started_at) == datetime(2026, 11, 24, 6, tzinfo=UTC)
    assert next_moment(started_at, started_at) == started_at


def test_the_machines_own_zone_is_taken_where_none_is_given() -> None:
    started_at = datetime.now(UTC)
    ends_at = next_moment(time(6), started_at)
    assert timedelta(0) < ends_at - started_at <= timedelta(hours=25)
    assert ends_at.astimezone().time() == time(6)
