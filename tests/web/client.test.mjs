/** What chatd.js does, told by a scripted server. Run by tests/test_javascript.py, or: node --expose-gc --test tests/web/ */
import assert from "node:assert/strict";
import { afterEach, beforeEach, describe, test } from "node:test";
import { answer, begin, change, end, jump, pass, settle, sockets } from "./scripted.mjs";

const { Chat } = await import(process.env.CHATD_JS ?? "../../clients/js/chatd.js");

beforeEach(begin);
afterEach(end);

function client(options = {}) {
  const chat = new Chat({ url: "ws://test/ws", token: async () => "token", ...options });
  chat.states = [];
  chat.addEventListener("state", ({ detail }) => chat.states.push(detail.code ? `${detail.state} ${detail.code}` : detail.state));
  return chat;
}

/** Notes everything that a room tells, as words. */
function follow(room) {
  const told = [];
  const words = {
    message: ({ content }) => content,
    updated: ({ content }) => `updated ${content}`,
    deleted: ({ id }) => `deleted ${id}`,
    reset: ({ messages }) => `reset ${messages.map(({ content }) => content)}`,
    subscribed: ({ seq }) => `subscribed ${seq}`,
    unsubscribed: ({ code }) => `unsubscribed ${code}`,
    typing: ({ user_id, active }) => `typing ${user_id} ${active}`,
    event: ({ event }) => `event ${event}`,
  };
  for (const [type, word] of Object.entries(words)) room.addEventListener(type, ({ detail }) => told.push(word(detail)));
  return told;
}

/** Connects, as far as the server's hello: the socket. */
async function dialled(chat, hello) {
  chat.connect();
  await settle();
  sockets.at(-1).open(hello);
  await settle();
  return sockets.at(-1);
}

/** A client in room 1, whose head is 10. */
async function inRoom(options) {
  const chat = client(options), room = chat.join(1), told = follow(room);
  const socket = await dialled(chat);
  socket.ready({ 1: answer(10) });
  await settle();
  told.length = 0;
  return { chat, room, told, socket };
}

/** The next connection after this one has ended, as far as the server's hello. */
async function again(seconds = 10) {
  const before = sockets.length;
  for (let waited = 0; sockets.length === before && waited < seconds; waited += 0.1) await pass(0.1);
  assert.equal(sockets.length, before + 1, "it did not connect again");
  sockets.at(-1).open();
  await settle();
  return sockets.at(-1);
}

const outcome = (promise) => {
  const state = { now: "pending" };
  promise.then((value) => (state.now = value), (error) => (state.now = error.code));
  return state;
};

describe("listeners that end things", () => {
  test("after leave() in a listener nothing more is told", async () => {
    const chat = client(), room = chat.join(1, { after: 0 }), told = follow(room);
    room.addEventListener("message", () => chat.leave(1));
    const socket = await dialled(chat);
    socket.ready({ 1: answer(3, { changes: [change(1), change(2), change(3)] }) });
    socket.say(change(4), { event: "typing", conversation_id: 1, user_id: 8, active: true, expires_in: 6 });
    await pass(10);
    assert.deepEqual(told, ["m1"]);
  });

  test("after close() in a listener nothing more is told, and nothing of it is lost", async () => {
    const chat = client(), room = chat.join(1, { after: 0 }), told = follow(room);
    room.addEventListener("message", ({ detail }) => detail.seq === 1 && chat.close());
    let socket = await dialled(chat);
    socket.ready({ 1: answer(3, { changes: [change(1), change(2), change(3)] }) });
    await pass(10);
    assert.deepEqual(told, ["m1"]);
    socket = await dialled(chat);
    assert.deepEqual(socket.last("auth").rooms, { 1: 1 });
    socket.ready({ 1: answer(3, { changes: [change(2), change(3)] }) });
    assert.deepEqual(told, ["m1", "m2", "m3", "subscribed 3"]);
  });

  test("after close() in a listener other rooms are told nothing", async () => {
    const chat = client(), first = chat.join(1), told = follow(chat.join(2));
    first.addEventListener("subscribed", () => chat.close());
    const socket = await dialled(chat);
    socket.ready({ 1: answer(3), 2: answer(5, { conversation_id: 2 }) });
    await pass(10);
    assert.deepEqual(told, []);
    assert.equal(chat.state, "closed");
  });

  test("close() in the listener of `online` and of `reset` ends it there", async () => {
    for (const type of ["state", "reset"]) {
      const chat = client(), room = chat.join(1, { after: 5 }), told = follow(room);
      const target = type === "state" ? chat : room;
      target.addEventListener(type, () => type === "reset" || chat.state === "online" ? chat.close() : null);
      (await dialled(chat)).ready({ 1: answer(3, { recovered: false }) });
      assert.deepEqual(told, type === "state" ? [] : ["reset "]);
      assert.equal(chat.state, "closed");
    }
  });

  test("who typed when a room was left does not stop typing afterwards", async () => {
    const { chat, told, socket } = await inRoom();
    socket.say({ event: "typing", conversation_id: 1, user_id: 8, active: true, expires_in: 6 });
    chat.leave(1);
    await pass(10);
    assert.deepEqual(told, ["typing 8 true"]);
  });

  test("a room that was left says nothing more to the server", async () => {
    const { chat, room, socket } = await inRoom();
    room.read(100);
    chat.leave(1);
    room.typing();
    await pass(1);
    assert.deepEqual(socket.sent.map(({ event }) => event), ["auth", "unsubscribe"]);
  });
});

describe("rooms", () => {
  test("an id may be text", async () => {
    const chat = client(), room = chat.join("1"), told = follow(room);
    assert.equal(chat.join(1), room);
    const socket = await dialled(chat);
    socket.ready({ 1: answer(0) });
    socket.say(change(1));
    assert.deepEqual(told, ["subscribed 0", "m1"]);
    chat.send("1", "Hello");
    assert.equal(socket.last("send").conversation_id, 1);
    chat.leave("1");
    assert.equal(socket.last("unsubscribe").conversation_id, 1);
  });

  test("what is no id is refused at once", async () => {
    const { chat } = await inRoom();
    for (const id of ["x", "", 0, -1, 1.5, null, undefined, "1e3", 2 ** 53]) {
      assert.throws(() => chat.join(id), TypeError);
      await assert.rejects(chat.send(id, "Hello"), TypeError);
      await assert.rejects(chat.history(id), TypeError);
    }
  });

  test("presence can be had later", async () => {
    const { chat, room, socket, told } = await inRoom();
    assert.equal(chat.join(1, { presence: true }), room);
    const asked = socket.last("subscribe");
    assert.deepEqual([asked.conversation_id, asked.after, asked.presence], [1, 10, true]);
    socket.reply("subscribe", { event: "subscribed", ...answer(10, { online: [8] }) });
    assert.deepEqual([...room.online], [8]);
    chat.join(1);
    assert.equal(socket.all("subscribe").length, 1);
    socket.end(1006);
    const next = await again();
    next.ready({ 1: answer(10) });
    assert.equal(next.last("subscribe").presence, true);
    assert.deepEqual(told, ["subscribed 10", "subscribed 10"]);
  });

  test("presence that is wanted while the room is being entered is asked for after that", async () => {
    const chat = client();
    const socket = await dialled(chat);
    socket.ready();
    chat.join(1);
    chat.join(1, { presence: true });
    assert.equal(socket.all("subscribe").length, 1);
    socket.reply("subscribe", { event: "subscribed", ...answer(10) });
    assert.deepEqual(socket.all("subscribe").map(({ presence }) => presence), [undefined, true]);
  });

  test("a room that is left and joined again gets its own answer", async () => {
    const chat = client(), socket = await dialled(chat);
    socket.ready();
    const old = follow(chat.join(1));
    chat.leave(1);
    const told = follow(chat.join(1));
    const [first] = socket.all("subscribe");
    socket.say({ event: "subscribed", ref: first.ref, ...answer(10) }, change(11));
    socket.reply("unsubscribe", { event: "ok" });
    await settle();
    assert.equal(socket.all("subscribe").length, 2);
    socket.reply("subscribe", { event: "subscribed", ...answer(15) });
    socket.say(change(16));
    assert.deepEqual([old, told], [[], ["subscribed 15", "m16"]]);
  });

  test("a room that is left and joined again while `auth` is on its way gets its own answer", async () => {
    const chat = client();
    chat.join(1, { after: 3 });
    const socket = await dialled(chat);
    chat.leave(1);
    const told = follow(chat.join(1));
    socket.ready({ 1: answer(5, { changes: [change(4), change(5)] }) });
    socket.reply("unsubscribe", { event: "ok" });
    await settle();
    assert.equal(socket.last("subscribe").after, undefined);
    socket.reply("subscribe", { event: "subscribed", ...answer(15) });
    assert.deepEqual(told, ["subscribed 15"]);
  });

  test("more rooms than the server allows are not asked for", async () => {
    const chat = client();
    const told = Array.from({ length: 7 }, (_, index) => follow(chat.join(index + 1)));
    const socket = await dialled(chat);
    assert.deepEqual(Object.keys(socket.last("auth").rooms), ["1", "2", "3", "4", "5"]);
    socket.ready(Object.fromEntries([1, 2, 3, 4, 5].map((id) => [id, answer(0, { conversation_id: id })])));
    await pass(1);
    assert.deepEqual(told.flat().sort(), [...Array(5).fill("subscribed 0"), ...Array(2).fill("unsubscribed limit_exceeded")]);
    assert.equal(socket.all("subscribe").length, 0);
    chat.leave(1); // its place is free at once
    chat.join(8);
    assert.equal(socket.last("subscribe").conversation_id, 8);
  });

  test("an `auth` names as many rooms as fit into a frame; the others are asked for one by one", async () => {
    const chat = client();
    for (const id of [1, 2, 3]) chat.join(id, { after: 1, mark: "x".repeat(200) });
    const socket = await dialled(chat, { limits: { frame: 600, rooms: 200 } });
    assert.deepEqual(Object.keys(socket.last("auth").rooms), ["1", "2"]);
    socket.ready({ 1: answer(1), 2: answer(1, { conversation_id: 2 }) });
    assert.deepEqual(socket.all("subscribe").map((frame) => frame.conversation_id), [3]);
  });

  test("an expired token and passing errors end no subscription", async () => {
    const { told, socket, chat } = await inRoom();
    chat.join(2);
    socket.reply("subscribe", { event: "error", code: "token_expired", message: "x", retryable: false });
    await settle();
    socket.reply("refresh", { event: "ok", expires_in: 100 });
    for (const code of ["unavailable", "internal", "rate_limited"]) {
      await pass(20);
      socket.reply("subscribe", { event: "error", code, message: "x", retryable: true, retry_after: 1 });
    }
    await pass(20);
    assert.equal(socket.all("subscribe").length, 5);
    socket.reply("subscribe", { event: "subscribed", ...answer(3, { conversation_id: 2 }) });
    assert.equal(chat.join(2).cursor, 3);
    assert.deepEqual(told, []);
  });

  test("while a room waits to be asked for again, nothing else asks for it", async () => {
    const { socket } = await inRoom();
    socket.say(change(13));
    socket.reply("subscribe", { event: "error", code: "unavailable", message: "x", retryable: true, retry_after: 5 });
    for (let seq = 14; seq < 30; seq++) socket.say(change(seq));
    assert.equal(socket.all("subscribe").length, 1);
  });

  test("an event may have any name", async () => {
    const { told, socket } = await inRoom();
    for (const event of ["constructor", "toString", "poll.opened"]) socket.say({ event, conversation_id: 1, data: {} });
    assert.deepEqual(told, ["event constructor", "event toString", "event poll.opened"]);
  });

  test("a receipt is said once on each connection, unless the server has it already", async () => {
    const { room, socket } = await inRoom();
    room.read(90);
    for (let seq = 11; seq < 14; seq++) {
      socket.say(change(seq)); // in a crowded room nobody repeats our receipts
      await pass(1);
    }
    assert.deepEqual([socket.all("read").length, socket.all("delivered").map(({ id }) => id)], [1, [110, 120, 130]]);
    socket.end(1006);
    const next = await again();
    next.ready({ 1: answer(13, { receipts: [{ user_id: 7, read: 80, delivered: 120 }] }) }); // the last ones were lost
    await pass(1);
    assert.deepEqual([next.all("read").map(({ id }) => id), next.last("delivered").id], [[90], 130]);
    next.say({ event: "receipt", conversation_id: 1, user_id: 7, read: 130, delivered: 130 }); // on another device
    room.read(130);
    await pass(1);
    assert.equal(next.all("read").length, 1);
  });

  test("the author is told of what came in a reset and in a page of history", async () => {
    const { chat, socket } = await inRoom();
    socket.say({ event: "subscribed", ...answer(20, { recovered: false, changes: [change(19), change(20)] }) });
    await pass(1);
    assert.deepEqual(socket.last("delivered"), { event: "delivered", conversation_id: 1, id: 200 });
    chat.history(1);
    socket.reply("history", { event: "history", messages: [change(21)], has_more: false });
    await settle();
    await pass(1);
    assert.equal(socket.last("delivered").id, 210);
  });
});

describe("cursors that prove themselves", () => {
  test("the mark of the last change is given back", async () => {
    const { chat, room, socket } = await inRoom();
    socket.say(change(11, { mark: "a" }), change(12, { mark: "b" }));
    assert.deepEqual([room.cursor, room.mark], [12, "b"]);
    socket.say(change(14, { mark: "c" }));
    const asked = socket.last("subscribe");
    assert.deepEqual([asked.after, asked.mark, asked.epoch], [12, "b", "e"]);
    socket.reply("subscribe", { event: "subscribed", ...answer(14, { mark: "c", changes: [change(13, { mark: "c" }), change(14, { mark: "c" })] }) });
    chat.join(2, { after: 5, mark: "kept" });
    socket.end(1006);
    const next = await again();
    assert.deepEqual(next.last("auth").rooms, { 1: { after: 14, mark: "c" }, 2: { after: 5, mark: "kept" } });
  });

  test("without a mark the cursor is a plain integer", async () => {
    const { socket } = await inRoom();
    socket.say(change(11, { mark: "a" }), change(12)); // a server that is older than marks: after a change of nodes
    socket.end(1006);
    assert.deepEqual((await again()).last("auth").rooms, { 1: 12 });
  });

  test("a server that does not know marks is asked without them", async () => {
    const { socket } = await inRoom();
    socket.say(change(11, { mark: "a" }));
    socket.end(1006);
    const old = await again();
    old.reply("auth", { event: "error", code: "bad_request", message: "an integer is wanted", field: "rooms" });
    await settle();
    assert.deepEqual(old.all("auth").map(({ rooms }) => rooms), [{ 1: { after: 11, mark: "a" } }, { 1: 11 }]);
  });

  test("another history replaces everything that is held of the room", async () => {
    const { room, told, socket } = await inRoom();
    socket.say(change(11, { mark: "a", id: 500 }), { event: "receipt", conversation_id: 1, user_id: 8, read: 500 });
    room.read(500);
    await pass(1);
    socket.say({ event: "receipt", conversation_id: 1, user_id: 7, read: 500, delivered: 500 });
    const other = [change(6, { id: 400, content: "other" })];
    socket.say({ event: "subscribed", ...answer(6, { mark: "z", recovered: false, changes: other, receipts: [{ user_id: 9, read: 3, delivered: 3 }] }) });
    assert.deepEqual(told, ["m11", "reset other", "subscribed 6"]);
    assert.deepEqual([room.cursor, room.mark], [6, "z"]);
    assert.deepEqual([...room.receipts], [[9, { read: 3, delivered: 3 }]]);
    socket.say(change(7, { mark: "y", id: 410 }));
    room.read(410);
    await pass(1);
    assert.deepEqual([told.at(-1), socket.last("read").id], ["m7", 410]);
  });

  test("a cursor is judged by the data that it is from", async () => {
    // `ready` names new data, and the connection ends before the room's own answer has come.
    const { told, socket } = await inRoom();
    socket.end(1006);
    let next = await again();
    next.ready({}, { epoch: "other" });
    next.end(1006);
    next = await again();
    assert.deepEqual([next.last("auth").rooms, next.last("auth").epoch], [{}, "other"]);
    next.ready({}, { epoch: "other" });
    assert.deepEqual([next.last("subscribe").after, next.last("subscribe").epoch], [10, "e"]);
    next.reply("subscribe", { event: "subscribed", ...answer(2, { epoch: "other", recovered: false }) });
    assert.deepEqual(told, ["reset ", "subscribed 2"]);
  });

  test("what was missed may come in parts", async () => {
    const chat = client(), room = chat.join(1, { after: 10 }), told = follow(room);
    const socket = await dialled(chat);
    socket.ready();
    socket.say({ event: "subscribed", ...answer(12, { changes: [change(11), change(12)] }) });
    socket.say({ event: "subscribed", ...answer(13, { changes: [change(13)] }) }, change(14));
    assert.deepEqual(told.filter((word) => !word.startsWith("subscribed")), ["m11", "m12", "m13", "m14"]);
    assert.deepEqual([socket.all("subscribe").length, room.cursor], [0, 14]);
  });

  test("parts before the reply itself count, parts after it too", async () => {
    for (const first of [true, false]) {
      const { room, told, socket } = await inRoom();
      socket.say(change(15));
      const { ref } = socket.last("subscribe");
      const parts = [[11, 12], [13], [14, 15]].map((seqs) => ({ event: "subscribed", ...answer(seqs.at(-1), { changes: seqs.map((seq) => change(seq)) }) }));
      parts.at(first ? 0 : -1).ref = ref;
      socket.say(...parts);
      assert.deepEqual(told.filter((word) => !word.startsWith("subscribed")), ["m11", "m12", "m13", "m14", "m15"]);
      assert.deepEqual([socket.all("subscribe").length, room.cursor], [1, 15]);
    }
  });

  test("an answer that nobody asked for skips nothing", async () => {
    const { told, socket } = await inRoom();
    socket.say({ event: "subscribed", ...answer(15, { changes: [change(15)] }) });
    assert.equal(socket.last("subscribe").after, 10);
    assert.deepEqual(told, []);
  });
});

describe("what is too big", () => {
  test("a frame that the server does not take is never sent", async () => {
    const { chat, socket } = await inRoom();
    const big = outcome(chat.send(1, "é".repeat(1000))), next = outcome(chat.send(1, "after it"));
    await settle();
    assert.deepEqual([big.now, socket.all("send").map(({ content }) => content)], ["too_large", ["after it"]]);
    socket.reply("send", { event: "ok", id: 1, seq: 11 });
    await settle();
    assert.equal(next.now.seq, 11);
  });

  test("before the first hello nobody knows: it waits, and is judged then", async () => {
    const chat = client(), big = outcome(chat.send(1, "x".repeat(3000)));
    const socket = await dialled(chat);
    socket.ready();
    await settle();
    assert.deepEqual([big.now, socket.all("send")], ["too_large", []]);
  });

  test("1009 rejects the biggest of what waits, and nothing else", async () => {
    const { chat, room, told, socket } = await inRoom();
    const big = outcome(chat.send(1, "x".repeat(1000))), small = outcome(chat.edit(1, 5, "x"));
    const joined = chat.join(2);
    socket.end(1009, "too big");
    await settle();
    assert.deepEqual([big.now, small.now], ["too_large", "pending"]);
    const next = await again();
    assert.deepEqual(Object.keys(next.last("auth").rooms), ["1", "2"]);
    next.ready({ 1: answer(10), 2: answer(0, { conversation_id: 2 }) });
    await settle();
    assert.deepEqual([next.all("send"), next.all("edit").length], [[], 1]);
    assert.deepEqual([chat.join(1), chat.join(2)], [room, joined]);
    assert.deepEqual(told, ["subscribed 10"]);
  });
});

describe("sending", () => {
  test("a room that is refused for the moment holds up no other", async () => {
    const { chat, socket } = await inRoom();
    const first = outcome(chat.send(1, "a")), second = outcome(chat.send(1, "b")), other = outcome(chat.send(2, "c"));
    socket.reply("send", { event: "error", code: "unavailable", message: "x", retryable: true });
    await settle();
    assert.equal(socket.last("send").content, "c");
    socket.reply("send", { event: "ok", id: 1, seq: 1 });
    await settle();
    assert.deepEqual([first.now, second.now, other.now.seq], ["pending", "pending", 1]);
    await pass(2);
    assert.deepEqual(socket.all("send").map(({ content }) => content), ["a", "c", "a"]);
    socket.reply("send", { event: "ok", id: 2, seq: 11 });
    await settle();
    socket.reply("send", { event: "ok", id: 3, seq: 12 });
    await settle();
    assert.deepEqual([first.now.seq, second.now.seq], [11, 12]);
  });

  test("the rate limit counts for all rooms, and rejects nothing", async () => {
    const { chat, socket } = await inRoom();
    const sent = outcome(chat.send(1, "a"));
    chat.send(2, "b");
    for (let refusals = 0; refusals < 15; refusals++) {
      socket.reply("send", { event: "error", code: "rate_limited", message: "x", retryable: true, retry_after: 1 });
      await pass(1.1);
    }
    assert.deepEqual(new Set(socket.all("send").map(({ content }) => content)), new Set(["a"]));
    assert.equal(sent.now, "pending");
  });

  test("what the server keeps failing is given up", async () => {
    const { chat, socket } = await inRoom();
    const sent = outcome(chat.send(1, "a"));
    for (let tries = 0; tries < 10; tries++) {
      socket.reply("send", { event: "error", code: "internal", message: "x", retryable: true });
      await pass(25);
      socket.say({ event: "ping" });
    }
    assert.equal(sent.now, "internal");
  });

  test("a page of history is asked for again when the connection is exchanged", async () => {
    const { chat, socket } = await inRoom();
    const page = outcome(chat.history(1));
    socket.say({ event: "reconnect", reason: "restart", delay: [0, 100], deadline_ms: 5000 });
    await pass(0.2);
    const next = sockets.at(-1);
    next.open();
    next.ready({ 1: answer(10) });
    await settle();
    next.reply("history", { event: "history", messages: [], has_more: false });
    await settle();
    assert.deepEqual(page.now.messages, []);
    assert.deepEqual(chat.states, ["connecting", "online", "online"]);
  });
});

describe("connections", () => {
  test("one that fails without a close event is tried again soon", async () => {
    const chat = client();
    chat.connect();
    await settle();
    sockets[0].onerror?.({ message: "failed" }); // Node 20 says no more than this
    await pass(1);
    assert.equal(sockets.length, 2);
    chat.close();
  });

  test("the close code that follows an error counts", async () => {
    const chat = client();
    chat.connect();
    await settle();
    sockets[0].onerror?.({ message: "failed" });
    sockets[0].end(4500, "invalid");
    assert.deepEqual(chat.states, ["connecting", "stopped 4500"]);
  });

  test("codes from 4500 stop, others do not, nor does an auth that came too late", async () => {
    for (let code = 1000; code < 5000; code++) {
      if (code === 1016) code = 4000; // what is between is nobody's
      const chat = client();
      const socket = await dialled(chat);
      socket.end(code, "x");
      const stops = code >= 4500 && code !== 4502;
      assert.equal(chat.states.at(-1), `${stops ? "stopped" : "offline"} ${code}`);
      chat.close();
    }
  });

  test("nothing of a connection that has ended is kept", async () => {
    const chat = client();
    const kept = [];
    const comeAndGo = async () => {
      const socket = await dialled(chat);
      socket.ready({}, { expires_in: 3600 });
      socket.say({ event: "reconnect", reason: "restart", delay: [50_000, 60_000], deadline_ms: 5000 });
      kept.push(new WeakRef(socket));
      chat.close();
    };
    for (let round = 0; round < 20; round++) await comeAndGo();
    sockets.length = 0;
    await settle();
    globalThis.gc();
    await settle();
    globalThis.gc();
    assert.equal(kept.filter((reference) => reference.deref()).length, 0);
  });

  test("nothing waits any more after close()", async () => {
    const { chat, socket } = await inRoom();
    socket.say(change(11), { event: "typing", conversation_id: 1, user_id: 9, active: true, expires_in: 6 });
    chat.close();
    const { length } = sockets;
    await pass(100);
    assert.equal(sockets.length, length);
    assert.deepEqual(socket.sent.map(({ event }) => event), ["auth"]);
  });

  test("the token is renewed in time, and one that is no text is not sent", async () => {
    const tokens = ["one", undefined, "two"];
    const { chat, socket } = await inRoom({ token: async () => tokens.shift() });
    socket.end(1006);
    const next = await again();
    next.ready({ 1: answer(10) }, { expires_in: 30 });
    await pass(29);
    assert.deepEqual(next.all("refresh").map(({ token }) => token), ["two"]);
    assert.equal(chat.state, "online");
  });
});

describe("silence", () => {
  test("a dead connection is noticed when it has been silent for too long", async () => {
    const { chat } = await inRoom();
    await pass(39);
    assert.equal(chat.state, "online");
    await pass(2);
    assert.equal(chat.states.at(-2) ?? "", "offline 4000");
  });

  test("while a long answer may be arriving it waits longer", async () => {
    const { chat, socket } = await inRoom();
    const page = outcome(chat.history(1));
    await pass(60);
    assert.equal(chat.state, "online");
    socket.reply("history", { event: "history", messages: [], has_more: false });
    await settle();
    assert.deepEqual(page.now.messages, []);
    await pass(41);
    assert.ok(chat.states.includes("offline 4000"));
  });

  test("a link so slow that its first answer takes minutes gets in", async () => {
    const chat = client();
    chat.join(1, { after: 0 });
    await dialled(chat);
    let lasted = [];
    for (let tries = 0; tries < 4; tries++) {
      const began = Date.now(), count = sockets.length;
      while (sockets.length === count) await pass(1);
      lasted.push(Math.round((Date.now() - began) / 1000));
      sockets.at(-1).open();
      await settle();
    }
    assert.ok(lasted.every((seconds, index) => !index || seconds > lasted[index - 1] * 1.5), `${lasted}`);
    sockets.at(-1).ready({ 1: answer(1, { changes: [change(1)] }) });
    assert.equal(chat.state, "online");
    chat.close();
  });

  test("after sleep the other side is asked before it is given up", async () => {
    const { chat, socket } = await inRoom();
    await pass(1);
    jump(3600);
    await pass(0.05);
    assert.deepEqual(socket.all("ping"), [{ event: "ping" }]);
    assert.equal(chat.state, "online");
    socket.say({ event: "pong" });
    await pass(30);
    assert.equal(chat.state, "online");
    jump(3600);
    await pass(6);
    assert.ok(chat.states.includes("offline 4000"));
  });

  test("a page that was frozen starts a new connection, for the browser has thrown frames away", async () => {
    globalThis.document = new EventTarget();
    try {
      const { chat, socket } = await inRoom();
      const sent = outcome(chat.send(1, "a"));
      globalThis.document.dispatchEvent(new Event("resume"));
      await settle();
      const next = sockets.at(-1);
      assert.notEqual(next, socket);
      next.open();
      await settle();
      next.ready({ 1: answer(10) });
      await settle();
      assert.equal(next.last("send").client_id, socket.last("send").client_id);
      assert.equal(sent.now, "pending");
      chat.close();
      const { length } = sockets;
      globalThis.document.dispatchEvent(new Event("resume"));
      await settle();
      assert.equal(sockets.length, length);
    } finally {
      delete globalThis.document;
    }
  });
});
