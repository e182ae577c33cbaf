"""A head that stops answering is noticed, one that answers is not, and a driver that hangs is given up."""

import socket
import subprocess
import sys
import threading

import pytest

from batchinfer.cluster.head_watch import HeadWatch
from batchinfer.errors import EXIT_RUN_AGAIN, ClusterLost

DEADLINE_S = 30.0


def listener() -> tuple[socket.socket, str]:
    server = socket.create_server(("127.0.0.1", 0))
    return server, f"127.0.0.1:{server.getsockname()[1]}"


def test_a_head_that_answers_is_tried_again_and_again() -> None:
    server, address = listener()
    with server, HeadWatch(pytest.fail, interval_s=0.01, lost_after_s=0.0, give_up_after_s=60.0) as head:
        head.watch(address)
        server.settimeout(DEADLINE_S)
        for _ in range(5):
            server.accept()[0].close()
        head.check()


def test_a_head_that_is_gone_ends_the_run_and_then_a_driver_that_hangs() -> None:
    server, address = listener()
    server.close()
    given_up, reasons = threading.Event(), []

    def give_up(reason: str) -> None:
        reasons.append(reason)
        given_up.set()

    with HeadWatch(give_up, interval_s=0.01, lost_after_s=0.0, give_up_after_s=0.2) as head:
        head.check()
        head.watch(address)
        assert given_up.wait(DEADLINE_S)
        with pytest.raises(ClusterLost, match=rf"{address} has not answered .*run again"):
            head.check()
    assert len(reasons) == 1


def test_a_driver_that_hangs_ends_with_the_code_that_asks_for_another_run() -> None:
    server, address = listener()
    server.close()
    script = (
        "import threading\n"
        "from batchinfer.cluster.head_watch import HeadWatch\n"
        f"HeadWatch(interval_s=0.01, lost_after_s=0.0, give_up_after_s=0.0).watch({address!r})\n"
        "threading.Event().wait()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert ended.returncode == EXIT_RUN_AGAIN
    assert "has not answered" in ended.stderr
