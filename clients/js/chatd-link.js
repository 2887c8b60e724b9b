/**
 * chatd-link.js: what chatd.js needs for a connection, without rooms and without a decision when to connect. Link is one
 * WebSocket with frames and replies, Token is renewed before it ends, the Outbox has what the server has not answered yet.
 */

export const SECOND = 1000; // ms, the unit of all times
const OPEN_TIMEOUT = 20 * SECOND; // to get a token, open the socket and hear the first frame
const PROBE = 5 * SECOND; // for the answer to a ping that asks whether the other side is still there
const LATE = 1 * SECOND; // a timer that fires later than this has slept: with the machine, the page or a debugger
const ERROR_GRACE = 250; // ms in which an `error` must be followed by the `close` that says more
const TIMER_MAX = 2 ** 31 - 1; // setTimeout fires at once beyond it
const LONGEST_REST = 20 * SECOND;
const REFUSALS_MAX = 10; // a request that the server keeps failing must not block those behind it for ever

// Close codes
export const LOST = 1006, NO_PONG = 4000;
const TOO_BIG = 1009;

export const RETRYABLE = new Set(["rate_limited", "unavailable", "internal", "disconnected"]);
const LONG_ANSWERS = new Set(["auth", "subscribe", "history"]); // nothing else is heard while one arrives over a slow link

export const random = (limit) => Math.random() * limit;
const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));
/** Random from nought: the clients of a server that fell over must not all come back in step. */
export const backoff = (tries, longest) => random(Math.min(longest, 0.5 * SECOND * 2 ** tries));

/** The server's `error`, or code "disconnected" when the connection ended before the reply. */
export class ChatError extends Error {
  constructor({ code, message, field, retryable = RETRYABLE.has(code), retry_after }) {
    super(message || code);
    Object.assign(this, { name: "ChatError", code, field, retryable, retryAfter: retry_after });
  }
}

/** A conversation's id or a message's, which pages often hold as text. Throws a TypeError for anything else. */
export function idOf(value) {
  const id = typeof value === "string" && /^\d+$/.test(value) ? Number(value) : value;
  if (!Number.isSafeInteger(id) || id < 1) throw new TypeError(`not an id: ${value}`);
  return id;
}

export const sizeOf = (text) => new TextEncoder().encode(text).length;

/** From the wish for a connection to its end: frames, replies, and whether the other side is alive. */
export class Link {
  readyAt = 0;
  limits = {}; // the server's, once it has said hello
  over = false;
  #socket = null;
  #replies = new Map(); // by ref: {resolve, reject, about, size, long}
  #lastRef = 0;
  #timers = new Set(); // of `after`
  #silence = OPEN_TIMEOUT;
  #patience;
  #heard = Date.now();
  #due = Infinity; // when the watchdog looks again
  #watchdog;

  /**
   * `received(frame, about)` is called for each frame, with what `request` was told that it is about; `ended(code, reason)`
   * once. `patience` multiplies the silence that the server's `hello` allows.
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

  /** Calls `act` in so many ms, unless the link has ended by then. */
  after(ms, act) {
    if (this.over) return;
    const timer = setTimeout(() => (this.#timers.delete(timer), act()), ms);
    this.#timers.add(timer);
  }

  post(frame) { return this.#send(JSON.stringify(frame)); }

  /** Posts a frame; the promise is the server's reply to it. A frame that the server does not take is never posted. */
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

  /** Asks the other side whether it is there: something must be heard soon. */
  probe() {
    this.#heard = Date.now() - this.#allowed() + PROBE;
    this.post({ event: "ping" });
    this.#watch();
  }

  /** Ends the link at once: close() on a dead socket would wait for minutes before it reported anything. */
  end(code = LOST, reason = "") {
    if (this.over) return;
    this.over = true;
    clearTimeout(this.#watchdog);
    for (const timer of this.#timers) clearTimeout(timer);
    if (this.#socket) {
      this.#socket.onmessage = this.#socket.onclose = null;
      this.#socket.onerror = () => {}; // what Node says of a socket that is closed before it was open
      this.#socket.close();
    }
    const replies = [...this.#replies.values()];
    // One frame was too big for somebody on the way. Nobody says which: the biggest. The others are innocent.
    const culprit = code === TOO_BIG ? replies.reduce((a, b) => (b.size > (a?.size ?? 0) ? b : a), null) : null;
    culprit?.reject(tooLarge(culprit.size));
    for (const { reject } of replies) reject(new ChatError({ code: "disconnected", message: reason })); // a second one is ignored
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
    // Listeners see a frame before the code that waits for the reply: in the order in which the frames came.
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
   * How long nothing may be heard. A frame is heard when all of it is there, and the server's pings wait behind it: while a
   * long answer may be on its way over a slow link, silence means less.
   */
  #allowed() {
    const expected = [...this.#replies.values()].some(({ long }) => long);
    return expected ? 2 * this.#silence : this.#silence;
  }

  /** By the wall clock, which unlike others goes on while a laptop sleeps: on waking, a dead link is found soon. */
  #watch() {
    clearTimeout(this.#watchdog);
    const now = Date.now(), late = now - this.#due > LATE;
    this.#heard = Math.min(this.#heard, now); // the clock may have been put back
    const left = this.#heard + this.#allowed() - now;
    if (left > 0) {
      this.#due = now + left;
      this.#watchdog = setTimeout(() => this.#watch(), left);
    } else if (late) {
      this.#due = Infinity; // frames may wait that nobody has read yet, and the clock may have jumped
      this.probe();
    } else {
      this.end(NO_PONG, "nothing heard from the server");
    }
  }
}

const tooLarge = (size, limit) =>
  new ChatError({ code: "too_large", message: `a frame of ${size} bytes is too big${limit ? `: at most ${limit}` : ""}` });

/** Asked of the application, kept, and renewed in time. */
export class Token {
  #ask;
  #text = null;
  #ends = Infinity; // as of Date.now()
  #refreshing = null; // {link, done}

  /** `ask` is the application's async function. */
  constructor(ask) { this.#ask = ask; }

  /** Null when there is none, or its time is over. */
  get current() {
    if (Date.now() >= this.#ends) this.forget();
    return this.#text;
  }

  /** Asks for a token where there is none. */
  async get() {
    if (this.current === null) this.#keep(await this.#bring());
  }

  forget() { this.#text = null; }

  /** The server has said how many seconds the token counts: it is renewed in time, for as long as the link lives. */
  lasts(link, seconds) {
    if (seconds === undefined) return;
    this.#keep(this.#text, seconds);
    this.#renewIn(link, seconds);
  }

  /** Gives the server a new token; all who ask while one is on its way get the same. */
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

  /** Where it fails, it is tried again in what is left of the old token's time. */
  #renewIn(link, seconds) {
    if (seconds <= 1) return; // too late: the server closes with 4001, and the next try asks for a token
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
 * One request at a time: were several on the way, one refused by the rate limit would be overtaken by the next. A conversation
 * whose request fails for the moment rests, and the others go on.
 */
export class Outbox {
  #entries = []; // oldest first
  #resting = new Set(); // conversations
  #busy = false;

  /** `link()` is the one to use, or null; `refresh(link)` brings the server a new token. */
  constructor({ link, refresh }) {
    Object.assign(this, { link, refresh });
  }

  /** The promise is settled when the server has stored the change, or refused it for good. */
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
      if (error.code === "disconnected") return; // it is repeated on the next link
      if (error.code === "rate_limited") await sleep(this.#rest(error, 0)); // which counts for all conversations
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
