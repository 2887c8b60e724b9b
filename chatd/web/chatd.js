/**
 * chatd.js: a client for the protocol chatd.v1, in one file without dependencies.
 *
 *     const chat = new Chat({ url: "wss://chat.example.com/ws", token: async () => "…" });
 *     const room = chat.join(1);
 *     room.addEventListener("message", ({ detail }) => console.log(detail.user_id, detail.content));
 *     chat.connect();
 *     await chat.send(1, "Hello");
 *
 * Chat decides when to connect and keeps what is unanswered, Link is one WebSocket, Room is one conversation with its
 * cursor. The application's code runs in event listeners and in `token` alone: what a listener throws is reported as an
 * uncaught error by the browser and reaches nothing in here.
 */

const SECOND = 1000; // ms, the unit of all times below
const BACKOFF_FIRST = 0.5 * SECOND;
const BACKOFF_MAX = 20 * SECOND;
const OVERLOAD_WAIT = 5 * SECOND;
const STEADY = 10 * SECOND; // a connection that lived so long past `ready` was a good one: the backoff starts over
const OPEN_TIMEOUT = 20 * SECOND; // to get a token, open the socket and hear the first frame
const RESTART_WINDOW = 5 * SECOND; // unless the server's `hello` named another
const TIMER_MAX = 2 ** 31 - 1; // setTimeout fires at once beyond it
const REFUSALS_MAX = 10; // a request that the server keeps failing must not block those behind it for ever

// Close codes
const GOING_AWAY = new Set([1001, 1012]);
const OVERLOADED = new Set([1013, 4006]);
const LOST = 1006, TOO_BIG = 1009, NO_PONG = 4000, TOKEN_EXPIRED = 4001, AUTH_UNAVAILABLE = 4005;
const isFinal = (code) => code >= 4500 && code <= 4999;

const RETRYABLE = new Set(["rate_limited", "unavailable", "internal", "disconnected"]);
const CHANGES = { message: "message", "message.updated": "updated", "message.deleted": "deleted" };
const EPHEMERAL = new Set(["receipt", "typing", "presence", "member"]);
const REPLIES = new Set(["ok", "history", "pong"]);

const random = (limit) => Math.random() * limit;
const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));
const backoff = (tries) => random(Math.min(BACKOFF_MAX, BACKOFF_FIRST * 2 ** tries));
const emit = (target, type, detail) => target.dispatchEvent(new CustomEvent(type, { detail }));

/** 128 random bits. crypto.randomUUID() exists only on https and localhost. */
export const newClientId = () =>
  Array.from(crypto.getRandomValues(new Uint32Array(4)), (word) => word.toString(16).padStart(8, "0")).join("");

/** The server's `error`, or code "disconnected" when the connection ended before the reply. */
export class ChatError extends Error {
  constructor({ code, message, field, retryable = RETRYABLE.has(code), retry_after }) {
    super(message || code);
    Object.assign(this, { name: "ChatError", code, field, retryable, retryAfter: retry_after });
  }
}

/**
 * One conversation. `cursor` is the seq of the last change that was delivered, null before the first answer.
 *
 * Events (`detail` in brackets): message, updated, deleted [the message as it is now]; reset [{messages, has_more}: discard
 * what you hold and show these]; subscribed [the server's answer]; unsubscribed [{code, message}: this Room is over];
 * receipt, typing, presence, member [the frame]; event [the frame of a backend's own event].
 */
export class Room extends EventTarget {
  asking = null; // the Link on which a `subscribe` waits for its answer

  constructor(id, after = null) {
    super();
    this.id = id;
    this.cursor = after;
  }

  /** Delivers one change; false says that changes before it are missing. */
  change(frame) {
    if (frame.seq > this.cursor + 1) return false;
    if (frame.seq <= this.cursor) return true;
    // First the cursor, then the listeners: whatever they do, a change is never delivered again.
    if (frame.seq !== undefined) this.cursor = frame.seq;
    emit(this, CHANGES[frame.event], frame);
    return true;
  }

  /** Takes the answer to a subscription: what was missed, or a fresh start. */
  synced(answer) {
    this.asking = null;
    if (answer.recovered) {
      for (const change of answer.changes) {
        if (change.seq <= this.cursor) continue;
        this.cursor = change.seq;
        emit(this, CHANGES[change.event], change);
      }
      // While one socket replaces another, the old one may have brought more than the new one's answer knows of.
      this.cursor = Math.max(this.cursor, answer.seq);
    } else {
      this.cursor = answer.seq;
      emit(this, "reset", { messages: answer.changes, has_more: answer.has_more });
    }
    emit(this, "subscribed", answer);
  }
}

/** One WebSocket, from its token to its end: frames, replies, and whether the other side is alive. */
class Link {
  token = null;
  readyAt = 0;
  asked = new Set(); // the rooms that `auth` named
  #socket = null;
  #replies = new Map();
  #lastRef = 0;
  #silence = OPEN_TIMEOUT;
  #heard = Date.now();
  #watchdog;
  #ended = false;

  constructor({ received, ended }) {
    Object.assign(this, { received, ended });
    this.#watch();
  }

  open(url) {
    this.#socket = new WebSocket(url, "chatd.v1");
    this.#socket.onmessage = ({ data }) => this.#read(JSON.parse(data));
    this.#socket.onclose = ({ code, reason }) => this.end(code, reason);
  }

  post(frame) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(frame));
  }

  /** Posts a frame; the promise is the server's reply to it. */
  request(frame) {
    return new Promise((resolve, reject) => {
      const ref = ++this.#lastRef;
      if (this.#ended) return reject(new ChatError({ code: "disconnected" }));
      this.#replies.set(ref, { resolve, reject });
      this.post({ ...frame, ref });
    });
  }

  /** Ends the link at once: close() on a dead socket would wait for minutes before it reported anything. */
  end(code = LOST, reason = "") {
    if (this.#ended) return;
    this.#ended = true;
    clearTimeout(this.#watchdog);
    if (this.#socket) {
      this.#socket.onmessage = this.#socket.onclose = null;
      this.#socket.close();
    }
    const error = new ChatError({ code: code === TOO_BIG ? "too_large" : "disconnected", message: reason });
    for (const { reject } of this.#replies.values()) reject(error);
    this.ended(code, reason);
  }

  #read(frame) {
    this.#heard = Date.now();
    if (frame.event === "ping") return this.post({ event: "pong" });
    if (frame.event === "hello") this.#watch((frame.ping_interval + frame.ping_timeout) * SECOND);
    const reply = this.#replies.get(frame.ref);
    this.#replies.delete(frame.ref);
    // Listeners see a frame before the code that waits for the reply: in the order in which the frames came.
    this.received(frame);
    if (frame.event === "error") reply?.reject(new ChatError(frame));
    else reply?.resolve(frame);
  }

  /** By the wall clock, which unlike others goes on while a laptop sleeps: on waking, a dead link is found at once. */
  #watch(silence = this.#silence) {
    this.#silence = silence;
    clearTimeout(this.#watchdog);
    const left = this.#heard + silence - Date.now();
    if (left <= 0) this.end(NO_PONG, "nothing heard from the server");
    else this.#watchdog = setTimeout(() => this.#watch(), left);
  }
}

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
  #token = null;
  #tokenEnds = Infinity;
  #rooms = new Map();
  #link = null; // the connection that is ready
  #next = null; // the one being made, the first or its successor
  #timer;
  #tries = 0;
  #window = RESTART_WINDOW;
  #outbox = []; // unanswered changes, oldest first
  #draining = false;

  /** `epoch` only together with cursors kept from an earlier page: `join(id, {after})`. */
  constructor({ url, token, epoch }) {
    super();
    this.#url = url;
    this.#askToken = token;
    this.epoch = epoch;
  }

  /** Connects, or tries now instead of at the end of the wait. Does nothing while connecting or online. */
  connect() {
    if (this.#link || this.#next) return;
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

  /** The Room of a conversation, subscribed now or as soon as there is a connection. */
  join(conversationId, { after = null } = {}) {
    const known = this.#rooms.get(conversationId);
    if (known) return known;
    const room = new Room(conversationId, after);
    this.#rooms.set(conversationId, room);
    this.#subscribe(room);
    return room;
  }

  leave(conversationId) {
    if (this.#rooms.delete(conversationId)) this.#link?.post({ event: "unsubscribe", conversation_id: conversationId });
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
    if (!this.#link) throw new ChatError({ code: "disconnected" });
    return this.#link.request({ event: "history", conversation_id: conversationId, before, after, limit });
  }

  /** Everything up to the message `id` was read. */
  read(conversationId, id) { this.#link?.post({ event: "read", conversation_id: conversationId, id }); }
  typing(conversationId, active = true) { this.#link?.post({ event: "typing", conversation_id: conversationId, active }); }

  // Connecting

  #become(state, detail = {}) {
    this.state = state;
    emit(this, "state", { state, ...detail });
  }

  async #dial() {
    const link = new Link({
      received: (frame) => this.#receive(link, frame),
      ended: (code, reason) => this.#lost(link, code, reason),
    });
    this.#next = link;
    if (!this.#link) this.#become("connecting");
    try {
      link.token = await this.#currentToken();
      if (link === this.#next) link.open(this.#url);
    } catch (error) {
      link.end(LOST, error.message);
    }
  }

  async #currentToken() {
    if (this.#token === null || Date.now() >= this.#tokenEnds) {
      this.#token = await this.#askToken();
      this.#tokenEnds = Infinity; // until `ready` tells
    }
    return this.#token;
  }

  #authenticate(link, hello) {
    this.limits = hello.limits;
    this.#window = hello.reconnect?.window ?? RESTART_WINDOW;
    link.asked = new Set(this.#rooms.keys());
    const rooms = Object.fromEntries(Array.from(this.#rooms.values(), (room) => [room.id, room.cursor]));
    link.request({ event: "auth", token: link.token, rooms, epoch: this.epoch }).catch((error) => {
      // Waiting on would end in "no auth in time", which is final. The other refusals are followed by a close of their own.
      if (error.code === "token_expired") link.end(TOKEN_EXPIRED, error.message);
      else if (error.retryable) link.end(AUTH_UNAVAILABLE, error.message);
    });
  }

  #ready(link, ready) {
    if (link !== this.#next) return;
    const old = this.#link;
    this.#link = link;
    this.#next = null;
    link.readyAt = Date.now();
    old?.end();
    this.epoch = ready.epoch;
    this.userId = ready.user_id;
    if (!old) this.#become("online");
    for (const room of [...this.#rooms.values()]) {
      room.asking = null;
      const answer = ready.rooms[room.id];
      if (answer) room.synced(answer);
      else if (!link.asked.has(room.id)) this.#subscribe(room); // joined since `auth` left
    }
    for (const id of link.asked) if (!this.#rooms.has(id)) link.post({ event: "unsubscribe", conversation_id: id });
    this.#refreshLater(link, ready.expires_in);
    this.#drain();
  }

  #lost(link, code, reason) {
    if (link === this.#next) this.#next = null;
    else if (link === this.#link) this.#link = null;
    else return;
    if (code === TOKEN_EXPIRED || isFinal(code)) this.#token = null;
    if (this.#link) return; // its successor failed; the old connection serves on until the server ends it
    if (this.#next) return this.#become("connecting");
    if (isFinal(code)) return this.#become("stopped", { code, reason });
    if (link.readyAt && Date.now() - link.readyAt >= STEADY) this.#tries = 0;
    const wait = this.#wait(code);
    this.#timer = setTimeout(() => this.#dial(), wait);
    this.#become("offline", { code, reason, retryAt: Date.now() + wait });
  }

  /** Every wait is random from nought: the clients of a server that fell over must not all come back in step. */
  #wait(code) {
    if (GOING_AWAY.has(code)) return random(this.#window);
    return backoff(this.#tries++) + (OVERLOADED.has(code) ? OVERLOAD_WAIT : 0);
  }

  /** The server asks to move: the successor is made first, so that the old connection leaves no gap. */
  #handOver(link, { delay: [min, max] }) {
    setTimeout(() => {
      if (link === this.#link && !this.#next) this.#dial();
    }, min + random(max - min));
  }

  #refreshLater(link, seconds) {
    if (!(seconds > 1)) return; // no expiry, or too late: then the server closes with 4001 and the next dial gets a token
    this.#tokenEnds = Date.now() + seconds * SECOND;
    const wait = seconds * SECOND * (0.7 + random(0.2));
    setTimeout(() => link === this.#link && this.#refresh(link), Math.min(wait, TIMER_MAX));
  }

  async #refresh(link) {
    let left = (this.#tokenEnds - Date.now()) / SECOND;
    try {
      const token = await this.#askToken();
      left = (await link.request({ event: "refresh", token })).expires_in;
      this.#token = token;
    } catch {
      // Tried again in what is left of the old token's time.
    }
    if (link === this.#link) this.#refreshLater(link, left);
  }

  // Receiving

  #receive(link, frame) {
    const room = this.#rooms.get(frame.conversation_id);
    if (frame.event === "hello") this.#authenticate(link, frame);
    else if (frame.event === "ready") this.#ready(link, frame);
    else if (frame.event === "reconnect") this.#handOver(link, frame);
    else if (frame.event === "error") frame.ref ?? emit(this, "error", frame);
    else if (!room || REPLIES.has(frame.event)) return;
    else if (frame.event === "subscribed") room.synced(frame);
    else if (frame.event === "unsubscribed") this.#refused(room, frame);
    else if (frame.event in CHANGES) room.change(frame) || this.#subscribe(room);
    else emit(room, EPHEMERAL.has(frame.event) ? frame.event : "event", frame);
  }

  #subscribe(room) {
    const link = this.#link;
    if (!link || room.asking === link) return;
    room.asking = link;
    const after = room.cursor ?? undefined;
    link.request({ event: "subscribe", conversation_id: room.id, after, epoch: this.epoch }).catch((error) => {
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
    while (this.#link && this.#outbox.length) {
      if (await this.#deliver(this.#outbox[0])) this.#outbox.shift();
    }
    this.#draining = false;
  }

  /** True when the entry is settled, false when it has to be sent again. */
  async #deliver(entry) {
    try {
      entry.resolve(await this.#link.request(entry.frame));
      return true;
    } catch (error) {
      if (error.code === "disconnected") return false;
      const expired = error.code === "token_expired";
      entry.refusals += 1;
      if (entry.refusals === REFUSALS_MAX || !(error.retryable || expired)) {
        entry.reject(error);
        return true;
      }
      if (expired && this.#link) await this.#refresh(this.#link);
      await sleep(error.retryAfter ? error.retryAfter * SECOND : backoff(entry.refusals));
      return false;
    }
  }
}
