"""The last step to a worker: put the sockets where systemd would, say that they are meant for it, become chatd.

Run as a script by `workers`, which cannot know the pid of a process before that exists. It imports nothing of
chatd, and it is no shell, for the unit forbids other programs.
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
    os.closerange(last, max(aside + descriptors) + 1)  # a worker that lets go of a socket has no second one
    os.environ["LISTEN_PID"] = str(os.getpid())
    os.execv(program[0], program)


if __name__ == "__main__":
    main([int(descriptor) for descriptor in sys.argv[1].split(",")], sys.argv[2:])
