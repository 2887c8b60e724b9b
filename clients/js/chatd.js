/**
 * chatd.js: a client for the protocol chatd.v1. It needs chatd-link.js and chatd-room.js beside it, and nothing else.
 *
 *     const chat = new Chat({ url: "wss://chat.example.com/ws", token: async () => "…" });
 *     const room = chat.join(1);
 *     room.addEventListener("message", ({ detail }) => console.log(detail.user_id, detail.content));
 *     chat.connect();
 *     await chat.send(1, "Hello");
 *
 * Chat decides when to connect, Room is one conversation with its cursor, Link is one WebSocket, Subscriptions are the rooms
 * on one link, and the Outbox has the changes that the server has not answered. The application's code runs only in event
 * listeners and in `token`. An error that a listener throws does not reach this code: the browser reports it as uncaught. A
 * listener may call any method, so after each event the link may have ended and the room may have been left.
 */

import { backoff, ChatError, idOf, Link, LOST, NO_PONG, Outbox, random, SECOND, sizeOf, Token } from "./chatd-link.js";
import { emit, Room, Subscriptions } from "./chatd-room.js";

export { ChatError, Room };

const LONGEST_WAIT = 20 * SECOND;
const OVERLOAD_WAIT = 5 * SECOND;
const ONLINE_WAIT = 0.5 * SECOND; // all clients behind a router get the `online` event at the same moment
const STEADY = 10 * SECOND; // a connection that lived so long after `ready` resets the backoff
const RESTART_WINDOW = 5 * SECOND; // the default, if the server's `hello` has no window
const PATIENCE_MAX = 8;

// Close codes
const GOING_AWAY = new Set([1001, 1012]);
const OVERLOADED = new Set([1013, 4006]);
const TOKEN_EXPIRED = 4001, AUTH_UNAVAILABLE = 4005, PROTOCOL_ERROR = 4501;
const OLD_NO_AUTH = 4502; // older servers send this instead of 4004: the network was slow, or the machine slept
const isFinal = (code) => code >= 4500 && code <= 4999 && code !== OLD_NO_AUTH;

/** 128 random bits. crypto.randomUUID() exists only on https and localhost. */
export const newClientId = () =>
  Array.from(crypto.getRandomValues(new Uint32Array(4)), (word) => word.toString(16).padStart(8, "0")).join("");

/**
 * The client. `token` is an async function that gets a token from your backend. It is called for the first connection, before
 * a token expires and after one has expired, but not for each reconnect, so that a restart does not overload the backend.
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
  #token;
  #longestWait;
  #givenEpoch;
  #rooms = new Map();
  #link = null; // the current link, or the one that is being opened
  #next = null; // the link that will replace it, after the server has asked the client to reconnect
  #timer;
  #notBefore = 0; // the earliest time of the next try, after an overloaded server has closed the connection
  #tries = 0;
  #patience = 1; // multiplies the silence that is allowed; grows while links time out soon after they were opened
  #window = RESTART_WINDOW;
  #ears = null; // the AbortController of the listeners on the page
  #outbox = new Outbox({ link: () => this.#ready, refresh: (link) => this.#token.refresh(link) });

  /**
   * Give `epoch` only together with cursors that you kept from an earlier page: `join(id, {after, mark})`. `longestWait` (ms)
   * bounds the random wait before a new try. A short one is for tests and for servers with few clients.
   */
  constructor({ url, token, epoch, longestWait = LONGEST_WAIT }) {
    super();
    this.#url = url;
    this.#token = new Token(token);
    this.#longestWait = longestWait;
    this.epoch = this.#givenEpoch = epoch;
  }

  /** Connects now, without waiting for the next try. Does nothing while connecting or online. */
  connect() {
    if (this.#link) return;
    clearTimeout(this.#timer);
    this.#listen();
    this.#dial();
  }

  /** Disconnects. Unsent changes are kept and sent after the next connect(). */
  close() {
    clearTimeout(this.#timer);
    this.#ears?.abort();
    this.#ears = null;
    const links = [this.#link, this.#next];
    this.#link = this.#next = null;
    for (const link of links) link?.end();
    for (const room of this.#rooms.values()) room.hush();
    this.#become("closed");
  }

  /**
   * Returns the Room of a conversation, which is subscribed now or as soon as there is a connection. With `presence` the room
   * knows who is online. For a room that was joined before, all options but `presence` are ignored.
   */
  join(conversationId, { after = null, mark = null, epoch = this.#givenEpoch ?? this.epoch, presence = false } = {}) {
    const id = idOf(conversationId);
    let room = this.#rooms.get(id);
    if (!room) {
      const post = (frame) => this.#rooms.get(id) === room && !!this.#ready?.post({ ...frame, conversation_id: id });
      room = new Room(id, { after, mark, epoch, post, me: () => this.userId });
      this.#rooms.set(id, room);
    }
    room.presence ||= presence;
    this.#link?.rooms.want(room);
    return room;
  }

  leave(conversationId) {
    const id = idOf(conversationId), room = this.#rooms.get(id);
    if (!room) return;
    this.#rooms.delete(id);
    room.hush();
    this.#link?.rooms.leave(id);
  }

  /**
   * Resolves to {id, seq, created_at, client_id} when the server has stored the message. Without a connection it waits. It
   * is retried with the same `client_id` (an idempotency key), so the server stores it once.
   */
  async send(conversationId, content, { client_id = newClientId(), type, meta, reply_to } = {}) {
    return this.#change("send", conversationId, { content, client_id, type, meta, reply_to });
  }

  async edit(conversationId, id, content) { return this.#change("edit", conversationId, { id: idOf(id), content }); }
  async delete(conversationId, id) { return this.#change("delete", conversationId, { id: idOf(id) }); }
  async react(conversationId, id, emoji, on = true) { return this.#change("react", conversationId, { id: idOf(id), emoji, on }); }

  /** A page {messages, has_more} in ascending id: the newest, or those before or after a message id. Fails while offline. */
  async history(conversationId, { before, after, limit } = {}) {
    const id = idOf(conversationId);
    const page = await this.#read({ event: "history", conversation_id: id, before, after, limit });
    this.#rooms.get(id)?.arrived(page.messages);
    return page;
  }

  #change(event, conversationId, fields) { return this.#outbox.put({ event, conversation_id: idOf(conversationId), ...fields }); }

  /** Sends the request again if another link has replaced this one meanwhile, or if the token has expired. */
  async #read(frame) {
    for (let refreshed = false; ; ) {
      const link = this.#ready;
      if (!link) throw new ChatError({ code: "disconnected" });
      try {
        return await link.request(frame);
      } catch (error) {
        if (error.code === "disconnected" && this.#ready && this.#ready !== link) continue;
        if (error.code !== "token_expired" || refreshed) throw error;
        await this.#token.refresh(link);
        refreshed = true;
      }
    }
  }

  // Connecting

  /** The link, after the server has sent `ready`; else null. */
  get #ready() { return this.#link?.readyAt ? this.#link : null; }

  #become(state, detail = {}) {
    this.state = state;
    emit(this, "state", { state, ...detail });
  }

  #makeLink() {
    const link = new Link({
      received: (frame, about) => this.#receive(link, frame, about),
      ended: (code, reason) => this.#lost(link, code, reason),
      patience: this.#patience,
    });
    link.rooms = new Subscriptions(link, {
      joined: (id) => this.#rooms.get(id),
      refresh: () => this.#token.refresh(link),
      over: (room, error) => this.#over(room, error),
    });
    return link;
  }

  #dial() {
    const link = this.#link = this.#makeLink();
    this.#become("connecting");
    this.#open(link);
  }

  async #open(link) {
    try {
      await this.#token.get();
      link.open(this.#url);
    } catch (error) {
      link.end(LOST, String(error?.message ?? error));
    }
  }

  /** The server will stop: opens another link before it does. If that fails, the server's close frame starts a reconnect. */
  #moveSoon(old, [soonest, latest]) {
    old.after(soonest + random(latest - soonest), () => {
      if (old !== this.#link || this.#next) return;
      this.#open((this.#next = this.#makeLink()));
    });
  }

  #move(link) {
    const old = this.#link;
    this.#link = link;
    this.#next = null;
    old.end(); // requests that it has not answered are sent again, with the same client_id
  }

  #greeted(link, hello) {
    this.limits = link.limits;
    this.#window = hello.reconnect?.window ?? RESTART_WINDOW;
    this.#authenticate(link);
  }

  /** `marks` is false for an old server, which does not know them. */
  #authenticate(link, marks = true) {
    const token = this.#token.current;
    if (token === null) return link.end(TOKEN_EXPIRED, "the token has expired");
    const frame = { event: "auth", token, epoch: this.epoch };
    const space = (link.limits.frame ?? Infinity) - sizeOf(JSON.stringify(frame)) - 100; // for `rooms` and `ref`
    frame.rooms = link.rooms.named(this.#rooms.values(), this.epoch, space, marks);
    link.request(frame).catch((error) => {
      const marked = Object.values(frame.rooms).some((cursor) => cursor?.mark);
      if (error.code === "bad_request" && marked) this.#authenticate(link, false);
      else this.#turnedAway(link, error);
    });
  }

  /** Ends the link after a refusal for which the server sends no close frame: the client must not wait for its timeout. */
  #turnedAway(link, { code, message, retryable }) {
    if (code === "token_expired") link.end(TOKEN_EXPIRED, message);
    else if (retryable) link.end(AUTH_UNAVAILABLE, message);
    else if (code === "bad_request" || code === "too_large") link.end(PROTOCOL_ERROR, message);
  }

  #welcome(link, ready) {
    link.readyAt = Date.now();
    if (link === this.#next) this.#move(link);
    this.epoch = ready.epoch;
    this.userId = ready.user_id;
    this.#token.lasts(link, ready.expires_in);
    this.#become("online");
    link.rooms.welcome(ready.rooms, ready.epoch);
    for (const room of [...this.#rooms.values()]) link.rooms.want(room); // the rooms that `auth` did not list
    this.#outbox.flush();
  }

  #lost(link, code, reason) {
    if (link === this.#next) this.#next = null;
    if (link !== this.#link) return;
    this.#link = this.#next;
    this.#next = null;
    if (this.#link) return this.#become("connecting"); // its successor is being opened already
    if (code === TOKEN_EXPIRED || isFinal(code)) this.#token.forget();
    if (isFinal(code)) return this.#become("stopped", { code, reason });
    if (link.readyAt && Date.now() - link.readyAt >= STEADY) this.#tries = 0, (this.#patience = 1);
    else if (code === NO_PONG) this.#patience = Math.min(2 * this.#patience, PATIENCE_MAX);
    this.#notBefore = OVERLOADED.has(code) ? Date.now() + OVERLOAD_WAIT : 0;
    this.#retryIn(this.#wait(code), { code, reason });
  }

  #wait(code) {
    if (GOING_AWAY.has(code)) return random(Math.min(this.#window, this.#longestWait));
    return backoff(this.#tries++, this.#longestWait) + (OVERLOADED.has(code) ? OVERLOAD_WAIT : 0);
  }

  #retryIn(wait, detail) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#dial(), wait);
    this.#become("offline", { ...detail, retryAt: Date.now() + wait });
  }

  // The page

  #listen() {
    if (this.#ears) return;
    const { signal } = (this.#ears = new AbortController());
    globalThis.addEventListener?.("online", () => this.#networkIsBack(), { signal });
    globalThis.addEventListener?.("pageshow", ({ persisted }) => persisted && this.#thaw(), { signal });
    globalThis.document?.addEventListener("resume", () => this.#thaw(), { signal });
  }

  #networkIsBack() {
    if (this.#link) this.#link.probe();
    else if (this.state === "offline") this.#retryIn(Math.max(random(ONLINE_WAIT), this.#notBefore - Date.now()));
  }

  /** While a page is frozen, browsers discard its frames, replies too. A new link resumes from the cursors. */
  #thaw() {
    if (!this.#ready) return;
    this.#ready.end(LOST, "the page was frozen");
    this.connect();
  }

  // Receiving

  #receive(link, frame, about) {
    if (frame.event === "hello") this.#greeted(link, frame);
    else if (frame.event === "ready") this.#welcome(link, frame);
    else if (frame.event === "reconnect") this.#moveSoon(link, frame.delay);
    else if (frame.event === "error") frame.ref === undefined && emit(this, "error", frame);
    else link.rooms.take(frame, about);
  }

  #over(room, { code, message }) {
    if (this.#rooms.get(room.id) !== room) return;
    this.#rooms.delete(room.id);
    room.hush();
    emit(room, "unsubscribed", { code, message });
  }
}
