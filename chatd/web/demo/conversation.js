/**
 * The state of one conversation, independent of the page and the connection. Messages arrive as pages of history, as changes
 * and from the composer, in any order. Here they become one list, which has each message once, in its current state.
 *
 * The list has no gaps: it has all messages from the oldest that it holds. So a page is loaded only when changes arrive
 * already, it must be the page before the oldest message, and the oldest message is kept while the page is loading.
 */

const KEEP = 300, KEEP_MAX = 600; // messages held in memory while the reader is at the end

export class Conversation {
  messages = new Map(); // by id
  ahead = new Map(); // changes, during the loading of a page, of messages that may be on it: they are newer than the page
  unsent = new Map(); // by client_id: messages that the server has not delivered back yet, even if they are stored
  notes = new Map(); // by id: the state of an edit that is in progress or was refused
  followed = false; // changes arrive
  loaded = false; // at least one page has arrived
  loading = false; // a page was requested
  hasMore = false;
  age = 0; // counts resets: a page that was requested before a reset is discarded
  unread = 0; // messages that arrived while the room was not visible
  below = 0; // messages that arrived while the reader had scrolled up
  refusal = null;

  constructor(id, me) {
    this.id = id;
    this.me = me;
  }

  /** The id of the oldest stored message; undefined if there is none. */
  get oldest() {
    const ids = [...this.messages.keys()].filter(Number.isInteger);
    return ids.length ? Math.min(...ids) : undefined;
  }

  /** The messages in the order of the page: by id, and unsent ones last. */
  items() {
    return [...[...this.messages.values()].sort((a, b) => a.id - b.id), ...this.unsent.values()];
  }

  // From the server

  /** Takes a change. It is newer than the same message on a page. */
  change(message, created = false) {
    // A message that a backend has published itself may lack any field. Without an id it is put after the newest.
    const id = message.id ?? Math.max(0, ...this.messages.keys()) + 0.001;
    const whole = { user_id: 0, created_at: new Date().toISOString(), ...message, id };
    if (this.messages.has(id) || (created && !(id < this.oldest))) this.messages.set(id, whole);
    else if (this.loading) this.ahead.set(id, whole);
    this.#isSent(message);
  }

  /** Returns the id before which the next page is to be loaded. The caller must call `page` and `ends` next, or only `ends`. */
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
    for (const [clientId, { id }] of this.unsent) if (id) this.unsent.delete(clientId); // stored, so history has it
    this.page({ messages, has_more });
    this.loaded = messages.length > 0 || !has_more;
  }

  /** The user has read up to this message, perhaps on another device. */
  seen(id) {
    const newer = [...this.messages.values()].filter((message) => message.id > id && message.user_id !== this.me);
    this.unread = Math.min(this.unread, newer.length);
  }

  /** Removes the oldest messages if there are many. They can be loaded from history again. */
  trim() {
    if (this.loading || this.messages.size <= KEEP_MAX) return;
    for (const id of [...this.messages.keys()].sort((a, b) => a - b).slice(0, -KEEP)) this.messages.delete(id);
    this.hasMore = true;
  }

  #isSent({ user_id, client_id }) {
    if (user_id === this.me) this.unsent.delete(client_id);
  }

  // From the composer

  /** Shows a new message at once, until the server delivers it. */
  pending(clientId, content) {
    const created_at = new Date().toISOString();
    this.unsent.set(clientId, { client_id: clientId, user_id: this.me, content, created_at, state: "pending" });
  }

  /** Takes the reply to a send. If the message itself has not been delivered yet, it stays at the end of the list until then. */
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
