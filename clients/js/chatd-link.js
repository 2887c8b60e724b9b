/**
 * chatd-link.js: the connection of chatd.js, without rooms and without the decision when to connect. Link is one WebSocket with
 * frames and replies, Token is renewed before it expires, the Outbox has the changes that the server has not answered yet.
 */

export const SECOND = 1000; // ms, the unit of all times
const OPEN_TIMEOUT = 20 * SECOND; // to get a token, open the socket and receive the first frame
const PROBE = 5 * SECOND; // for the answer to a ping
const LATE = 1 * SECOND; // a timer that fires later than this was suspended, with the machine, the page or a debugger
const ERROR_GRACE = 250; // ms that an `error` waits for the `close` event, which has more details
const TIMER_MAX = 2 ** 31 - 1; // setTimeout fires at once for a longer time
const LONGEST_REST = 20 * SECOND;
const REFUSALS_MAX = 10; // after so many failures a request is given up, so that it does not block those after it for ever

// Close codes
export const LOST = 1006, NO_PONG = 4000;
const TOO_BIG = 1009;

export const RETRYABLE = new Set(["rate_limited", "unavailable", "internal", "disconnected"]);
const LONG_ANSWERS = new Set(["auth", "subscribe", "history"]); // over a slow link, one of these delays all other frames

export const random = (limit) => Math.random() * limit;
const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));
/** Exponential backoff with full jitter, so that the clients of a crashed server do not all reconnect at once. */
export const backoff = (tries, longest) => random(Math.min(longest, 0.5 * SECOND * 2 ** tries));

/** The server's `error`, or an error with code "disconnected" if the connection ended before the reply. */
export class ChatError extends Error {
  constructor({ code, message, field, retryable = RETRYABLE.has(code), retry_after }) {
    super(message || code);
    Object.assign(this, { name: "ChatError", code, field, retryable, retryAfter: retry_after });
  }
}

/** Returns the id of a conversation or a message as a number: pages often have it as text. Throws a TypeError if it is none. */
export function idOf(value) {
  const id = typeof value === "string" && /^\d+$/.test(value) ? Number(value) : value;
  if (!Number.isSafeInteger(id) || id < 1) throw new TypeError(`not an id: ${value}`);
  return id;
}

export const sizeOf = (text) => new TextEncoder().encode(text).length;

/** One connection, from before it is opened to its end: sends frames, matches replies, and notices a dead server. */
export class Link {
  readyAt = 0;
  limits = {}; // the server's limits, after its `hello`
  over = false;
  #socket = null;
  #replies = new Map(); // by ref: {resolve, reject, about, size, long}
  #lastRef = 0;
  #timers = new Set(); // of `after`
  #silence = OPEN_TIMEOUT;
  #patience;
  #heard = Date.now();
  #due = Infinity; // when the watchdog checks again
  #watchdog;

  /**
   * `received(frame, about)` is called for each frame; for a reply, `about` is the argument of its `request`. `ended(code,
   * reason)` is called once. `patience` multiplies the silence that the server's `hello` allows.
   */
  constructor({ received, ended, patience = 1 }) {
    Object.assign(this, { received, ended });
    this.#patience = patience;
    this.#watch();
  }

  open(url) {
    if (this.over) return;
    const socket = this.#socket = new WebSocket(url, "chatd.v1");
    socket.onmessage = ({ data }) => this.#read(JSON.parse(data));
    socket.onclose = ({ code, reason }) => this.end(code, reason);
    // In some runtimes (Node 20) no `close` follows when the socket could not be opened.
    socket.onerror = () => this.after(ERROR_GRACE, () => this.end(LOST, "the connection failed"));
  }

  /** Calls `act` after `ms`, unless the link has ended by then. */
  after(ms, act) {
    if (this.over) return;
    const timer = setTimeout(() => (this.#timers.delete(timer), act()), ms);
    this.#timers.add(timer);
  }

  post(frame) { return this.#send(JSON.stringify(frame)); }

  /** Sends a frame and resolves to the server's reply. Rejects a frame over the server's size limit without sending it. */
  request(frame, about) {
    return new Promise((resolve, reject) => {
      if (this.over) return reject(new ChatError({ code: "disconnected" }));
      const ref = ++this.#lastRef;
      const text = JSON.stringify({ ...frame, ref }), size = sizeOf(text);
      if (size > this.limits.frame) return reject(tooLarge(size, this.limits.frame));
      this.#replies.set(ref, { resolve, reject, about, size, long: LONG_ANSWERS.has(frame.event) });
      this.#send(text);
    });
  }

  /** Sends a ping. The link ends if no frame arrives within PROBE. */
  probe() {
    this.#heard = Date.now() - this.#allowed() + PROBE;
    this.post({ event: "ping" });
    this.#watch();
  }

  /** Ends the link at once, without waiting for the socket: close() on a dead socket takes minutes. */
  end(code = LOST, reason = "") {
    if (this.over) return;
    this.over = true;
    clearTimeout(this.#watchdog);
    for (const timer of this.#timers) clearTimeout(timer);
    if (this.#socket) {
      this.#socket.onmessage = this.#socket.onclose = null;
      this.#socket.onerror = () => {}; // Node reports an error for a socket that is closed before it was open
      this.#socket.close();
    }
    const replies = [...this.#replies.values()];
    // A proxy or the server refused a frame as too big, without saying which. It must be the biggest; the others are retried.
    const culprit = code === TOO_BIG ? replies.reduce((a, b) => (b.size > (a?.size ?? 0) ? b : a), null) : null;
    culprit?.reject(tooLarge(culprit.size));
    for (const { reject } of replies) reject(new ChatError({ code: "disconnected", message: reason })); // the culprit is settled already
    this.#replies.clear();
    this.#timers.clear();
    this.#socket = null;
    this.ended(code, reason);
  }

  #send(text) {
    const open = this.#socket?.readyState === WebSocket.OPEN;
    if (open) this.#socket.send(text);
    return open;
  }

  #read(frame) {
    this.#heard = Date.now();
    if (frame.event === "ping") return this.post({ event: "pong" });
    if (frame.event === "hello") this.#greeted(frame);
    const reply = this.#replies.get(frame.ref);
    this.#replies.delete(frame.ref);
    // Listeners get a frame before the code that awaits the reply, so that both see the frames in their order.
    this.received(frame, reply?.about);
    if (frame.event === "error") reply?.reject(new ChatError(frame));
    else reply?.resolve(frame);
  }

  #greeted({ ping_interval, ping_timeout, limits }) {
    this.limits = limits ?? {};
    this.#silence = (ping_interval + ping_timeout) * SECOND * this.#patience;
    this.#watch();
  }

  /**
   * Returns how long the server may be silent. A frame counts when it has arrived completely, and pings queue behind it. So
   * while a long answer may be arriving over a slow link, the allowed silence is doubled.
   */
  #allowed() {
    const expected = [...this.#replies.values()].some(({ long }) => long);
    return expected ? 2 * this.#silence : this.#silence;
  }

  /** Uses the wall clock, which also runs while a laptop sleeps, so that a dead link is found soon after waking. */
  #watch() {
    clearTimeout(this.#watchdog);
    const now = Date.now(), late = now - this.#due > LATE;
    this.#heard = Math.min(this.#heard, now); // the clock may have been set back
    const left = this.#heard + this.#allowed() - now;
    if (left > 0) {
      this.#due = now + left;
      this.#watchdog = setTimeout(() => this.#watch(), left);
    } else if (late) {
      this.#due = Infinity; // received frames may not be handled yet, and the clock may have jumped
      this.probe();
    } else {
      this.end(NO_PONG, "nothing heard from the server");
    }
  }
}

const tooLarge = (size, limit) =>
  new ChatError({ code: "too_large", message: `a frame of ${size} bytes is too big${limit ? `: at most ${limit}` : ""}` });

/** The token: requested from the application, kept, and renewed before it expires. */
export class Token {
  #ask;
  #text = null;
  #ends = Infinity; // as of Date.now()
  #refreshing = null; // {link, done}

  /** `ask` is the application's async function. */
  constructor(ask) { this.#ask = ask; }

  /** The token; null if there is none or it has expired. */
  get current() {
    if (Date.now() >= this.#ends) this.forget();
    return this.#text;
  }

  /** Requests a token from the application, if there is none. */
  async get() {
    if (this.current === null) this.#keep(await this.#bring());
  }

  forget() { this.#text = null; }

  /** The token is valid for `seconds`, as the server has reported. It is renewed before, while the link lives. */
  lasts(link, seconds) {
    if (seconds === undefined) return;
    this.#keep(this.#text, seconds);
    this.#renewIn(link, seconds);
  }

  /** Sends the server a new token. Calls that overlap share one refresh. */
  refresh(link) {
    if (this.#refreshing?.link === link) return this.#refreshing.done;
    const mine = { link, done: this.#refresh(link).finally(() => mine === this.#refreshing && (this.#refreshing = null)) };
    this.#refreshing = mine;
    return mine.done;
  }

  async #refresh(link) {
    const token = await this.#bring();
    const { expires_in } = await link.request({ event: "refresh", token });
    this.#keep(token, expires_in);
  }

  /** If a refresh fails, it is tried again in the remaining time of the old token. */
  #renewIn(link, seconds) {
    if (seconds <= 1) return; // too late: the server closes with 4001, and the next connection requests a token
    link.after(Math.min(seconds * SECOND * (0.7 + random(0.2)), TIMER_MAX), async () => {
      await this.refresh(link).catch(() => {});
      this.#renewIn(link, (this.#ends - Date.now()) / SECOND);
    });
  }

  async #bring() {
    const token = await this.#ask();
    if (typeof token !== "string" || !token) throw new TypeError("token() returned no text");
    return token;
  }

  #keep(text, seconds = Infinity) {
    this.#text = text;
    this.#ends = Date.now() + seconds * SECOND;
  }
}

/**
 * The changes that the server has not answered yet.
 *
 * It sends one request at a time. With several in flight, a request that the rate limit refuses would be overtaken by the next.
 * After a temporary failure the conversation pauses, and the others continue.
 */
export class Outbox {
  #entries = []; // oldest first
  #resting = new Set(); // conversations that pause
  #busy = false;

  /** `link()` returns the link to use, or null; `refresh(link)` sends the server a new token. */
  constructor({ link, refresh }) {
    Object.assign(this, { link, refresh });
  }

  /** Resolves when the server has stored the change; rejects when the server has finally refused it. */
  put(frame) {
    return new Promise((resolve, reject) => {
      this.#entries.push({ frame, resolve, reject, refusals: 0 });
      this.flush();
    });
  }

  async flush() {
    if (this.#busy) return;
    this.#busy = true;
    for (let entry; this.link() && (entry = this.#next()); ) await this.#deliver(entry, this.link());
    this.#busy = false;
  }

  #next() { return this.#entries.find(({ frame }) => !this.#resting.has(frame.conversation_id)); }

  async #deliver(entry, link) {
    try {
      this.#settle(entry, entry.resolve, await link.request(entry.frame));
    } catch (error) {
      if (error.code === "disconnected") return; // it is sent again on the next link
      if (error.code === "rate_limited") await sleep(this.#rest(error, 0)); // the limit applies to all conversations
      else {
        if (error.code === "token_expired") await this.refresh(link).catch(() => {});
        this.#refused(entry, error);
      }
    }
  }

  #refused(entry, error) {
    entry.refusals += 1;
    const passing = error.retryable || error.code === "token_expired";
    if (!passing || entry.refusals === REFUSALS_MAX) return this.#settle(entry, entry.reject, error);
    const { conversation_id } = entry.frame;
    this.#resting.add(conversation_id);
    setTimeout(() => (this.#resting.delete(conversation_id), this.flush()), this.#rest(error, entry.refusals));
  }

  #rest({ retryAfter }, refusals) { return retryAfter ? retryAfter * SECOND : backoff(refusals, LONGEST_REST); }

  #settle(entry, settle, result) {
    this.#entries.splice(this.#entries.indexOf(entry), 1);
    settle(result);
  }
}
