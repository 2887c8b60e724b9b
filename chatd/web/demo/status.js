/** The state of the connection: a word beside the title, and a banner while something is wrong. */
import { $, setText } from "./shared.js";

const WORDS = { connecting: "Connecting…", online: "Online", offline: "Offline", stopped: "Disconnected" };
const BACK_SHOWN = 3_000; // ms for which "Connected again" is shown

let wasLost = false;
let timer;

export function showState({ state, retryAt, code, reason }) {
  clearTimeout(timer);
  $("status").dataset.state = $("banner").dataset.state = state;
  setText($("status"), WORDS[state]);
  setText($("countdown"), state === "connecting" ? "Connecting…" : "");
  if (state === "offline") {
    showBanner("Connection lost.", "Try now");
    countDown(retryAt);
  } else if (state === "stopped") {
    showBanner(`The server ended the connection: ${reason || "no reason given"} (${code}).`, "Try again");
  } else if (state === "online" && wasLost) {
    showBanner("Connected again.");
    timer = setTimeout(() => ($("banner").hidden = true), BACK_SHOWN);
  }
  wasLost = state !== "online" && (wasLost || state !== "connecting");
}

export function showBanner(text, action) {
  $("banner").hidden = false;
  $("retry").hidden = !action;
  if (action) setText($("retry"), action);
  setText($("banner-text"), text);
}

function countDown(retryAt) {
  setText($("countdown"), `Reconnecting in ${Math.max(1, Math.ceil((retryAt - Date.now()) / 1000))} s…`);
  timer = setTimeout(countDown, 250, retryAt);
}
