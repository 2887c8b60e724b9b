/**
 * The demo page. Conversation holds what is known of one room, render() makes the page agree with it, and what comes last
 * connects both to chatd.js. Text that people wrote enters the page as textContent alone.
 */
import { Chat, newClientId } from "/chatd.js";

const USERS = new Map([[1, "Ada"], [2, "Grace"], [3, "Alan"], [4, "Margaret"]]);
const ROOMS = new Map([[1, "general"], [2, "engineering"], [3, "coffee"]]);
const PAGE = 50; // messages fetched at a time
const KEEP = 300, KEEP_MAX = 600; // messages of a room held in memory while the reader is at the end
const RETRY_PAGE = 2_000; // ms
const READ_EVERY = 500; // ms between two reports of what was read
const HIDDEN_EVERY = 500; // ms between two drawings of a page that nobody sees
const GROUP_GAP = 5 * 60_000; // ms after which the same sender gets a new heading
const TYPING_EVERY = 3_000; // ms between two "I am typing"
const NEAR = 80; // px from an edge that count as being there
const BACK_SHOWN = 3_000; // ms that "Connected again" stays

const $ = (id) => document.getElementById(id);
const nameOf = (user) => USERS.get(user) ?? (user ? `User ${user}` : "Somebody");
const initialOf = (user) => nameOf(user).replace("User ", "").match(/^\d{1,3}|^./u)[0];
const hueOf = (user) => Math.round((user * 137.5 + 95) % 360); // the golden angle keeps neighbours apart
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
const fromTemplate = (id) => $(id).content.firstElementChild.cloneNode(true);
const calendar = new Intl.DateTimeFormat(undefined, { weekday: "long", day: "numeric", month: "long" });

function idFrom(parameters, name, names, title) {
  const id = Number(parameters.get(name));
  if (!Number.isSafeInteger(id) || id < 1) return 1;
  if (!names.has(id)) names.set(id, `${title} ${id}`);
  return id;
}

// What is known of a room

class Conversation {
  messages = new Map(); // by id
  ahead = new Map(); // changes of messages that are not loaded yet; they are newer than the page that will bring those
  unsent = new Map(); // by client_id
  notes = new Map(); // by id: an edit that is under way or was refused
  receipts = new Map(); // user id → id of the last message read
  typing = new Map(); // user id → timer
  loaded = false;
  loading = false;
  hasMore = false;
  age = 0; // counts resets: a page asked for before one does not fit what came after it
  unread = 0;
  below = 0; // arrived while the reader was further up
  readSent = 0;
  refusal = null;

  constructor(id) {
    this.id = id;
  }

  /** Of the stored ones; undefined when there are none. */
  get oldest() {
    const ids = [...this.messages.keys()].filter(Number.isInteger);
    return ids.length ? Math.min(...ids) : undefined;
  }

  get newest() {
    return Math.floor(Math.max(0, ...this.messages.keys()));
  }

  /** What came as a change is newer than what a page says of the same message. */
  change(message, created = false) {
    // A foreign message (published by a backend over Redis) may lack anything; without an id it belongs after the newest.
    const id = message.id ?? Math.max(0, ...this.messages.keys()) + 0.001;
    const fits = this.messages.has(id) || (created && !(id < this.oldest));
    (fits ? this.messages : this.ahead).set(id, { user_id: 0, created_at: new Date().toISOString(), ...message, id });
    if (message.user_id === me) this.unsent.delete(message.client_id);
  }

  page({ messages, has_more }) {
    for (const message of messages) {
      if (!this.messages.has(message.id)) this.messages.set(message.id, this.ahead.get(message.id) ?? message);
      this.ahead.delete(message.id);
      if (message.user_id === me) this.unsent.delete(message.client_id);
    }
    this.hasMore = has_more;
    this.loaded = true;
  }

  reset({ messages, has_more }) {
    this.age += 1;
    this.messages.clear();
    this.ahead.clear();
    this.page({ messages, has_more });
    this.loaded = messages.length > 0 || !has_more;
  }

  /** Forgets the oldest when there are many: history has them. */
  trim() {
    if (this.messages.size <= KEEP_MAX) return;
    for (const id of [...this.messages.keys()].sort((a, b) => a - b).slice(0, -KEEP)) this.messages.delete(id);
    this.hasMore = true;
  }

  /** In the order of the page: by id, what is unsent last. */
  items() {
    return [...[...this.messages.values()].sort((a, b) => a.id - b.id), ...this.unsent.values()];
  }
}

const parameters = new URLSearchParams(location.search);
const me = idFrom(parameters, "user", USERS, "User");
const firstRoom = idFrom(parameters, "room", ROOMS, "room");
const conversations = new Map([...ROOMS.keys()].map((id) => [id, new Conversation(id)]));
let current = conversations.get(firstRoom);
let editing = null; // the message in the composer
let atBottom = true;
let chat;

// Drawing

let drawing = false;

/** However much happens, it is drawn once a frame, or now and then while nobody looks: a hidden page gets no frames. */
function changed() {
  if (drawing) return;
  drawing = true;
  if (document.hidden) setTimeout(render, HIDDEN_EVERY);
  else requestAnimationFrame(render);
}

function render() {
  drawing = false;
  if (atBottom) current.trim();
  markRead();
  renderRooms();
  const items = current.items();
  keepingPlace(() => {
    renderMessages(items);
    $("empty").hidden = items.length > 0 || !current.loaded;
    $("earlier").hidden = !current.hasMore || !items.length;
  });
  $("newer").hidden = atBottom || !current.below;
  setText($("newer"), current.below === 1 ? "1 new message ↓" : `${current.below} new messages ↓`);
  const typing = [...current.typing.keys()].map(nameOf);
  setText($("typing"), typing.length ? `${typing.join(", ")} ${typing.length > 1 ? "are" : "is"} typing…` : "");
  $("editing").hidden = !editing;
  $("content").disabled = Boolean(current.refusal);
  $("content").placeholder = current.refusal ?? `Message #${ROOMS.get(current.id)}`;
  $("composer").querySelector(".send").disabled = !$("content").value.trim();
}

function renderRooms() {
  let unread = 0;
  for (const button of $("rooms").querySelectorAll("button")) {
    const conversation = conversations.get(Number(button.dataset.room));
    const count = button.querySelector(".count");
    button.ariaCurrent = conversation === current ? "true" : null;
    button.classList.toggle("unread", conversation.unread > 0);
    count.hidden = !conversation.unread;
    setText(count, conversation.unread > 99 ? "99+" : String(conversation.unread));
    unread += conversation.unread;
  }
  document.title = `${unread ? `(${unread}) ` : ""}#${ROOMS.get(current.id)} · chatd`;
}

/** Draws while what the reader looks at stays where it is: the end when there, else the topmost message in view. */
function keepingPlace(draw) {
  const scroller = $("scroller");
  const inView = (li) => li.offsetTop + li.offsetHeight > scroller.scrollTop;
  const anchor = atBottom ? null : [...$("messages").querySelectorAll(".message")].find(inView);
  const before = anchor?.offsetTop;
  draw();
  if (atBottom) scroller.scrollTop = scroller.scrollHeight;
  else if (anchor?.isConnected) scroller.scrollTop += anchor.offsetTop - before;
}

function renderMessages(items) {
  const list = $("messages");
  const held = new Map([...list.children].map((li) => [li.dataset.key, li]));
  const wanted = [];
  items.forEach((item, index) => {
    const [previous, next] = [items[index - 1], items[index + 1]];
    if (!previous || dayOf(previous) !== dayOf(item)) wanted.push(dayLine(held, dayOf(item)));
    const li = held.get(keyOf(item)) ?? fromTemplate("message-template");
    li.dataset.key = keyOf(item);
    drawMessage(li, item, !together(previous, item), !together(item, next), !next);
    wanted.push(li);
  });
  // Elements that stay are not moved: a screen reader would read them out again.
  const kept = new Set(wanted);
  for (const li of held.values()) if (!kept.has(li)) li.remove();
  wanted.forEach((li, index) => {
    if (list.children[index] !== li) list.insertBefore(li, list.children[index]);
  });
}

const dayOf = (item) => new Date(item.created_at).toDateString();
// With client_id in the key a message keeps its element from the moment it was typed.
const keyOf = (item) => `${current.id}/${item.client_id ? `${item.user_id}/${item.client_id}` : item.id}`;

function together(a, b) {
  if (!a || !b || a.user_id !== b.user_id || dayOf(a) !== dayOf(b)) return false;
  return new Date(b.created_at) - new Date(a.created_at) < GROUP_GAP;
}

function dayLine(held, day) {
  const key = `${current.id}/${day}`;
  const li = held.get(key) ?? document.createElement("li");
  const today = new Date(), yesterday = new Date();
  yesterday.setDate(today.getDate() - 1);
  const named = { [yesterday.toDateString()]: "Yesterday", [today.toDateString()]: "Today" };
  li.className = "day";
  li.dataset.key = key;
  setText(li, named[day] ?? calendar.format(new Date(day)));
  return li;
}

function drawMessage(li, item, first, last, newest) {
  const mine = item.user_id === me;
  const state = item.state ?? "sent";
  const gone = Boolean(item.deleted_at);
  const part = (selector) => li.querySelector(selector);
  const note = noteOf(item, mine, newest);
  const look = [first, last, note].join();
  if (li.item === item && li.look === look) return; // each change of a message makes a new object
  Object.assign(li, { item, look });
  for (const [name, on] of Object.entries({ mine, first, last, deleted: gone })) li.classList.toggle(name, on);
  Object.assign(li.dataset, { state, id: item.id ?? "", clientId: item.client_id ?? "", user: item.user_id });
  li.style.setProperty("--hue", hueOf(item.user_id));
  setText(part(".avatar"), initialOf(item.user_id));
  setText(part(".name"), mine ? "You" : nameOf(item.user_id));
  setText(part("time"), clock.format(new Date(item.created_at)));
  part("time").dateTime = item.created_at;
  part(".bubble").title = new Date(item.created_at).toLocaleString();
  setText(part(".text"), gone ? "Message deleted" : String(item.content ?? ""));
  part(".edited").hidden = gone || !item.edited_at;
  part(".tools").hidden = !mine || gone || state !== "sent";
  for (const name of ["retry", "discard"]) part(`[data-do=${name}]`).hidden = state !== "failed";
  const reactions = Object.entries(gone ? {} : item.reactions ?? {});
  setText(part(".reactions"), reactions.map(([emoji, users]) => `${emoji} ${users.length}`).join("  "));
  setText(part(".note-text"), note);
}

function noteOf(item, mine, newest) {
  if (item.state === "failed") return `Not sent: ${item.error}`;
  if (item.deleted_at) return "";
  if (current.notes.has(item.id)) return current.notes.get(item.id);
  if (!mine || !newest) return "";
  if (item.state === "pending") return chat.state === "online" ? "Sending…" : "Waiting for the connection";
  const seen = [...current.receipts].filter(([user, read]) => user !== me && read >= item.id).map(([user]) => nameOf(user));
  return seen.length ? `Seen by ${seen.join(", ")}` : "Sent";
}

/** Setting the same text again would be read out again, and drop the reader's selection. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// The connection's state

const STATUS = { connecting: "Connecting…", online: "Online", offline: "Offline", stopped: "Disconnected" };
let wasLost = false;
let ticking;

function showState({ state, retryAt, code, reason }) {
  clearInterval(ticking);
  $("status").dataset.state = $("banner").dataset.state = state;
  setText($("status"), STATUS[state]);
  setText($("countdown"), state === "connecting" ? "Connecting…" : "");
  if (state === "offline") {
    showBanner("Connection lost.", "Try now");
    countDown(retryAt);
    ticking = setInterval(countDown, 250, retryAt);
  } else if (state === "stopped") {
    showBanner(`The server ended the connection: ${reason || "no reason given"} (${code}).`, "Try again");
  } else if (state === "online" && wasLost) {
    showBanner("Connected again.");
    ticking = setTimeout(() => ($("banner").hidden = true), BACK_SHOWN);
  }
  wasLost = state !== "online" && (wasLost || state !== "connecting");
  changed();
}

function countDown(retryAt) {
  $("countdown").textContent = `Reconnecting in ${Math.max(1, Math.ceil((retryAt - Date.now()) / 1000))} s…`;
}

function showBanner(text, action) {
  $("banner").hidden = false;
  $("retry").hidden = !action;
  if (action) setText($("retry"), action);
  setText($("banner-text"), text);
}

// Reading

async function loadEarlier(conversation = current) {
  if (conversation.loading || (conversation.loaded && !conversation.hasMore)) return;
  conversation.loading = true;
  const age = conversation.age;
  try {
    const page = await chat.history(conversation.id, { before: conversation.oldest, limit: PAGE });
    if (age === conversation.age) conversation.page(page);
  } catch (error) {
    // When the connection was lost, the next `subscribed` asks again.
    if (error.retryable && chat.state === "online") setTimeout(loadEarlier, RETRY_PAGE, conversation);
  }
  conversation.loading = false;
  changed();
  if (age !== conversation.age && !conversation.loaded) loadEarlier(conversation);
}

let reading = null; // one report for what came in quick succession

function markRead() {
  if (!atBottom || document.visibilityState !== "visible") return;
  current.below = 0;
  current.unread = 0;
  if (current.newest > current.readSent) reading ??= setTimeout(reportRead, READ_EVERY, current);
}

function reportRead(conversation) {
  reading = null;
  if (chat.state !== "online") return; // `subscribed` will tell from where to go on
  conversation.readSent = conversation.newest;
  chat.read(conversation.id, conversation.newest);
  changed();
}

function received(conversation, message) {
  conversation.change(message, true);
  stopTyping(conversation, message.user_id);
  if (message.user_id !== me) {
    conversation.unread += 1;
    if (conversation === current && !atBottom) conversation.below += 1;
  }
  changed();
}

function showTyping(conversation, { user_id, active, expires_in }) {
  stopTyping(conversation, user_id);
  if (active && user_id !== me) {
    conversation.typing.set(user_id, setTimeout(() => stopTyping(conversation, user_id), expires_in * 1000));
  }
  changed();
}

function stopTyping(conversation, user) {
  clearTimeout(conversation.typing.get(user));
  if (conversation.typing.delete(user)) changed();
}

function subscribed(conversation, answer) {
  conversation.unread = answer.unread;
  for (const { user_id, read } of answer.receipts) conversation.receipts.set(user_id, read ?? 0);
  conversation.readSent = conversation.receipts.get(me) ?? 0;
  if (conversation === current && !conversation.loaded) loadEarlier(conversation);
  changed();
}

function follow(conversation) {
  const on = (type, listener) => room.addEventListener(type, ({ detail }) => (listener(detail), changed()));
  const room = chat.join(conversation.id);
  on("subscribed", (answer) => subscribed(conversation, answer));
  on("message", (message) => received(conversation, message));
  on("updated", (message) => conversation.change(message));
  on("deleted", (message) => conversation.change(message));
  on("reset", (page) => conversation.reset(page));
  on("receipt", ({ user_id, read }) => read && conversation.receipts.set(user_id, read));
  on("typing", (frame) => showTyping(conversation, frame));
  on("unsubscribed", ({ code, message }) => (conversation.refusal = message || `You are not in this room (${code})`));
}

function enter(conversation) {
  leaveEditing();
  current = conversation;
  atBottom = true;
  $("title").textContent = `# ${ROOMS.get(current.id)}`;
  $("curl").textContent = curlFor(current.id);
  history.replaceState(null, "", linkFor(me));
  $("rooms").querySelector(`[data-room="${current.id}"]`).scrollIntoView({ block: "nearest", inline: "nearest" });
  $("other").href = linkFor(me === 2 ? 1 : 2);
  $("other").textContent = `Open a window as ${nameOf(me === 2 ? 1 : 2)}`;
  if (chat?.state === "online" && !current.loaded) loadEarlier();
  changed();
}

const linkFor = (user) => `/?user=${user}&room=${current.id}`;

function curlFor(room) {
  const body = JSON.stringify({ conversation_id: room, sender_id: me === 1 ? 2 : 1, content: "Hello" });
  return `curl -X POST ${location.origin}/api/ws/messages -H "Content-Type: application/json" -H "Accept: application/json" `
    + `-H "X-Internal-Token: secret" -d '${body}'`;
}

// Writing

function submit() {
  const content = $("content").value.trim();
  if (!content || current.refusal) return;
  if (editing) {
    const { id } = editing;
    leaveEditing();
    return alter(id, "Saving…", chat.edit(current.id, id, content));
  }
  $("content").value = "";
  typingSent = 0;
  atBottom = true;
  dispatch(current, { client_id: newClientId(), user_id: me, content, created_at: new Date().toISOString() });
  fitComposer();
}

async function dispatch(conversation, draft) {
  conversation.unsent.set(draft.client_id, { ...draft, state: "pending" });
  changed();
  try {
    const { id, created_at } = await chat.send(conversation.id, draft.content, { client_id: draft.client_id });
    conversation.unsent.delete(draft.client_id);
    // Usually the message itself came first; a page that is not loaded will bring one that is too old to fit.
    if (!conversation.messages.has(id) && !conversation.ahead.has(id)) conversation.change({ ...draft, id, created_at }, true);
  } catch (error) {
    conversation.unsent.set(draft.client_id, { ...draft, state: "failed", error: error.message });
  }
  changed();
}

async function alter(id, note, promise, conversation = current) {
  conversation.notes.set(id, note);
  changed();
  try {
    await promise;
    conversation.notes.delete(id);
  } catch (error) {
    conversation.notes.set(id, `Not changed: ${error.message}`);
  }
  changed();
}

function startEditing(message) {
  editing = message;
  $("content").value = message.content;
  $("content").focus();
  fitComposer();
}

function leaveEditing() {
  if (editing) $("content").value = "";
  editing = null;
  fitComposer();
}

/** The first click asks, the second deletes. */
function askAndDelete(button, message) {
  if (button.classList.contains("sure")) return alter(message.id, "Deleting…", chat.delete(current.id, message.id));
  const icon = button.firstElementChild;
  button.classList.add("sure");
  button.replaceChildren("Delete?");
  button.addEventListener("blur", () => {
    button.classList.remove("sure");
    button.replaceChildren(icon);
  }, { once: true });
  button.focus(); // Safari does not by itself, and without focus there is no blur
}

function onTool({ target }) {
  const button = target.closest("[data-do]");
  if (!button) return;
  const { id, clientId } = button.closest(".message").dataset;
  const message = current.messages.get(Number(id));
  const { state, error, ...draft } = current.unsent.get(clientId) ?? {};
  if (button.dataset.do === "edit") startEditing(message);
  else if (button.dataset.do === "delete") askAndDelete(button, message);
  else if (button.dataset.do === "retry") dispatch(current, draft);
  else if (button.dataset.do === "discard") current.unsent.delete(clientId);
  changed();
}

function onKey(event) {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    submit();
  } else if (event.key === "Escape") {
    leaveEditing();
  } else if (event.key === "ArrowUp" && !$("content").value) {
    const last = current.items().findLast((item) => item.user_id === me && !item.state && !item.deleted_at);
    if (last) event.preventDefault(), startEditing(last);
  }
}

let typingSent = 0;

function onInput() {
  fitComposer();
  if (editing || Date.now() - typingSent < TYPING_EVERY) return;
  typingSent = Date.now();
  chat.typing(current.id);
}

function fitComposer() {
  const box = $("content");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`; // 2: its borders
  changed();
}

// Putting it together

async function token() {
  const response = await fetch(`/demo/token?user=${me}`);
  if (!response.ok) throw new Error(`no token: HTTP ${response.status}`);
  return response.json();
}

function furnish() {
  for (const [id, name] of USERS) $("user").append(new Option(name, id, false, id === me));
  for (const [id, name] of ROOMS) {
    const li = fromTemplate("room-template");
    li.firstElementChild.dataset.room = id;
    li.querySelector(".label").textContent = name;
    li.firstElementChild.addEventListener("click", () => enter(conversations.get(id)));
    $("rooms").append(li);
  }
  $("my-avatar").textContent = initialOf(me);
  $("my-avatar").style.setProperty("--hue", hueOf(me));
}

function listen() {
  const scroller = $("scroller");
  scroller.addEventListener("scroll", () => {
    atBottom = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
    if (scroller.scrollTop < NEAR && current.loaded) loadEarlier();
    if (atBottom && current.below) changed();
  });
  // The banner, the keyboard of a phone and a growing composer take height from the list.
  new ResizeObserver(() => atBottom && (scroller.scrollTop = scroller.scrollHeight)).observe(scroller);
  $("earlier").addEventListener("click", () => loadEarlier());
  $("newer").addEventListener("click", () => (atBottom = true, changed()));
  $("messages").addEventListener("click", onTool);
  $("composer").addEventListener("submit", (event) => (event.preventDefault(), submit(), $("content").focus()));
  $("content").addEventListener("keydown", onKey);
  $("content").addEventListener("input", onInput);
  $("cancel").addEventListener("click", leaveEditing);
  $("retry").addEventListener("click", () => chat.connect());
  $("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText($("curl").textContent);
    $("copy").textContent = "Copied";
  });
  $("user").addEventListener("change", () => location.assign(linkFor($("user").value)));
  document.addEventListener("visibilitychange", render);
  addEventListener("online", () => chat.connect());
}

async function start() {
  const first = await token();
  chat = new Chat({
    url: `ws://${location.hostname}:${first.websocket_port}/ws`,
    token: async () => (await token()).token,
  });
  furnish();
  listen();
  chat.addEventListener("state", ({ detail }) => showState(detail));
  enter(current);
  for (const conversation of conversations.values()) follow(conversation);
  chat.connect();
}

start().catch((error) => showBanner(`The page could not start: ${error.message}`));
