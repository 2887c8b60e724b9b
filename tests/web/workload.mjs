/**
 * People who talk in one room with chatd.js, over a network that breaks, and what became of it. Runs in Node and in a page.
 *
 * Everybody sends and listens. Each keeps messages as an application must: by id, replaced at a `reset`, with pages of
 * history for what a reset left out.
 */

const WAITING = 10; // messages of one sender that are unanswered
const PATIENCE = 60_000; // ms for all to have everything, once nothing is sent any more

const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));

class Person {
  held = new Map(); // by id
  stored = new Map(); // content → id, of what the server has confirmed
  doubled = 0;
  reordered = 0;
  resets = 0;
  rejected = [];
  ends = {}; // close code → how often
  #gap = false; // history has more than what is held
  #seen = new Set(); // seqs
  #newest = 0; // seq

  constructor(Chat, { url, room, longestWait }, { user, token }) {
    this.user = user;
    this.chat = new Chat({ url, longestWait, token: async () => token });
    this.chat.addEventListener("state", ({ detail: { code } }) => code && (this.ends[code] = (this.ends[code] ?? 0) + 1));
    this.room = this.chat.join(room, { after: 0 });
    this.room.addEventListener("message", ({ detail }) => this.#message(detail));
    this.room.addEventListener("reset", ({ detail }) => this.#reset(detail));
    this.chat.connect();
  }

  #message(message) {
    this.doubled += this.#seen.has(message.seq);
    this.reordered += message.seq <= this.#newest;
    this.#seen.add(message.seq);
    this.#newest = message.seq;
    this.held.set(message.id, message);
  }

  #reset({ messages, has_more }) {
    this.resets += 1;
    this.held = new Map(messages.map((message) => [message.id, message]));
    this.#gap = has_more;
    this.#newest = this.room.cursor;
  }

  async talk(count) {
    const waiting = new Set();
    for (let number = 0; number < count; number++) {
      const content = `${this.user}/${number}`;
      const sent = this.chat.send(this.room.id, content).then(
        ({ id }) => this.stored.set(content, id),
        (error) => this.rejected.push(`${content}: ${error.code}`),
      );
      waiting.add(sent);
      sent.finally(() => waiting.delete(sent));
      if (waiting.size >= WAITING) await Promise.race(waiting);
    }
    await Promise.all(waiting);
  }

  /** Until all changes up to this seq and all messages are here, or patience is at its end. */
  async catchUp(head) {
    for (const end = Date.now() + PATIENCE; Date.now() < end; await sleep(50)) {
      if (this.room.cursor < head) continue;
      if (!this.#gap) return;
      const { resets } = this;
      const page = await this.chat.history(this.room.id, { before: Math.min(...this.held.keys()), limit: 100 }).catch(() => null);
      if (!page || resets !== this.resets) continue;
      for (const message of page.messages) this.held.set(message.id, message);
      this.#gap = page.has_more;
    }
  }

  /** Held against what all have sent: content → id. */
  verdict(sent) {
    const ids = new Set([...this.held.values()].map(({ content }) => content));
    const inOrder = [...this.held.values()].sort((a, b) => a.id - b.id);
    const next = {};
    let misplaced = 0;
    for (const { content } of inOrder) {
      const [user, number] = content.split("/").map(Number);
      misplaced += number !== (next[user] ?? 0);
      next[user] = number + 1;
    }
    return {
      user: this.user, lost: [...sent.keys()].filter((content) => !ids.has(content)).length,
      doubled: this.doubled + this.held.size - ids.size, reordered: this.reordered + misplaced,
      strange: inOrder.filter(({ id, content }) => sent.get(content) !== id).length,
      resets: this.resets, rejected: this.rejected, ends: this.ends, state: this.chat.state,
    };
  }
}

/** `options`: {url, room, longestWait, each, people: [{user, token}]}; returns a verdict on each person. */
export async function workload(Chat, options) {
  const people = options.people.map((one) => new Person(Chat, options, one));
  await Promise.all(people.map((person) => person.talk(options.each)));
  const sent = new Map(people.flatMap(({ stored }) => [...stored]));
  await Promise.all(people.map((person) => person.catchUp(sent.size)));
  const verdicts = people.map((person) => person.verdict(sent));
  for (const { chat } of people) chat.close();
  return verdicts;
}
