"""websockets: what comes in at /pub goes to everybody at /sub, by the library's own broadcast."""

import asyncio
import sys

from websockets.asyncio.server import ServerConnection, broadcast, serve

room: set[ServerConnection] = set()


async def handler(connection: ServerConnection) -> None:
    assert connection.request is not None
    if connection.request.path == "/pub":
        async for message in connection:
            broadcast(room, message)
        return
    room.add(connection)
    try:
        await connection.send("hi")
        await connection.wait_closed()
    finally:
        room.discard(connection)


async def main(port: int) -> None:
    options = {"compression": None, "ping_interval": None, "backlog": 4096}
    async with serve(handler, "127.0.0.1", port, **options) as server:
        await server.serve_forever()


asyncio.run(main(int(sys.argv[1])))
