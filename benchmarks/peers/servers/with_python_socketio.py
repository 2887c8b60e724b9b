"""python-socketio on uvicorn with uvloop: an event `pub` goes to the room as `m`."""

import sys
from typing import Any

import socketio
import uvicorn

server = socketio.AsyncServer(
    async_mode="asgi", transports=["websocket"], ping_interval=3600, ping_timeout=3600
)


@server.event
async def connect(sid: str, environ: dict[str, Any]) -> None:
    if "pub=1" not in environ["QUERY_STRING"]:
        await server.enter_room(sid, "room")
        server.start_background_task(server.emit, "hi", to=sid)


@server.event
async def pub(sid: str, text: str) -> None:
    await server.emit("m", text, room="room")


uvicorn.run(
    socketio.ASGIApp(server),
    host="127.0.0.1",
    port=int(sys.argv[1]),
    loop="uvloop",
    ws="websockets-sansio",
    ws_ping_interval=None,
    ws_per_message_deflate=False,
    log_level="warning",
    access_log=False,
    backlog=4096,
)
