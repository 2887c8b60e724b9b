"""Starts a worker: places the listening sockets where systemd would, sets LISTEN_PID, and executes chatd.

`workers` runs this as a script, because LISTEN_PID must be the worker's own pid, which its parent does not know
beforehand. It imports nothing of chatd, so that it starts fast. It is not a shell script, because the systemd
unit forbids other programs.
"""

import fcntl
import os
import sys


def main(descriptors: list[int], program: list[str]) -> None:
    first = 3  # sd_listen_fds(3)
    last = first + len(descriptors)
    aside = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, last) for descriptor in descriptors]
    for number, descriptor in enumerate(aside, first):
        os.dup2(descriptor, number)
    os.closerange(last, max(aside + descriptors) + 1)  # else closing a socket would leave its duplicate open
    os.environ["LISTEN_PID"] = str(os.getpid())
    os.execv(program[0], program)


if __name__ == "__main__":
    main([int(descriptor) for descriptor in sys.argv[1].split(",")], sys.argv[2:])
