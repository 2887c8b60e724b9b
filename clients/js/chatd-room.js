/**
 * chatd-room.js: a Room is one conversation of chatd.js: its cursor, its receipts, who types and who is online. Subscriptions,
 * further down, are the rooms on one Link.
 *
 * Events (`detail` in brackets): message, updated, deleted [the message as it is now]; reset [{messages, has_more}: discard
 * what you hold and show these]; subscribed [the server's answer]; unsubscribed [{code, message}: this Room is over];
 * receipt, typing, presence [the frame: `receipts`, `typists` and `online` are up to date]; event [any other frame about
 * this conversation, such as your backend's own events].
 */

import { backoff, ChatError, idOf, SECOND } from "./chatd-link.js";

export const CHANGES = { message: "message", "message.updated": "updated", "message.deleted": "deleted" };
export const emit = (target, type, detail) => target.dispatchEvent(new CustomEvent(type, { detail }));

const TYPING_EVERY = 2_500; // ms between two `typing` frames: the server passes on one in two seconds
const RECEIPTS_EVERY = 400; // ms for which receipts are collected (debounced)
const LONGEST_PAUSE = 20 * SECOND; // before a subscription that was temporarily refused is tried again

// What the subscription of a room on a link waits for; null when it is up to date.
const READY = "ready", REPLY = "reply", PAUSE = "pause", LEFT = "left";

export class Room extends EventTarget {
  mark; // the mark of the change at `cursor`, with which the server checks that the cursor is of its history
  epoch; // the epoch of the data to which `cursor` belongs
  receipts = new Map(); // by user: {read, delivered}, message ids
  typists = new Map(); // by user: the timer that removes the user
  online = new Set(); // users; only with `presence`
  #versions = new Map(); // by user: the version of the presence that is known
  #post;
  #me;
  #typedAt = 0;
  #said = { read: 0, delivered: 0 }; // the user's receipts that the server has
  #toSay = { read: 0, delivered: 0 }; // the user's receipts that it should have
  #timer = null;

  constructor(id, { after = null, mark = null, epoch, presence = false, post = () => false, me = () => null } = {}) {
    super();
    this.id = id;
    this.cursor = after;
    this.mark = mark;
    this.epoch = epoch;
    this.presence = presence;
    this.#post = post;
    this.#me = me;
  }

  /** Reports that the user is typing. You may call it for each key. Pass `false` when the text was sent or deleted. */
  typing(active = true) {
    const now = Date.now();
    if (active && Math.abs(now - this.#typedAt) < TYPING_EVERY) return;
    if (!active && !this.#typedAt) return;
    this.#typedAt = active ? now : 0;
    this.#post({ event: "typing", active });
  }

  /** Reports that the user has read everything up to this message id. Delivery is reported automatically. */
  read(messageId) { this.#say("read", idOf(messageId)); }

  // For Chat and Subscriptions

  /** Takes a live change. Returns false if changes before it are missing. */
  change(frame) {
    if (frame.seq > this.cursor + 1) return false;
    this.#deliver(frame);
    return true;
  }

  /** Whether an unrequested answer follows this room's cursor without a gap. */
  continues({ recovered, changes, seq }) {
    return !recovered || this.cursor === null || (changes[0]?.seq ?? seq + 1) <= this.cursor + 1;
  }

  /**
   * Takes the answer to a subscription: the missed changes, or a new state. When `live()` becomes false, a listener has left
   * the room or closed the connection. The rest is not delivered then, and can still be fetched with the cursor.
   */
  synced(answer, live = () => true) {
    this.epoch = answer.epoch;
    this.#said = { read: 0, delivered: 0 }; // receipts that were sent on another link may be lost
    if (!answer.recovered) this.#startOver(answer);
    for (const { user_id, read, delivered } of answer.receipts ?? []) this.#reached(user_id, { read, delivered });
    if (answer.online) this.#present(answer.online);
    if (answer.recovered) {
      for (const change of answer.changes) if (live()) this.#deliver(change);
      if (live()) this.#advance(answer); // else the cursor stays at the last delivered change
    }
    if (!answer.recovered) emit(this, "reset", { messages: answer.changes, has_more: answer.has_more });
    if (!live()) return;
    emit(this, "subscribed", answer);
    if (live()) this.#saySoon(); // receipts that could not be sent without a connection
  }

  /** Takes any other frame. */
  hear(frame) {
    if (frame.event === "receipt") this.#reached(frame.user_id, frame);
    else if (frame.event === "typing") this.#types(frame.user_id, frame.active, frame.expires_in);
    else if (frame.event === "presence" && !this.#comes(frame)) return;
    emit(this, ["receipt", "typing", "presence"].includes(frame.event) ? frame.event : "event", frame);
  }

  /** Reports these messages as delivered, however they have arrived. */
  arrived(messages) {
    for (const { id = 0, user_id } of messages) if (user_id !== this.#me()) this.#say("delivered", id);
  }

  /** Stops all timers, because the room was left or the connection closed. */
  hush() {
    clearTimeout(this.#timer);
    this.#timer = null;
    for (const timer of this.typists.values()) clearTimeout(timer);
    this.typists.clear();
    this.#typedAt = 0;
  }

  /** Advances the cursor before it calls the listeners, so that a change is never delivered twice, whatever they do. */
  #deliver(frame) {
    if (frame.seq <= this.cursor) return;
    if (frame.seq !== undefined) this.#advance(frame); // a message that a backend has published itself has no seq
    if (frame.event === "message") this.arrived([frame]);
    if (frame.event === "message") this.#types(frame.user_id, false);
    emit(this, CHANGES[frame.event], frame);
  }

  /** Never moves the cursor back: while two links are open, the old one may be ahead of the new one's answer. */
  #advance({ seq, mark = null }) {
    if (seq < this.cursor) return;
    this.mark = mark ?? (seq === this.cursor ? this.mark : null);
    this.cursor = seq;
  }

  /** Discards the known state: it may be of a lost history, whose message ids are assigned again to other messages. */
  #startOver({ seq, mark = null, changes }) {
    Object.assign(this, { cursor: seq, mark, receipts: new Map() });
    this.#toSay = { read: 0, delivered: 0 };
    for (const user of this.typists.keys()) this.#types(user, false);
    this.arrived(changes);
  }

  // Receipts

  #reached(user, { read = 0, delivered = 0 }) {
    const known = this.receipts.get(user) ?? { read: 0, delivered: 0 };
    const now = { read: Math.max(known.read, read), delivered: Math.max(known.delivered, delivered) };
    this.receipts.set(user, now);
    if (user === this.#me()) this.#said = { ...now }; // reported on this connection, or on another device
  }

  #say(what, id) {
    if (id <= this.#toSay[what]) return;
    this.#toSay[what] = id;
    this.#saySoon();
  }

  #saySoon() {
    this.#timer ??= setTimeout(() => {
      this.#timer = null;
      const { read, delivered } = this.#toSay;
      if (read > this.#said.read && this.#post({ event: "read", id: read })) this.#said.read = read;
      const rest = delivered > Math.max(this.#said.delivered, read);
      if (rest && this.#post({ event: "delivered", id: delivered })) this.#said.delivered = delivered;
    }, RECEIPTS_EVERY);
  }

  // Typing and presence

  #types(user, active, seconds = 0) {
    const known = this.typists.get(user);
    clearTimeout(known);
    this.typists.delete(user);
    if (!active) return;
    const over = () => (this.#types(user, false), emit(this, "typing", { user_id: user, active: false, expires_in: 0 }));
    this.typists.set(user, setTimeout(over, seconds * 1_000)); // in case the frame for the end is lost
  }

  #present(users) {
    this.online = new Set(users);
    this.#versions.clear();
  }

  /** Takes a presence frame. Returns false if it is older than the known state. */
  #comes({ user_id, online, version }) {
    if (version < this.#versions.get(user_id)) return false;
    this.#versions.set(user_id, version);
    this.online[online ? "add" : "delete"](user_id);
    return true;
  }
}

/**
 * The rooms on one Link, and for which answer each of them waits.
 *
 * While a room waits for an answer, its live changes are ignored: the answer includes them, or they follow it. A room that is
 * left and joined again is subscribed only when the server has confirmed that it was left, so that frames of the old
 * subscription are not mistaken for those of the new one.
 */
export class Subscriptions {
  #all = new Map(); // by conversation: {room, waits, presence, tries}
  #link;
  #joined;
  #refresh;
  #over;

  /**
   * `joined(id)` returns the Room that the application has joined; `refresh()` sends the server a new token; `over(room, error)`
   * is called for a room that the server refuses or has ended.
   */
  constructor(link, { joined, refresh, over }) {
    this.#link = link;
    this.#joined = joined;
    this.#refresh = refresh;
    this.#over = over;
  }

  /**
   * Returns the `rooms` of an `auth` with this epoch: as many as the server allows and as fit into `space` bytes. Rooms whose
   * cursor has another epoch are subscribed later, one by one. `marks`: whether the server knows marks.
   */
  named(rooms, epoch, space, marks) {
    const named = {};
    this.#all.clear();
    for (const room of rooms) {
      const cursor = marks && room.mark ? { after: room.cursor, mark: room.mark } : room.cursor;
      space -= JSON.stringify({ [room.id]: cursor }).length;
      if (space < 0 || this.#all.size >= this.#most) break;
      if (room.cursor !== null && room.epoch !== epoch) continue;
      named[room.id] = cursor;
      this.#all.set(room.id, { room, waits: READY, presence: false, tries: 0 });
    }
    return named;
  }

  /** Takes `ready.rooms`. For a room that is missing there, a frame of its own follows. */
  welcome(answers, epoch) {
    for (const [id, one] of [...this.#all]) {
      if (this.#link.over) return;
      if (!this.#isJoined(one)) this.leave(id);
      else if (answers[id]) this.#answered(one, { epoch, ...answers[id] });
    }
  }

  /** Subscribes the room, or requests its presence. Does nothing if that is in progress. */
  want(room) {
    if (this.#link.over || !this.#link.readyAt) return;
    let one = this.#all.get(room.id);
    if (one?.waits || (one && one.presence >= room.presence)) return;
    if (!one && this.#count >= this.#most) return this.#link.after(0, () => this.#over(room, tooMany(this.#most)));
    if (!one) this.#all.set(room.id, (one = { room, waits: null, presence: false, tries: 0 }));
    this.#ask(one);
  }

  leave(id) {
    const one = this.#all.get(id);
    if (!one || one.waits === LEFT || !this.#link.readyAt) return;
    one.waits = LEFT;
    const left = () => {
      this.#all.delete(id);
      const room = this.#joined(id);
      if (room) this.want(room);
    };
    this.#link.request({ event: "unsubscribe", conversation_id: id }).then(left, (error) => {
      if (error.code !== "disconnected") this.#link.after(SECOND, () => ((one.waits = null), this.leave(id)));
    });
  }

  /** Takes a frame about a conversation. For a reply, `about` is the entry of its request. */
  take(frame, about) {
    const one = this.#all.get(frame.conversation_id);
    if (!one || one.waits === LEFT || !this.#isJoined(one)) return;
    if (frame.event === "subscribed") this.#subscribed(one, frame, about === one);
    else if (frame.event === "unsubscribed") one.waits === REPLY || this.#refused(one, frame);
    else if (Object.hasOwn(CHANGES, frame.event)) this.#changed(one, frame);
    else if (frame.ref === undefined) one.room.hear(frame);
  }

  #changed(one, frame) {
    if (one.waits && frame.seq !== undefined) return;
    if (!one.room.change(frame)) this.#ask(one);
  }

  #subscribed(one, frame, isReply) {
    if (isReply || one.waits === READY || one.room.continues(frame)) this.#answered(one, frame, isReply || one.waits === READY);
    else if (!one.waits) this.#ask(one);
  }

  /** Takes an answer. If it is only a part of one (not `complete`), the room waits for the rest. */
  #answered(one, frame, complete = true) {
    if (complete) Object.assign(one, { waits: null, tries: 0 });
    one.room.synced(frame, () => !this.#link.over && this.#isJoined(one));
    if (!one.waits && this.#isJoined(one)) this.want(one.room); // `auth` does not ask for presence
  }

  #ask(one) {
    const { room } = one;
    one.waits = REPLY;
    one.presence = room.presence;
    const cursor = { after: room.cursor ?? undefined, mark: room.mark ?? undefined, epoch: room.epoch };
    const frame = { event: "subscribe", conversation_id: room.id, ...cursor, presence: room.presence || undefined };
    this.#link.request(frame, one).catch((error) => this.#refused(one, error)); // `take` handles the answer
  }

  #refused(one, { code, message, retryable, retryAfter, retry_after }) {
    if (code === "disconnected" || this.#link.over || this.#all.get(one.room.id) !== one || one.waits === LEFT) return;
    if (!this.#isJoined(one)) return this.leave(one.room.id);
    const error = new ChatError({ code, message, retryable, retry_after: retryAfter ?? retry_after });
    if (error.retryable || code === "token_expired") return this.#pause(one, error);
    this.#all.delete(one.room.id);
    this.#over(one.room, error);
  }

  async #pause(one, { code, retryAfter = 0 }) {
    one.waits = PAUSE;
    if (code === "token_expired") await this.#refresh().catch(() => {});
    const wait = retryAfter * SECOND + backoff((one.tries += 1), LONGEST_PAUSE);
    this.#link.after(wait, () => this.#isJoined(one) && one.waits === PAUSE && this.#ask(one));
  }

  #isJoined(one) { return this.#joined(one.room.id) === one.room; }

  get #count() { return [...this.#all.values()].filter(({ waits }) => waits !== LEFT).length; }

  get #most() { return this.#link.limits.rooms ?? Infinity; }
}

const tooMany = (most) => new ChatError({ code: "limit_exceeded", message: `at most ${most} rooms on a connection` });
