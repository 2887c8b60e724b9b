/**
 * chatd.js: a client for the protocol chatd.v1. It needs chatd-link.js and chatd-room.js beside it, and nothing else.
 *
 *     const chat = new Chat({ url: "wss://chat.example.com/ws", token: async () => "…" });
 *     const room = chat.join(1);
 *     room.addEventListener("message", ({ detail }) => console.log(detail.user_id, detail.content));
 *     chat.connect();
 *     await chat.send(1, "Hello");
 *
 * Chat decides when to connect and keeps what is unanswered, Room is one conversation with its cursor, Link is one
 * WebSocket. The application's code runs in event listeners and in `token` alone: what a listener throws is
 * reported as an uncaught error by the browser and reaches nothing in here.
 */

import { ChatError, Link, LOST, RETRYABLE, SECOND } from "./chatd-link.js";
import { CHANGES, emit, Room } from "./chatd-room.js";

export { ChatError, Room };

const FIRST_WAIT = 0.5 * SECOND;
const LONGEST_WAIT = 20 * SECOND;
const OVERLOAD_WAIT = 5 * SECOND;
const STEADY = 10 * SECOND; // a connection that lived so long past `ready` was a good one: the backoff starts over
const RESTART_WINDOW = 5 * SECOND; // unless the server's `hello` named another
const TIMER_MAX = 2 ** 31 - 1; // setTimeout fires at once beyond it
const REFUSALS_MAX = 10; // a request that the server keeps failing must not block those behind it for ever

// Close codes
const GOING_AWAY = new Set([1001, 1012]);
const OVERLOADED = new Set([1013, 4006]);
const TOKEN_EXPIRED = 4001, AUTH_UNAVAILABLE = 4005;
const isFinal = (code) => code >= 4500 && code <= 4999;

const random = (limit) => Math.random() * limit;
const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));
/** Random from nought: the clients of a server that fell over must not all come back in step. */
const backoff = (tries, longest = LONGEST_WAIT) => random(Math.min(longest, FIRST_WAIT * 2 ** tries));

/** 128 random bits. crypto.randomUUID() exists only on https and localhost. */
export const newClientId = () =>
  Array.from(crypto.getRandomValues(new Uint32Array(4)), (word) => word.toString(16).padStart(8, "0")).join("");

/**
 * The client. `token` is an async function that gets a token from your backend; it is called for the first connection, before
 * a token expires and after one has expired, but not for every reconnect: a restart must not become a storm on the backend.
 *
 * Events: state [{state, retryAt?, code?, reason?}], where state is "connecting", "online", "offline" (next try at `retryAt`,
 * as of Date.now()), "stopped" (see `code`; only connect() starts again) or "closed"; error [a frame without a `ref`].
 */
export class Chat extends EventTarget {
  state = "closed";
  userId = null;
  epoch;
  limits = null;
  #url;
  #askToken;
  #longestWait;
  #token = null;
  #tokenEnds = Infinity;
  #rooms = new Map();
  #link = null; // null while there is none and none is being made
  #next = null; // the one that is to follow it, when the server asked us to move
  #timer;
  #tries = 0;
  #window = RESTART_WINDOW;
  #outbox = []; // unanswered changes, oldest first
  #draining = false;

  /**
   * `epoch` only together with cursors kept from an earlier page: `join(id, {after})`. `longestWait` (ms) bounds the random
   * wait before a new try; a short one is for tests and for servers with few clients.
   */
  constructor({ url, token, epoch, longestWait = LONGEST_WAIT }) {
    super();
    this.#url = url;
    this.#askToken = token;
    this.#longestWait = longestWait;
    this.epoch = epoch;
  }

  /** Connects, or tries now instead of at the end of the wait. Does nothing while connecting or online. */
  connect() {
    if (this.#link) return;
    clearTimeout(this.#timer);
    this.#dial();
  }

  /** Disconnects. What is unsent stays and goes out after the next connect(). */
  close() {
    clearTimeout(this.#timer);
    const links = [this.#link, this.#next];
    this.#link = this.#next = null;
    for (const link of links) link?.end();
    this.#become("closed");
  }

  /** The Room of a conversation, subscribed now or as soon as there is a connection; `presence`: tell who is online. */
  join(conversationId, { after = null, presence = false } = {}) {
    const known = this.#rooms.get(conversationId);
    if (known) return known;
    const post = (frame) => this.#ready?.post({ ...frame, conversation_id: conversationId }) ?? false;
    const room = new Room(conversationId, { after, presence, post, me: () => this.userId });
    this.#rooms.set(conversationId, room);
    this.#subscribe(room);
    return room;
  }

  leave(conversationId) {
    if (this.#rooms.delete(conversationId)) this.#ready?.post({ event: "unsubscribe", conversation_id: conversationId });
  }

  /**
   * Resolves to {id, seq, created_at, client_id} when the server has stored the message. While the connection is away it
   * waits; it is repeated with the same `client_id`, which the server stores once.
   */
  send(conversationId, content, { client_id = newClientId(), type, meta, reply_to } = {}) {
    return this.#change({ event: "send", conversation_id: conversationId, content, client_id, type, meta, reply_to });
  }

  edit(conversationId, id, content) { return this.#change({ event: "edit", conversation_id: conversationId, id, content }); }
  delete(conversationId, id) { return this.#change({ event: "delete", conversation_id: conversationId, id }); }

  react(conversationId, id, emoji, on = true) {
    return this.#change({ event: "react", conversation_id: conversationId, id, emoji, on });
  }

  /** A page {messages, has_more} in ascending id: the newest, or those before or after a message id. Fails while offline. */
  async history(conversationId, { before, after, limit } = {}) {
    if (!this.#ready) throw new ChatError({ code: "disconnected" });
    return this.#ready.request({ event: "history", conversation_id: conversationId, before, after, limit });
  }

  // Connecting

  /** The link, once the server has let it in. */
  get #ready() { return this.#link?.readyAt ? this.#link : null; }

  #become(state, detail = {}) {
    this.state = state;
    emit(this, "state", { state, ...detail });
  }

  async #dial() {
    const link = this.#link = new Link({
      received: (frame) => this.#receive(link, frame),
      ended: (code, reason) => this.#lost(link, code, reason),
    });
    this.#become("connecting");
    try {
      if (Date.now() >= this.#tokenEnds) this.#token = null;
      if (this.#token === null) this.#keepToken(await this.#askToken());
      if (link === this.#link) link.open(this.#url);
    } catch (error) {
      link.end(LOST, error.message);
    }
  }

  /** The server will go away: be somewhere else before it does. Where that fails, its goodbye comes all the same. */
  #moveSoon(old, [soonest, latest]) {
    setTimeout(() => {
      if (old !== this.#link || this.#next) return;
      const next = this.#next = new Link({
        received: (frame) => this.#receive(next, frame),
        ended: (code, reason) => (next === this.#next ? (this.#next = null) : this.#lost(next, code, reason)),
      });
      next.open(this.#url);
    }, soonest + random(latest - soonest));
  }

  #move(link) {
    const old = this.#link;
    this.#link = link;
    this.#next = null;
    old.end(); // what it did not answer is asked again, with the same client_id
  }

  #authenticate(link, hello) {
    this.limits = hello.limits;
    this.#window = hello.reconnect?.window ?? RESTART_WINDOW;
    link.asked = new Set(this.#rooms.keys());
    const rooms = Object.fromEntries(Array.from(this.#rooms.values(), (room) => [room.id, room.cursor]));
    link.request({ event: "auth", token: this.#token, rooms, epoch: this.epoch }).catch((error) => {
      // Waiting on would end in "no auth in time", which is final. The other refusals are followed by a close of their own.
      if (error.code === "token_expired") link.end(TOKEN_EXPIRED, error.message);
      else if (error.retryable) link.end(AUTH_UNAVAILABLE, error.message);
    });
  }

  #welcome(link, ready) {
    link.readyAt = Date.now();
    if (link === this.#next) this.#move(link);
    this.epoch = ready.epoch;
    this.userId = ready.user_id;
    this.#become("online");
    for (const room of [...this.#rooms.values()]) {
      const answer = ready.rooms[room.id];
      if (answer) room.synced(answer);
      if (answer && room.presence) this.#subscribe(room); // `auth` does not ask for it
      else if (answer) continue;
      else if (!link.asked.has(room.id)) this.#subscribe(room); // joined since `auth` left
    }
    for (const id of link.asked) if (!this.#rooms.has(id)) link.post({ event: "unsubscribe", conversation_id: id });
    this.#renew(link, ready.expires_in);
    this.#drain();
  }

  #lost(link, code, reason) {
    if (link !== this.#link) return;
    this.#link = this.#next;
    this.#next = null;
    if (this.#link) return this.#become("connecting"); // it is on its way already
    if (code === TOKEN_EXPIRED || isFinal(code)) this.#token = null;
    if (isFinal(code)) return this.#become("stopped", { code, reason });
    if (link.readyAt && Date.now() - link.readyAt >= STEADY) this.#tries = 0;
    const wait = this.#wait(code);
    this.#timer = setTimeout(() => this.#dial(), wait);
    this.#become("offline", { code, reason, retryAt: Date.now() + wait });
  }

  #wait(code) {
    if (GOING_AWAY.has(code)) return random(Math.min(this.#window, this.#longestWait));
    return backoff(this.#tries++, this.#longestWait) + (OVERLOADED.has(code) ? OVERLOAD_WAIT : 0);
  }

  // The token

  #keepToken(token, seconds = Infinity) {
    this.#token = token;
    this.#tokenEnds = Date.now() + seconds * SECOND;
  }

  /** For as long as the link lives. Where it fails, it is tried again in what is left of the old token's time. */
  async #renew(link, seconds) {
    if (seconds !== undefined) this.#keepToken(this.#token, seconds);
    while (seconds > 1) { // else it is too late: the server closes with 4001, and the next try asks for a token
      await sleep(Math.min(seconds * SECOND * (0.7 + random(0.2)), TIMER_MAX));
      if (link !== this.#link) return;
      await this.#refresh(link).catch(() => {});
      seconds = (this.#tokenEnds - Date.now()) / SECOND;
    }
  }

  async #refresh(link) {
    const token = await this.#askToken();
    this.#keepToken(token, (await link.request({ event: "refresh", token })).expires_in);
  }

  // Receiving

  #receive(link, frame) {
    const room = this.#rooms.get(frame.conversation_id);
    if (frame.event === "hello") this.#authenticate(link, frame);
    else if (frame.event === "ready") this.#welcome(link, frame);
    else if (frame.event === "reconnect") this.#moveSoon(link, frame.delay);
    else if (frame.event === "error" && frame.ref === undefined) emit(this, "error", frame);
    else if (!room) return; // a reply, or of a room that was left meanwhile
    else if (frame.event === "subscribed") room.synced(frame);
    else if (frame.event === "unsubscribed") this.#refused(room, frame);
    else if (frame.event in CHANGES) room.change(frame) || this.#subscribe(room);
    else room.hear(frame);
  }

  #subscribe(room) {
    const link = this.#ready;
    if (!link || room.asking === link) return;
    room.asking = link;
    const after = room.cursor ?? undefined;
    const presence = room.presence || undefined;
    link.request({ event: "subscribe", conversation_id: room.id, after, epoch: this.epoch, presence }).catch((error) => {
      if (room.asking === link) room.asking = null;
      if (error.code !== "disconnected") this.#refused(room, error); // the next `auth` asks for it anyway
    });
  }

  #refused(room, { code, message, retryAfter = 1 }) {
    if (this.#rooms.get(room.id) !== room) return;
    if (RETRYABLE.has(code)) {
      setTimeout(() => this.#rooms.get(room.id) === room && this.#subscribe(room), (retryAfter + random(1)) * SECOND);
    } else {
      this.#rooms.delete(room.id);
      emit(room, "unsubscribed", { code, message });
    }
  }

  // Sending

  #change(frame) {
    return new Promise((resolve, reject) => {
      this.#outbox.push({ frame, resolve, reject, refusals: 0 });
      this.#drain();
    });
  }

  /** One at a time: were several on the way, one refused by the rate limit would be overtaken by the next. */
  async #drain() {
    if (this.#draining) return;
    this.#draining = true;
    while (this.#ready && this.#outbox.length) {
      if (await this.#deliver(this.#outbox[0])) this.#outbox.shift();
    }
    this.#draining = false;
  }

  /** True when the entry is settled, false when it has to be sent again. */
  async #deliver(entry) {
    try {
      entry.resolve(await this.#ready.request(entry.frame));
      return true;
    } catch (error) {
      if (error.code === "disconnected") return false;
      const expired = error.code === "token_expired";
      entry.refusals += 1;
      if (entry.refusals === REFUSALS_MAX || !(error.retryable || expired)) {
        entry.reject(error);
        return true;
      }
      if (expired && this.#ready) await this.#refresh(this.#ready).catch(() => {});
      await sleep(error.retryAfter ? error.retryAfter * SECOND : backoff(entry.refusals));
      return false;
    }
  }
}
