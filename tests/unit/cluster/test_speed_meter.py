"""The speed of a run, from its events."""

from datetime import UTC, datetime, timedelta

from batchinfer.cluster.speed_meter import SpeedMeter, last_speed
from batchinfer.speeds import Speed
from batchinfer.storage.events import Event, EventValue

START = datetime(2026, 1, 1, tzinfo=UTC)
NAMES = {"model": "m", "dtype": "bfloat16", "job": "j"}


def event(kind: str, at_s: float, **facts: EventValue) -> Event:
    return {"at": (START + timedelta(seconds=at_s)).isoformat(), "event": kind, **facts}


def ready(replica: int, at_s: float, device_name: str = "H100", engine: str = "continuous") -> Event:
    return event("replica_ready", at_s, replica=replica, engine=engine, device="cuda", device_name=device_name)


def committed(at_s: float, num_tokens: int = 1000, **facts: EventValue) -> Event:
    return event(
        "unit_committed",
        at_s,
        replica=0,
        num_completions=10,
        num_prompt_tokens=500,
        num_completion_tokens=num_tokens,
        **facts,
    )


def speed_of(*events: Event) -> Speed | None:
    found = last_speed(events, **NAMES)
    return None if found is None else found[0]


def test_tokens_count_against_the_time_that_replicas_had_something_to_do() -> None:
    """1. two replicas are ready  2. one idles, one dies  3. units commit, one resumed, one shared, one twice  4. end"""
    found = last_speed(
        [
            event("run_started", 0),
            ready(0, 10),
            ready(1, 20),
            event("replica_stats", 50, replica=0, idle_s=30.0),
            event("replica_died", 60, replica=1),
            committed(70, num_resumed_tokens=400),
            committed(80, num_shared_sequences=5),
            committed(90, already_committed=True),
            event("run_finished", 110, outcome="complete"),
        ],
        **NAMES,
    )
    assert found is not None
    speed, num_replicas = found
    assert num_replicas == 2
    assert (speed.device, speed.engine, speed.source, speed.job) == ("H100", "continuous", "run", "j")
    assert speed.replica_s == (110 - 10 - 30) + (60 - 20)
    assert (speed.num_prompt_tokens, speed.num_completions) == (1000, 20)
    assert (speed.num_completion_tokens, speed.mean_completion_tokens) == (600 + 500, 100.0)


def test_what_tells_nothing_of_another_run_is_no_speed() -> None:
    end = event("run_finished", 100, outcome="complete")
    assert speed_of(ready(0, 0), committed(50)) is None, "it crashed"
    assert speed_of(ready(0, 0), committed(50, num_tokens=10), end) is None, "too few tokens"
    assert speed_of(ready(0, 97), committed(99), end) is None, "too short"
    assert speed_of(ready(0, 0), ready(1, 0, "A100"), committed(50), end) is None, "two kinds of device"
    assert speed_of(ready(0, 0, engine="fake"), committed(50), end) is None
    assert speed_of(ready(0, 0), committed(50), event("run_finished", 100, outcome="drained")) is None
    drained_late = [committed(50 + k) for k in range(10)]
    assert speed_of(ready(0, 0), *drained_late, event("run_finished", 100, outcome="drained")) is not None


def test_the_newest_run_that_tells_counts_and_bad_events_do_not_stop_it() -> None:
    first = [event("run_started", 0), ready(0, 0), committed(5), event("run_finished", 10, outcome="complete")]
    second = [event("run_started", 20), ready(0, 20), committed(60), event("run_finished", 70, outcome="complete")]
    crashed = [event("run_started", 80), ready(0, 80), {"event": "replica_stats", "at": "yesterday"}]
    found = speed_of(*first, *second, *crashed)
    assert found is not None
    assert found.replica_s == 50.0


def test_a_running_meter_has_no_speed_yet() -> None:
    meter = SpeedMeter()
    meter.take("replica_ready", START, {"replica": 0, "engine": "continuous", "device": "cpu"})
    assert meter.speed(**NAMES) is None
