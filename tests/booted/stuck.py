"""chatd with a way to get stuck: SIGUSR1 stops its event loop for an hour."""

import signal
import time

from chatd.cli import main


def the_loop_is_stuck(*_: object) -> None:
    time.sleep(3600)


signal.signal(signal.SIGUSR1, the_loop_is_stuck)
main()
