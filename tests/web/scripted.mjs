/**
 * A server that says what a test wants it to say, in place of WebSocket; and time that passes when a test wants it to. Import it before chatd.js
 * is used: what chatd.js does with odd servers, dead networks and the clock can be seen without waiting for any of them.
 */
import { mock } from "node:test";

const HELLO = {
  event: "hello", protocol: "chatd.v1", ping_interval: 25, ping_timeout: 15,
  limits: { frame: 2000, content: 8000, rooms: 5, history: 100 }, reconnect: { min: 500, max: 20000, window: 5000 },
};

export const sockets = []; // all there have been

class Socket {
  static CONNECTING = 0;
  static OPEN = 1;
  static CLOSING = 2;
  static CLOSED = 3;
  readyState = Socket.CONNECTING;
  sent = [];

  constructor(url) {
    this.url = url;
    sockets.push(this);
  }

  // For chatd.js

  send(text) { this.sent.push(JSON.parse(text)); }
  close() { this.readyState = Socket.CLOSED; }

  // For tests

  open(hello = {}) {
    this.readyState = Socket.OPEN;
    this.say({ ...HELLO, ...hello });
  }

  say(...frames) {
    for (const frame of frames) this.onmessage?.({ data: JSON.stringify(frame) });
  }

  /** The other side ends it. */
  end(code, reason = "") {
    this.readyState = Socket.CLOSED;
    this.onclose?.({ code, reason });
  }

  all(event) { return this.sent.filter((frame) => frame.event === event); }
  last(event) { return this.all(event).at(-1); }

  /** Answers the newest request of this kind. */
  reply(event, answer) { this.say({ ref: this.last(event).ref, ...answer }); }

  ready(rooms = {}, more = {}) { this.reply("auth", { event: "ready", user_id: 7, session: "s", epoch: "e", rooms, ...more }); }
}

globalThis.WebSocket = Socket;

export const change = (seq, more) => ({
  event: "message", conversation_id: 1, id: seq * 10, user_id: 8, type: "text", content: `m${seq}`, meta: null, seq, ...more,
});
export const answer = (seq, more) => ({
  conversation_id: 1, epoch: "e", seq, recovered: true, changes: [], has_more: false, unread: 0, receipts: [], ...more,
});

/** Lets everything go on that waits for promises alone. */
export const settle = () => new Promise((wake) => setImmediate(wake));

/** Time passes, one timer after the other. */
export async function pass(seconds) {
  for (let left = seconds * 1000; left > 0; left -= 50) {
    mock.timers.tick(Math.min(50, left));
    await settle();
  }
}

/** The timers stand still while the clock goes on: a machine that sleeps, or a clock that is put. */
export const jump = (seconds) => mock.timers.setTime(Date.now() + seconds * 1000);

const realRandom = Math.random;

/** For each test: time stands still, and what is random is in the middle. */
export function begin() {
  sockets.length = 0;
  mock.timers.enable({ apis: ["setTimeout", "Date"], now: Date.UTC(2026, 0, 1) });
  Math.random = () => 0.5;
}

export function end() {
  mock.timers.reset();
  Math.random = realRandom;
}
