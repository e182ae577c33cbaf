"""From an error to the exit code that the README promises, and what a person or a program is told of it."""

import functools
import json
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec

import click

from batchinfer.errors import EXIT_RUN_AGAIN, BatchinferError, RunInterrupted

Arguments = ParamSpec("Arguments")
SignalHandler = Callable[[int, FrameType | None], object] | int | signal.Handlers


def ending_with_exit_codes(command: Callable[Arguments, int]) -> Callable[Arguments, None]:
    """Run a command, print an error of ours as one message, and exit with the code the README promises.

    A mistake of ours ends with 3, like an interruption: Python's own 1 would say "finished, dead letters remain".
    """

    @functools.wraps(command)
    def run_and_exit(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        as_json = bool(kwargs.get("as_json"))
        on_sigterm = _sigterm_like_sigint()
        try:
            exit_code = command(*args, **kwargs)
        except BatchinferError as error:
            exit_code = error.exit_code
            _print_error(error, exit_code, as_json)
        except BrokenPipeError:
            # The reader of our output (head, less) has seen enough; the command itself did nothing wrong.
            sys.stderr.close()
            exit_code = 0
        except KeyboardInterrupt:
            # Before or after the run's own handling of signals, while Ray is imported, say.
            exit_code = EXIT_RUN_AGAIN
            _print_error(RunInterrupted("stopped by a signal; run the same command again"), exit_code, as_json)
        except Exception as error:  # noqa: BLE001 - the last place before Python's own exit code; the traceback is kept
            exit_code = EXIT_RUN_AGAIN
            traceback.print_exc()
            _print_error(error, exit_code, as_json)
        finally:
            if on_sigterm is not None:
                signal.signal(signal.SIGTERM, on_sigterm)
        sys.exit(exit_code)

    return run_and_exit


def _sigterm_like_sigint() -> SignalHandler | None:
    """Have SIGTERM raise KeyboardInterrupt, as SIGINT does; returns what it did before, None where it cannot be set."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, signal.default_int_handler)


def _print_error(error: BaseException, exit_code: int, as_json: bool) -> None:
    kind, text = type(error).__name__, str(error)
    if as_json:
        click.echo(json.dumps({"outcome": "error", "exit_code": exit_code, "error_type": kind, "error": text}))
    click.secho(f"Error: {text or kind}", fg="red", err=True)
