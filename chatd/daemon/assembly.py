"""Creates the parts of the daemon and gives each the others that it needs. No part runs yet.

The bus gets its receiver later, when it begins to run: the receiver passes signals to parts that themselves
need the bus to be created.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from chatd.backend.fetch import Fetcher
from chatd.backend.webhooks import WebhookDelivery
from chatd.bus import Bus, Receiver
from chatd.bus.memory import MemoryBus
from chatd.bus.redis import RedisBus
from chatd.chat.chat import Chat
from chatd.chat.leases import Leases
from chatd.chat.presence import Presence
from chatd.chat.presence_webhooks import PresenceWebhooks
from chatd.config import Config
from chatd.config.settings import Settings
from chatd.core.model import Group
from chatd.hub.admission.registry import Registry
from chatd.hub.admission.standing import check_standings
from chatd.hub.fanout.fanout import Fanout
from chatd.hub.fanout.queue import FanoutQueue
from chatd.hub.fanout.rooms import Rooms
from chatd.hub.fanout.sweep import Sweep
from chatd.hub.presence.audience import Audiences
from chatd.hub.receiver import BusReceiver
from chatd.hub.server import Hub
from chatd.hub.services import Services
from chatd.net.lobby import Lobby
from chatd.observe import metrics
from chatd.observe.sampler import Counts
from chatd.store.database import Store
from chatd.store.read.reader import Reader
from chatd.store.write.writer import Writer


@dataclass(frozen=True)
class Parts:
    writer: Writer
    bus: Bus
    receiver: Receiver
    chat: Chat
    services: Services
    hub: Hub
    webhooks: WebhookDelivery
    presence_webhooks: PresenceWebhooks

    read: Reader

    def counts(self) -> Counts:
        rooms, registry = self.services.rooms, self.services.registry
        return Counts(len(rooms), rooms.subscriptions, registry.present, self.read.in_use)


def assemble(settings: Settings, store: Store, node: str) -> Parts:
    config = settings.now
    fetch = Fetcher(config.server.private_networks)
    bus = _bus(config, store, node)
    webhooks = WebhookDelivery(config.webhooks, store.webhooks, fetch)
    writer = _writer(config, store, node, bus, webhooks)
    leases = Leases()
    # With the memory bus there are no other nodes.
    presence = Presence(node, bus.tell if config.redis.url else None, leases.life)
    chat = Chat(settings, store, writer, presence, bus.tell, fetch)
    wanted = config.webhooks.events if config.webhooks.url else ()
    presence_webhooks = PresenceWebhooks(store.presence, presence, leases, wanted, webhooks)
    services = _services(settings, store, chat, counts_rooms=presence_webhooks.counts_rooms)
    presence.on_change(services.audiences.changed)
    presence.on_own_change(presence_webhooks.note)
    receiver = BusReceiver(
        services.queue, services.fanout, services.sweep, services.registry, presence, services.audiences
    )
    hub = Hub(services)
    return Parts(writer, bus, receiver, chat, services, hub, webhooks, presence_webhooks, store.read)


def _bus(config: Config, store: Store, node: str) -> Bus:
    if config.redis.url:
        return RedisBus(config.redis, node=node, outbox=store.outbox)
    metrics.REDIS_UP.set(1)
    return MemoryBus()


def _writer(config: Config, store: Store, node: str, bus: Bus, webhooks: WebhookDelivery) -> Writer:
    def committed(group: Group) -> None:
        bus.publish(group)
        if group.hooked:
            webhooks.wake()

    wanted = frozenset[str](config.webhooks.events if config.webhooks.url else ())
    return store.writer(node=node if config.redis.url else None, on_commit=committed, wanted=wanted)


def _services(settings: Settings, store: Store, chat: Chat, *, counts_rooms: bool) -> Services:
    """Create what all sessions share."""
    rooms = Rooms()
    queue = FanoutQueue(rooms)
    registry = Registry(settings, chat.presence)
    fanout = Fanout(rooms, queue, store.read, registry.subscriptions_of)
    audiences = Audiences(queue, chat.presence, chat.conversations, counts_rooms=counts_rooms)
    sweep = Sweep(
        rooms,
        store.read,
        behind=fanout.fallen_behind,
        members_seen=audiences.members_seen,
        check_logins=partial(check_standings, registry, chat.logins),
    )
    return Services(settings, chat, rooms, fanout, queue, sweep, registry, audiences, Lobby("hub"))
