"""picows: what comes in at /pub goes to everybody at /sub."""

import asyncio
import sys

from picows import WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server

room: set[WSTransport] = set()


class Subscriber(WSListener):
    def on_ws_connected(self, transport: WSTransport) -> None:
        room.add(transport)
        transport.send(WSMsgType.TEXT, b"hi")

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        room.discard(transport)


class Publisher(WSListener):
    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.TEXT:
            payload = frame.get_payload_as_bytes()
            for subscriber in room:
                subscriber.send(WSMsgType.TEXT, payload)


def listener(request: WSUpgradeRequest) -> WSListener:
    return Publisher() if request.path == b"/pub" else Subscriber()


async def main(port: int) -> None:
    server = await ws_create_server(listener, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


asyncio.run(main(int(sys.argv[1])))
