/** The list of messages: draws a conversation, and keeps the reader's scroll position. */
import { $, fromTemplate, hueOf, initialOf, me, nameOf, setText } from "./shared.js";

const GROUP_GAP = 5 * 60_000; // ms after which the same sender gets a new heading
const NEAR = 80; // px from an edge that count as at the edge

const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
const calendar = new Intl.DateTimeFormat(undefined, { weekday: "long", day: "numeric", month: "long" });

export class MessageList {
  atBottom = true;
  #list = $("messages");
  #scroller = $("scroller");

  /** `act(what, id, clientId)` is called for the buttons of a message, `scrolled(nearTop)` after the reader scrolled. */
  constructor({ act, scrolled }) {
    this.act = act;
    this.scrolled = scrolled;
    this.#list.addEventListener("click", (event) => this.#click(event));
    this.#scroller.addEventListener("scroll", () => this.#scroll());
    // The banner, a phone's keyboard and a growing composer reduce the height of the list.
    new ResizeObserver(() => this.atBottom && this.#toEnd()).observe(this.#scroller);
  }

  draw(conversation, online) {
    const items = conversation.items();
    this.#keepingPlace(() => {
      this.#place(this.#rows(conversation, items, online));
      $("empty").hidden = items.length > 0 || !conversation.loaded;
      $("earlier").hidden = !conversation.hasMore || !items.length;
    });
    $("newer").hidden = this.atBottom || !conversation.below;
    setText($("newer"), conversation.below === 1 ? "1 new message ↓" : `${conversation.below} new messages ↓`);
  }

  // Scrolling

  #toEnd() {
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
  }

  #scroll() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
    this.atBottom = scrollHeight - scrollTop - clientHeight < NEAR;
    this.scrolled(scrollTop < NEAR);
  }

  /** Draws, and keeps the scroll position: at the end if the reader is there, else at the topmost visible message. */
  #keepingPlace(draw) {
    const inView = (li) => li.offsetTop + li.offsetHeight > this.#scroller.scrollTop;
    const anchor = this.atBottom ? null : [...this.#list.querySelectorAll(".message")].find(inView);
    const before = anchor?.offsetTop;
    draw();
    if (this.atBottom) this.#toEnd();
    else if (anchor?.isConnected) this.#scroller.scrollTop += anchor.offsetTop - before;
  }

  // Drawing

  /** Returns the elements in order. Existing elements are reused: they may be selected, focused or hovered over. */
  #rows(conversation, items, online) {
    const held = new Map([...this.#list.children].map((li) => [li.dataset.key, li]));
    const take = (key, make) => {
      const li = held.get(key) ?? make();
      li.dataset.key = key;
      return li;
    };
    return items.flatMap((item, index) => {
      const [previous, next] = [items[index - 1], items[index + 1]];
      const li = take(`${conversation.id}/${keyOf(item)}`, () => fromTemplate("message-template"));
      const look = { first: !together(previous, item), last: !together(item, next) };
      drawMessage(li, item, { ...look, note: noteOf(conversation, item, !next, online) });
      if (previous && dayOf(previous) === dayOf(item)) return [li];
      const day = take(`${conversation.id}/${dayOf(item)}`, () => document.createElement("li"));
      drawDay(day, dayOf(item));
      return [day, li];
    });
  }

  /** Elements that stay are not moved: a screen reader would read them out again. */
  #place(rows) {
    const kept = new Set(rows);
    for (const li of [...this.#list.children]) if (!kept.has(li)) li.remove();
    rows.forEach((li, index) => {
      if (this.#list.children[index] !== li) this.#list.insertBefore(li, this.#list.children[index]);
    });
  }

  // Its buttons

  #click({ target }) {
    const button = target.closest("[data-do]");
    if (!button || (button.dataset.do === "delete" && !isSure(button))) return;
    const { id, clientId } = button.closest(".message").dataset;
    this.act(button.dataset.do, Number(id), clientId);
  }
}

/** Whether to delete: the first click asks for confirmation, the second confirms. */
function isSure(button) {
  if (button.classList.contains("sure")) return true;
  const icon = button.firstElementChild;
  button.classList.add("sure");
  button.replaceChildren("Delete?");
  button.addEventListener("blur", () => {
    button.classList.remove("sure");
    button.replaceChildren(icon);
  }, { once: true });
  button.focus(); // Safari does not focus a clicked button, and without focus there is no blur event
  return false;
}

const dayOf = (item) => new Date(item.created_at).toDateString();

/** With the client_id as its key, a message keeps its element from pending to stored. */
const keyOf = (item) => (item.client_id ? `${item.user_id}/${item.client_id}` : item.id);

function together(a, b) {
  if (!a || !b || a.user_id !== b.user_id || dayOf(a) !== dayOf(b)) return false;
  return new Date(b.created_at) - new Date(a.created_at) < GROUP_GAP;
}

function drawDay(li, day) {
  const today = new Date(), yesterday = new Date();
  yesterday.setDate(today.getDate() - 1);
  const named = { [yesterday.toDateString()]: "Yesterday", [today.toDateString()]: "Today" };
  li.className = "day";
  setText(li, named[day] ?? calendar.format(new Date(day)));
}

function drawMessage(li, item, { first, last, note }) {
  const look = [first, last, note].join();
  if (li.item === item && li.look === look) return; // each change of a message makes a new object
  Object.assign(li, { item, look });
  const mine = item.user_id === me, deleted = Boolean(item.deleted_at), state = item.state ?? "sent";
  for (const [name, on] of Object.entries({ mine, first, last, deleted })) li.classList.toggle(name, on);
  Object.assign(li.dataset, { state, id: item.id ?? "", clientId: item.client_id ?? "", user: item.user_id });
  li.style.setProperty("--hue", hueOf(item.user_id));
  const part = (selector) => li.querySelector(selector);
  const at = new Date(item.created_at);
  setText(part(".avatar"), initialOf(item.user_id));
  setText(part(".name"), mine ? "You" : nameOf(item.user_id));
  setText(part("time"), clock.format(at));
  part("time").dateTime = item.created_at;
  part(".bubble").title = at.toLocaleString();
  setText(part(".text"), deleted ? "Message deleted" : String(item.content ?? ""));
  part(".edited").hidden = deleted || !item.edited_at;
  part(".tools").hidden = deleted || state !== "sent" || !Number.isInteger(item.id);
  for (const name of ["edit", "delete"]) part(`[data-do=${name}]`).hidden = !mine;
  drawReactions(part(".reactions"), item);
  for (const name of ["retry", "discard"]) part(`[data-do=${name}]`).hidden = state !== "failed";
  setText(part(".note-text"), note);
}

/** Returns the note under a message: an error, or for the user's newest message its delivery state. */
function noteOf(conversation, item, newest, online) {
  if (item.state === "failed") return `Not sent: ${item.error}`;
  if (item.deleted_at) return "";
  if (conversation.notes.has(item.id)) return conversation.notes.get(item.id);
  if (item.user_id !== me || !newest) return "";
  if (item.state === "pending") return online ? "Sending…" : "Waiting for the connection";
  return receiptOf(conversation.room, item.id);
}

/** Returns which of the other users have read or received a message. */
function receiptOf(room, id) {
  const others = [...(room?.receipts ?? [])].filter(([user]) => user !== me);
  const readers = others.filter(([, { read }]) => read >= id).map(([user]) => nameOf(user));
  if (readers.length > 3) return `Read by ${readers.length}`;
  if (readers.length) return `Read by ${readers.join(", ")}`;
  return others.some(([, { delivered }]) => delivered >= id) ? "Delivered" : "Sent";
}

/** Draws the reactions to a message. A click on one adds the same reaction, or removes the user's own. */
function drawReactions(box, item) {
  const given = Object.entries(item.reactions ?? {});
  box.hidden = !given.length;
  box.replaceChildren(...given.map(([emoji, users]) => {
    const button = fromTemplate("reaction-template");
    const count = item.reaction_counts?.[emoji] ?? users.length;
    button.dataset.do = `react:${emoji}`;
    button.ariaPressed = String(users.includes(me));
    button.title = users.map(nameOf).join(", ");
    button.ariaLabel = `${emoji}, ${count}: ${button.title}`;
    setText(button, count > 1 ? `${emoji} ${count}` : emoji);
    return button;
  }));
}
