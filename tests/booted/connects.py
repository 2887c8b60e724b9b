"""Connects to an address again and again until a line comes on standard input; prints how that went, as JSON.

Runs in the machine, with the standard library alone. An attempt is a whole handshake: until the 101 is there.
"""

import json
import socket
import sys
import threading
import time
from collections import Counter

PORT = 6001
AT_ONCE = 20
PAUSE = 0.05  # seconds after each attempt: 400 a second at most, below limits.handshakes_per_second
LONGEST = 30.0  # seconds
REQUEST = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def attempt(address: str) -> str:
    try:
        with socket.create_connection((address, PORT), timeout=LONGEST) as connection:
            connection.sendall(REQUEST)
            return connection.recv(12).decode()
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return type(error).__name__


def go_on(enough: threading.Event, outcomes: list[str], waits: list[float]) -> None:
    while not enough.wait(PAUSE):
        began = time.monotonic()
        outcomes.append(attempt(sys.argv[1]))
        waits.append(time.monotonic() - began)


def main() -> None:
    enough = threading.Event()
    outcomes: list[str] = []
    waits: list[float] = []
    threads = [
        threading.Thread(target=go_on, args=(enough, outcomes, waits), daemon=True) for _ in range(AT_ONCE)
    ]
    for thread in threads:
        thread.start()
    print("connecting", flush=True)
    sys.stdin.readline()
    enough.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"counts": Counter(outcomes), "longest": round(max(waits), 2)}))


main()
