/**
 * What is known of one conversation, without a page and without a connection. Messages come as pages of history, as changes
 * and from the composer, in any order; here they become one list in which each stands once, as it is now.
 *
 * The list has no gap: it begins with the oldest message that is held, and has all that came after it. So a page is asked for
 * only when changes arrive already, it must be the one before the oldest, and the oldest stays where it is meanwhile.
 */

const KEEP = 300, KEEP_MAX = 600; // messages held in memory while the reader is at the end

export class Conversation {
  messages = new Map(); // by id
  ahead = new Map(); // changes of messages that are not held, while a page is on its way: newer than what it says of them
  unsent = new Map(); // by client_id: also what is stored already, but has not come back yet
  notes = new Map(); // by id: an edit that is under way or was refused
  followed = false; // changes arrive
  loaded = false; // one page at least is here
  loading = false; // a page is on its way
  hasMore = false;
  age = 0; // counts resets: a page asked for before one does not fit what came after it
  unread = 0; // came while nobody could see this room
  below = 0; // came while the reader was further up
  refusal = null;

  constructor(id, me) {
    this.id = id;
    this.me = me;
  }

  /** Of the stored ones; undefined when there are none. */
  get oldest() {
    const ids = [...this.messages.keys()].filter(Number.isInteger);
    return ids.length ? Math.min(...ids) : undefined;
  }

  /** In the order of the page: by id, what is unsent last. */
  items() {
    return [...[...this.messages.values()].sort((a, b) => a.id - b.id), ...this.unsent.values()];
  }

  // From the server

  /** What came as a change is newer than what a page says of the same message. */
  change(message, created = false) {
    // What a backend published by itself may lack anything; without an id it belongs after the newest.
    const id = message.id ?? Math.max(0, ...this.messages.keys()) + 0.001;
    const whole = { user_id: 0, created_at: new Date().toISOString(), ...message, id };
    if (this.messages.has(id) || (created && !(id < this.oldest))) this.messages.set(id, whole);
    else if (this.loading) this.ahead.set(id, whole);
    this.#isSent(message);
  }

  /** The next page is asked for: before which message. `page` and `ends` must follow, or `ends` alone. */
  begins() {
    this.loading = true;
    return this.oldest;
  }

  ends() {
    this.loading = false;
    this.ahead.clear();
  }

  page({ messages, has_more }) {
    for (const message of messages) {
      if (!this.messages.has(message.id)) this.messages.set(message.id, this.ahead.get(message.id) ?? message);
      this.#isSent(message);
    }
    this.hasMore = has_more;
    this.loaded = true;
  }

  reset({ messages, has_more }) {
    this.age += 1;
    for (const held of [this.messages, this.ahead, this.notes]) held.clear();
    for (const [clientId, { id }] of this.unsent) if (id) this.unsent.delete(clientId); // it is in the history
    this.page({ messages, has_more });
    this.loaded = messages.length > 0 || !has_more;
  }

  /** The user has read up to this message, perhaps elsewhere. */
  seen(id) {
    const newer = [...this.messages.values()].filter((message) => message.id > id && message.user_id !== this.me);
    this.unread = Math.min(this.unread, newer.length);
  }

  /** Forgets the oldest when there are many: history has them. */
  trim() {
    if (this.loading || this.messages.size <= KEEP_MAX) return;
    for (const id of [...this.messages.keys()].sort((a, b) => a - b).slice(0, -KEEP)) this.messages.delete(id);
    this.hasMore = true;
  }

  #isSent({ user_id, client_id }) {
    if (user_id === this.me) this.unsent.delete(client_id);
  }

  // From the composer

  /** Shown at once, and until the server's own version of it comes. */
  pending(clientId, content) {
    const created_at = new Date().toISOString();
    this.unsent.set(clientId, { client_id: clientId, user_id: this.me, content, created_at, state: "pending" });
  }

  /** The reply to a send. Usually the message itself came first; else it stays last until it comes, after those before it. */
  stored(clientId, { id, created_at }) {
    if (!this.unsent.has(clientId)) return;
    const { state, ...message } = this.unsent.get(clientId);
    this.unsent.set(clientId, { ...message, id, created_at });
  }

  failed(clientId, error) {
    const message = this.unsent.get(clientId);
    if (message) this.unsent.set(clientId, { ...message, state: "failed", error });
  }
}
