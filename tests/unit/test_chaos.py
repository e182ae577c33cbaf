"""SPEC of `run --chaos` and the decisions that follow from it: repeatable, as often as asked, fading."""

import pickle

import pytest

from batchinfer.chaos import DRIVER, CallFaults, Chaos, ChaosSpec, parse_chaos
from batchinfer.errors import SpecError


def test_every_key_is_read() -> None:
    spec = parse_chaos("kill-replica=0.02, kill-driver=0.01,tear=0.03,fail=0.05,delay=0.2:0.5,expire-lease=0.04,runs=7")
    assert spec == ChaosSpec(0.02, 0.01, 0.03, 0.05, 0.2, 0.5, 0.04, 7)


def test_what_is_not_named_does_not_happen() -> None:
    assert parse_chaos("fail=0.05") == ChaosSpec(fail=0.05)
    assert parse_chaos("delay=1").delay_s == ChaosSpec().delay_s
    quiet = Chaos(ChaosSpec(), seed=1, run_number=0)
    assert {quiet.of_call(DRIVER, number).kill for number in range(1000)} == {None}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kill-replicas=0.1", "did you mean kill-replica?"),
        ("kill_driver=0.1", "did you mean kill-driver?"),
        ("", "known are kill-replica, kill-driver, tear, fail, expire-lease, delay, runs"),
        ("fail", "fail needs a value, such as fail=0.02"),
        ("delay", "such as delay=0.02:0.5"),
        ("fail=1.5", "fail=1.5 is not a probability from 0 to 1"),
        ("fail=nan", "not a probability"),
        ("fail=often", "not a probability"),
        ("delay=0.1:-1", "not seconds"),
        ("delay=0.1:", "not seconds"),
        ("runs=0", "not a number of runs"),
        ("runs=many", "not a number of runs"),
        ("fail=0.1,fail=0.2", "fail is given twice"),
        ("delay-s=0.1", "did you mean delay?"),
    ],
)
def test_a_mistake_in_the_spec_is_named_with_its_way_out(text: str, says: str) -> None:
    with pytest.raises(SpecError, match="--chaos: ") as caught:
        parse_chaos(text)
    assert says in str(caught.value)


def test_decisions_follow_from_seed_run_role_and_call_alone() -> None:
    spec = ChaosSpec(kill_replica=0.3, kill_driver=0.3, tear=0.2, fail=0.3, delay=0.3, expire_lease=0.3)
    chaos = Chaos(spec, seed=5, run_number=2)
    decided = [chaos.of_call("replica-3", number) for number in range(200)]
    assert decided == [pickle.loads(pickle.dumps(chaos)).of_call("replica-3", number) for number in range(200)]
    others = [Chaos(spec, 6, 2), Chaos(spec, 5, 3)]
    assert all(decided != [other.of_call("replica-3", number) for number in range(200)] for other in others)
    assert decided != [chaos.of_call("replica-4", number) for number in range(200)]


def test_each_fault_comes_as_often_as_it_was_asked_for() -> None:
    spec = ChaosSpec(kill_replica=0.1, kill_driver=0.3, tear=0.1, fail=0.2, delay=0.25, delay_s=0.5, expire_lease=0.05)
    chaos = Chaos(spec, seed=0, run_number=0)

    def share(role: str, happens: object) -> float:
        assert callable(happens)
        return sum(bool(happens(chaos.of_call(role, number))) for number in range(20_000)) / 20_000

    def dies(faults: CallFaults) -> bool:
        return faults.kill in {"before", "after"}

    assert share("replica-0", dies) == pytest.approx(0.1, abs=0.01)
    assert share(DRIVER, dies) == pytest.approx(0.3, abs=0.015)
    assert share("replica-0", lambda it: it.kill == "before") == pytest.approx(0.05, abs=0.01)
    assert share("replica-0", lambda it: it.kill == "halfway") == pytest.approx(0.09, abs=0.01)
    assert share("replica-0", lambda it: it.fail) == pytest.approx(0.2, abs=0.015)
    assert share("replica-0", lambda it: it.fail == "after") == pytest.approx(0.1, abs=0.01)
    assert share("replica-0", lambda it: it.delay_s == 0.5) == pytest.approx(0.25, abs=0.015)
    assert share(DRIVER, lambda it: it.expire_lease) == pytest.approx(0.05, abs=0.01)
    assert share("replica-0", lambda it: it.expire_lease) == 0


def test_one_rate_does_not_move_the_moments_of_another() -> None:
    alone = Chaos(ChaosSpec(fail=0.2), seed=3, run_number=0)
    among = Chaos(ChaosSpec(fail=0.2, kill_replica=0.5, delay=0.5), seed=3, run_number=0)
    moments = [number for number in range(300) if alone.of_call("replica-0", number).fail]
    assert moments == [number for number in range(300) if among.of_call("replica-0", number).fail]


def test_deaths_fade_and_errors_stay() -> None:
    spec = ChaosSpec(kill_replica=0.4, kill_driver=0.4, tear=0.2, fail=0.3, delay=0.1, expire_lease=0.2, runs=4)
    assert spec.of_run(0) == spec
    halfway = spec.of_run(2)
    assert (halfway.kill_replica, halfway.kill_driver, halfway.tear, halfway.expire_lease) == (0.2, 0.2, 0.1, 0.1)
    last = spec.of_run(4)
    assert (last.kill_replica, last.kill_driver, last.tear, last.expire_lease) == (0, 0, 0, 0)
    assert (last.fail, last.delay) == (0.3, 0.1)
    assert spec.of_run(50) == last
