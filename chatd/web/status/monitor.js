// The status page: fetches the daemon's data every two seconds and draws them. It uses no library and stores nothing.

const TILES = [
  {key: "connections", name: "Connections"},
  {key: "users", name: "Users online"},
  {key: "rooms", name: "Rooms in use"},
  {key: "posted", name: "Messages in", unit: "a second", rate: true},
  {key: "delivered", name: "Deliveries", unit: "a second", rate: true},
  {key: "opened", name: "Connects", unit: "a second", rate: true},
  {key: "delivery_lag", name: "Commit to socket", seconds: true},
  {key: "database", name: "Database", seconds: true},
  {key: "loop_lag", name: "Event loop lag", seconds: true},
  {key: "memory", name: "Memory", bytes: true},
];
const STATES = {ok: "good", degraded: "wait", stopping: "wait", read_only: "bad", down: "bad", unavailable: "bad"};
const WORDS = {
  ok: "All is well", degraded: "Degraded: Redis does not answer, this node still serves", stopping: "Stopping",
  unavailable: "Unavailable: messages cannot be stored",
};
const WIDTH = 300, HEIGHT = 60;
const PATIENCE = 5000; // ms for an answer

const find = (selector) => document.querySelector(selector);
const whole = new Intl.NumberFormat("en", {maximumFractionDigits: 0});

const drawn = TILES.map((tile) => {
  const section = find("#tile").content.cloneNode(true).querySelector("section");
  section.querySelector("h2").textContent = tile.name;
  find("#tiles").append(section);
  return {...tile, section};
});

function shown(tile, value) {
  if (tile.seconds) {
    return value === 0 ? ["–", ""] : value < 1 ? [plain(value * 1000), "ms"] : [plain(value), "s"];
  }
  if (tile.bytes) {
    return value === 0 ? ["–", ""] : [whole.format(value / 2 ** 20), "MiB"];
  }
  return [tile.rate && value < 100 ? plain(value) : whole.format(value), tile.unit ?? ""];
}

function plain(value) {
  return String(Number(value.toPrecision(2)));
}

function draw(tile, points, most) {
  const values = points.map((point) => point[tile.key]);
  const now = values.at(-1) ?? 0, top = Math.max(...values, 0);
  const [number, unit] = shown(tile, now);
  tile.section.querySelector(".number").textContent = number;
  tile.section.querySelector(".unit").textContent = unit;
  const path = curve(values, top, most);
  tile.section.querySelector(".line").setAttribute("d", path.line);
  tile.section.querySelector(".area").setAttribute("d", path.area);
  tile.section.querySelector(".range").textContent = top > 0 ? `most: ${shown(tile, top).join(" ").trim()}` : " ";
}

// Returns the SVG paths of a curve, with the newest value at the right edge and the highest nearly at the top.
function curve(values, top, most) {
  if (values.length < 2) {
    return {line: "", area: ""};
  }
  const step = WIDTH / (most - 1), first = WIDTH - step * (values.length - 1);
  const places = values.map((value, index) => {
    const height = top > 0 ? value / top * (HEIGHT - 4) : 0;
    return `${(first + index * step).toFixed(1)} ${(HEIGHT - 1 - height).toFixed(1)}`;
  });
  const line = `M${places.join("L")}`;
  return {line, area: `${line}L${WIDTH} ${HEIGHT}L${first.toFixed(1)} ${HEIGHT}Z`};
}

function tellHealth(health) {
  state(find("#health"), WORDS[health.status] ?? health.status, STATES[health.status] ?? "wait");
  const checks = Object.entries(health.checks).map(([name, found]) => {
    const item = document.createElement("li");
    state(item, `${name[0].toUpperCase()}${name.slice(1)} ${found.replace("_", " ")}`, STATES[found] ?? "wait");
    return item;
  });
  find("#checks").replaceChildren(...checks);
}

function state(element, text, name) {
  element.textContent = text;
  element.dataset.state = name;
}

function since(seconds) {
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  return days ? `${days} d ${hours % 24} h` : hours ? `${hours} h ${minutes % 60} min` : `${minutes} min ${seconds % 60} s`;
}

async function ask() {
  try {
    const answer = await fetch("/status/data", {signal: AbortSignal.timeout(PATIENCE), cache: "no-store"});
    if (!answer.ok) {
      throw new Error(`chatd answered with HTTP ${answer.status}`);
    }
    const found = await answer.json();
    document.body.classList.remove("stale");
    tellHealth(found.health);
    find("#facts").textContent = `version ${found.version}, Python ${found.python}, node ${found.node}, up ${since(found.uptime)}`;
    for (const tile of drawn) {
      draw(tile, found.points, found.most);
    }
    return found.period * 1000;
  } catch (error) {
    document.body.classList.add("stale");
    state(find("#health"), `No answer: ${error.message}`, "bad");
    return 2000;
  }
}

for (;;) {
  const pause = await ask();
  await new Promise((resolve) => setTimeout(resolve, pause));
}
