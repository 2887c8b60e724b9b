/**
 * One conversation of chatd.js: its cursor, how far everybody has read, who types and who is online.
 *
 * Events (`detail` in brackets): message, updated, deleted [the message as it is now]; reset [{messages, has_more}: discard
 * what you hold and show these]; subscribed [the server's answer]; unsubscribed [{code, message}: this Room is over];
 * receipt, typing, presence [the frame: `receipts`, `typists` and `online` are up to date]; event [any other frame about
 * this conversation, such as your backend's own events].
 */

export const CHANGES = { message: "message", "message.updated": "updated", "message.deleted": "deleted" };
export const emit = (target, type, detail) => target.dispatchEvent(new CustomEvent(type, { detail }));

const TYPING_EVERY = 2_500; // ms between two notices that go out: the server tells of one in two seconds
const RECEIPTS_EVERY = 400; // ms that receipts are gathered

export class Room extends EventTarget {
  asking = null; // the Link on which a `subscribe` waits for its answer
  receipts = new Map(); // by user: {read, delivered}, message ids
  typists = new Map(); // by user: the timer that ends it
  online = new Set(); // users; only with `presence`
  #versions = new Map(); // by user, of what is known of their presence
  #post;
  #me;
  #typedAt = 0;
  #said = { read: 0, delivered: 0 }; // what the server has of us
  #toSay = { read: 0, delivered: 0 };
  #timer = null;

  constructor(id, { after = null, presence = false, post = () => false, me = () => null } = {}) {
    super();
    this.id = id;
    this.cursor = after;
    this.presence = presence;
    this.#post = post;
    this.#me = me;
  }

  /** Say that the user is typing, as often as you like; `false` when the text was sent or is gone. */
  typing(active = true) {
    const now = Date.now();
    if (active && now - this.#typedAt < TYPING_EVERY) return;
    if (!active && !this.#typedAt) return;
    this.#typedAt = active ? now : 0;
    this.#post({ event: "typing", active });
  }

  /** Everything up to this message id has been seen by the user. That it has arrived is said by itself. */
  read(id) { this.#say("read", id); }

  // For Chat

  /** Takes a live change; false says that changes before it are missing. */
  change(frame) {
    if (frame.seq > this.cursor + 1) return false;
    this.#deliver(frame);
    return true;
  }

  /** Takes the answer to a subscription: what was missed, or a fresh start. */
  synced(answer) {
    this.asking = null;
    for (const { user_id, read, delivered } of answer.receipts ?? []) this.#reached(user_id, { read, delivered });
    if (answer.online) this.#present(answer.online);
    if (answer.recovered) for (const change of answer.changes) this.#deliver(change);
    // While two links are up, the old one may have brought more than the new one's answer knows.
    this.cursor = answer.recovered ? Math.max(this.cursor, answer.seq) : answer.seq;
    if (!answer.recovered) emit(this, "reset", { messages: answer.changes, has_more: answer.has_more });
    emit(this, "subscribed", answer);
    this.#saySoon(); // what could not be said while the connection was away
  }

  /** Takes any other frame. */
  hear(frame) {
    if (frame.event === "receipt") this.#reached(frame.user_id, frame);
    else if (frame.event === "typing") this.#types(frame.user_id, frame.active, frame.expires_in);
    else if (frame.event === "presence" && !this.#comes(frame)) return;
    emit(this, ["receipt", "typing", "presence"].includes(frame.event) ? frame.event : "event", frame);
  }

  /** First the cursor, then the listeners: whatever they do, a change is never delivered again. */
  #deliver(frame) {
    if (frame.seq <= this.cursor) return;
    if (frame.seq !== undefined) this.cursor = frame.seq; // what a backend published by itself has none
    if (frame.event === "message" && frame.user_id !== this.#me()) this.#say("delivered", frame.id ?? 0);
    if (frame.event === "message") this.#types(frame.user_id, false);
    emit(this, CHANGES[frame.event], frame);
  }

  // Receipts

  #reached(user, { read = 0, delivered = 0 }) {
    const known = this.receipts.get(user) ?? { read: 0, delivered: 0 };
    const now = { read: Math.max(known.read, read), delivered: Math.max(known.delivered, delivered) };
    this.receipts.set(user, now);
    if (user === this.#me()) this.#said = { ...now };
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
      if (read > this.#said.read) this.#post({ event: "read", id: read });
      if (delivered > Math.max(this.#said.delivered, read)) this.#post({ event: "delivered", id: delivered });
    }, RECEIPTS_EVERY);
  }

  // Typing and presence

  #types(user, active, seconds = 0) {
    const known = this.typists.get(user);
    clearTimeout(known);
    this.typists.delete(user);
    if (!active) return;
    const over = () => (this.#types(user, false), emit(this, "typing", { user_id: user, active: false, expires_in: 0 }));
    this.typists.set(user, setTimeout(over, seconds * 1_000)); // also when the end of it never comes
  }

  #present(users) {
    this.online = new Set(users);
    this.#versions.clear();
  }

  /** False for what is older than what is known. */
  #comes({ user_id, online, version }) {
    if (version < this.#versions.get(user_id)) return false;
    this.#versions.set(user_id, version);
    this.online[online ? "add" : "delete"](user_id);
    return true;
  }
}
