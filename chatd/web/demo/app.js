/**
 * The demo page: connects the state of each room (conversation.js) with the server (chatd.js) and with the parts of the page
 * (messages.js, composer.js, status.js).
 */
import { Chat, newClientId } from "./chatd.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { MessageList } from "./messages.js";
import { $, firstRoom, fromTemplate, hueOf, initialOf, me, nameOf, parameters, ROOMS, setText, USERS } from "./shared.js";
import { showBanner, showState } from "./status.js";

const PAGE = 50; // messages fetched at a time
const RETRY_PAGE = 2_000; // ms
const HIDDEN_EVERY = 500; // ms between two drawings of a hidden page

const conversations = new Map([...ROOMS.keys()].map((id) => [id, new Conversation(id, me)]));
let current = conversations.get(firstRoom);
let chat;

const list = new MessageList({ act, scrolled });
const composer = new Composer({ send, edit, latest, typing: (active) => current.room?.typing(active) });

// Drawing

let drawing = false;

/** Draws at most once a frame. A hidden page gets no animation frames, so it draws by a timer. */
function changed() {
  if (drawing) return;
  drawing = true;
  if (document.hidden) setTimeout(draw, HIDDEN_EVERY);
  else requestAnimationFrame(draw);
}

function draw() {
  drawing = false;
  if (list.atBottom) current.trim();
  if (!document.hidden) current.unread = 0;
  if (list.atBottom) current.below = 0;
  drawRooms();
  list.draw(current, chat?.state === "online");
  composer.draw(current);
  drawPeople(current.room);
  markRead();
}

/** Draws who types, and who else is online. */
function drawPeople(room) {
  const typists = [...(room?.typists.keys() ?? [])].filter((user) => user !== me).map(nameOf);
  const verb = typists.length === 1 ? "is typing…" : "are typing…";
  setText($("typing"), typists.length ? `${listOf(typists)} ${verb}` : "");
  const others = [...(room?.online ?? [])].filter((user) => user !== me).map(nameOf);
  $("people").hidden = !others.length || chat?.state !== "online";
  setText($("people"), others.length > 3 ? `${others.length} others are here` : `${listOf(others)} ${others.length === 1 ? "is" : "are"} here`);
}

const listOf = (names) => names.join(", ").replace(/, ([^,]*)$/, " and $1");

/** Marks the newest message as read, if it is visible. */
function markRead() {
  if (document.hidden || !list.atBottom || !current.loaded) return;
  const newest = current.items().findLast((item) => Number.isInteger(item.id));
  if (newest) current.room?.read(newest.id);
}

function drawRooms() {
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

// Reading

function follow(conversation) {
  const room = conversation.room = chat.join(conversation.id, { presence: true });
  const on = (type, listener) => room.addEventListener(type, ({ detail }) => (listener(detail), changed()));
  on("subscribed", ({ unread, recovered }) => {
    conversation.followed = true;
    if (conversation !== current && !recovered) conversation.unread = unread;
    if (conversation === current && !conversation.loaded) loadEarlier(conversation);
  });
  on("receipt", ({ user_id, read }) => user_id === me && read && conversation.seen(read));
  for (const type of ["typing", "presence"]) on(type, () => {});
  on("message", (message) => received(conversation, message));
  on("updated", (message) => conversation.change(message));
  on("deleted", (message) => conversation.change(message));
  on("reset", (page) => conversation.reset(page));
  on("unsubscribed", ({ code, message }) => (conversation.refusal = message || `You are not in this room (${code})`));
}

function received(conversation, message) {
  conversation.change(message, true);
  if (message.user_id === me) return;
  if (conversation !== current || document.hidden) conversation.unread += 1;
  if (conversation !== current) conversation.trim();
  if (conversation === current && !list.atBottom) conversation.below += 1;
}

async function loadEarlier(conversation = current) {
  if (!conversation.followed || conversation.loading || (conversation.loaded && !conversation.hasMore)) return;
  const age = conversation.age, before = conversation.begins();
  try {
    const page = await chat.history(conversation.id, { before, limit: PAGE });
    if (age === conversation.age) conversation.page(page);
  } catch (error) {
    // If the connection was lost, the next `subscribed` loads the page again.
    if (error.retryable && chat.state === "online") setTimeout(loadEarlier, RETRY_PAGE, conversation);
  }
  conversation.ends();
  changed();
  if (age !== conversation.age && !conversation.loaded) loadEarlier(conversation);
}

function scrolled(nearTop) {
  if (nearTop && current.loaded) loadEarlier();
  if (list.atBottom && current.below) changed();
}

function enter(conversation) {
  current.room?.typing(false);
  current = conversation;
  composer.enter(current.id);
  list.atBottom = true;
  const other = me === 2 ? 1 : 2;
  setText($("title"), `# ${ROOMS.get(current.id)}`);
  setText($("curl"), curlFor(current.id, other));
  setText($("copy"), "Copy");
  history.replaceState(null, "", linkFor(me));
  $("rooms").querySelector(`[data-room="${current.id}"]`).scrollIntoView({ block: "nearest", inline: "nearest" });
  $("other").href = linkFor(other);
  setText($("other"), `Open a window as ${nameOf(other)}`);
  if (chat?.state === "online" && !current.loaded) loadEarlier();
  changed();
}

const linkFor = (user) => `/?user=${user}&room=${current.id}`;

function curlFor(room, sender) {
  const body = JSON.stringify({ conversation_id: room, sender_id: sender, content: "Hello" });
  const headers = ["Content-Type: application/json", "Accept: application/json", "X-Internal-Token: secret"];
  const lines = [`curl -X POST ${location.origin}/api/ws/messages`, ...headers.map((header) => `-H "${header}"`), `-d '${body}'`];
  return lines.join(" \\\n  ");
}

// Writing

function send(content) {
  list.atBottom = true;
  deliver(current, newClientId(), content);
}

async function deliver(conversation, clientId, content) {
  conversation.pending(clientId, content);
  changed();
  try {
    conversation.stored(clientId, await chat.send(conversation.id, content, { client_id: clientId }));
  } catch (error) {
    conversation.failed(clientId, error.message);
  }
  changed();
}

function edit(id, content) {
  alter(id, "Saving…", chat.edit(current.id, id, content));
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

function react(id, emoji, conversation = current) {
  const given = conversation.messages.get(id)?.reactions?.[emoji]?.includes(me);
  chat.react(conversation.id, id, emoji, !given).catch((error) => {
    conversation.notes.set(id, `Not changed: ${error.message}`);
    changed();
  });
}

function latest() {
  return current.items().findLast((item) => item.user_id === me && !item.state && !item.deleted_at);
}

/** Handles the buttons of a message. */
function act(what, id, clientId) {
  if (what === "edit") composer.startEditing(current.items().find((item) => item.id === id));
  else if (what.startsWith("react:")) react(id, what.slice("react:".length));
  else if (what === "delete") alter(id, "Deleting…", chat.delete(current.id, id));
  else if (what === "retry") deliver(current, clientId, current.unsent.get(clientId).content);
  else if (what === "discard") current.unsent.delete(clientId);
  changed();
}

// Putting it together

function furnish() {
  for (const [id, name] of USERS) $("user").append(new Option(name, id, false, id === me));
  for (const [id, name] of ROOMS) {
    const li = fromTemplate("room-template");
    li.firstElementChild.dataset.room = id;
    setText(li.querySelector(".label"), name);
    li.firstElementChild.addEventListener("click", () => enter(conversations.get(id)));
    $("rooms").append(li);
  }
  setText($("my-avatar"), initialOf(me));
  $("my-avatar").style.setProperty("--hue", hueOf(me));
}

function listen() {
  $("earlier").addEventListener("click", () => loadEarlier());
  $("newer").addEventListener("click", () => (list.atBottom = true, changed()));
  $("retry").addEventListener("click", () => chat.connect());
  $("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText($("curl").textContent);
    setText($("copy"), "Copied");
  });
  $("user").addEventListener("change", () => location.assign(linkFor($("user").value)));
  document.addEventListener("visibilitychange", draw);
}

async function token() {
  const response = await fetch(`/demo/token?user=${me}`);
  if (!response.ok) throw new Error(`no token: HTTP ${response.status}`);
  return response.json();
}

async function start() {
  const first = await token();
  chat = new Chat({
    url: `ws://${location.hostname}:${first.websocket_port}/ws`,
    token: async () => (await token()).token,
    // In ms. Short, because the server is on the same machine, and a restart should be quick to watch. Tests set it lower.
    longestWait: Number(parameters.get("longest_wait")) || 3_000,
  });
  chat.addEventListener("state", ({ detail }) => (showState(detail), changed()));
  furnish();
  listen();
  enter(current);
  for (const conversation of conversations.values()) follow(conversation);
  chat.connect();
}

start().catch((error) => showBanner(`The page could not start: ${error.message}`));
