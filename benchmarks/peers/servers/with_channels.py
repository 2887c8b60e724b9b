"""Django Channels, its Redis pub/sub layer, uvicorn with uvloop: what comes in at /pub goes to a group."""

import os
import sys
from typing import Any

import django
import uvicorn
from django.conf import settings

settings.configure(
    SECRET_KEY="of a benchmark",
    ALLOWED_HOSTS=["*"],
    CHANNEL_LAYERS={
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": [os.environ["REDIS_URL"]]},
        }
    },
)
django.setup()

from channels.generic.websocket import AsyncWebsocketConsumer  # noqa: E402  # after the settings


class Consumer(AsyncWebsocketConsumer):
    async def connect(self) -> None:
        await self.accept()
        if self.scope["path"] != "/pub":
            await self.channel_layer.group_add("room", self.channel_name)
            await self.send(text_data="hi")

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        await self.channel_layer.group_send("room", {"type": "deliver", "text": text_data})

    async def deliver(self, event: dict[str, Any]) -> None:
        await self.send(text_data=event["text"])

    async def disconnect(self, code: int) -> None:
        await self.channel_layer.group_discard("room", self.channel_name)


uvicorn.run(
    Consumer.as_asgi(),
    host="127.0.0.1",
    port=int(sys.argv[1]),
    loop="uvloop",
    ws="websockets-sansio",
    ws_ping_interval=None,
    ws_per_message_deflate=False,
    log_level="warning",
    access_log=False,
    backlog=4096,
    lifespan="off",
)
