/** chatd-link.js: one WebSocket of chatd.js. It knows frames and replies, but neither rooms nor when to connect. */

export const SECOND = 1000; // ms, the unit of all times
const OPEN_TIMEOUT = 20 * SECOND; // to get a token, open the socket and hear the first frame

// Close codes
export const LOST = 1006;
const TOO_BIG = 1009, NO_PONG = 4000;

export const RETRYABLE = new Set(["rate_limited", "unavailable", "internal", "disconnected"]);

/** The server's `error`, or code "disconnected" when the connection ended before the reply. */
export class ChatError extends Error {
  constructor({ code, message, field, retryable = RETRYABLE.has(code), retry_after }) {
    super(message || code);
    Object.assign(this, { name: "ChatError", code, field, retryable, retryAfter: retry_after });
  }
}

/** From the wish for a connection to its end: frames, replies, and whether the other side is alive. */
export class Link {
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
    const open = this.#socket?.readyState === WebSocket.OPEN;
    if (open) this.#socket.send(JSON.stringify(frame));
    return open;
  }

  /** Posts a frame; the promise is the server's reply to it. */
  request(frame) {
    return new Promise((resolve, reject) => {
      if (this.#ended) return reject(new ChatError({ code: "disconnected" }));
      const ref = ++this.#lastRef;
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
