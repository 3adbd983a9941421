"""`uft`, whose comparison of a merged model waits for a signal: the program that `test_convert_command.py` stops."""

import signal
import sys

from uft_ds import cli
from uft_ds.export import convert


def compare(*_: object, **__: object) -> None:
    print("comparing", flush=True)
    signal.pause()


if __name__ == "__main__":
    # Under nohup, or as a job in the background, tests inherit signals that are ignored.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    convert.compare = compare  # type: ignore[attr-defined]
    sys.argv[0] = "uft"
    cli.main()
