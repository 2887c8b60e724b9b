/** The text box in which messages are written and edited. It passes the text to callbacks and does not know the server. */
import { $, ROOMS } from "./shared.js";

export class Composer {
  #box = $("content");
  #editing = null; // the message that is being edited
  #draft = ""; // the unsent text from before the editing
  #room = null;
  #left = new Map(); // by room: the unsent text when the user entered another room

  /** Calls `send(content)`, `edit(id, content)` and `typing(active)`. Arrow Up edits the message that `latest()` returns. */
  constructor({ send, edit, latest, typing }) {
    Object.assign(this, { send, edit, latest, typing });
    this.#box.addEventListener("keydown", (event) => this.#key(event));
    this.#box.addEventListener("input", () => {
      this.#fit();
      this.typing(Boolean(this.#box.value.trim()));
    });
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
      this.#box.focus();
    });
    $("cancel").addEventListener("click", () => this.stopEditing());
    this.#fit();
  }

  /** Shows the room's name, or why the server has refused it. */
  draw({ id, refusal }) {
    this.#box.disabled = Boolean(refusal);
    this.#box.placeholder = refusal ?? `Message #${ROOMS.get(id)}`;
  }

  /** Switches to another room. Each room keeps its own unsent text. */
  enter(room) {
    if (room === this.#room) return;
    this.#left.set(this.#room, { text: this.#box.value, editing: this.#editing, draft: this.#draft });
    const { text, editing, draft } = this.#left.get(room) ?? { text: "", editing: null, draft: "" };
    this.#room = room;
    this.#editing = editing;
    this.#draft = draft;
    this.#write(text);
  }

  startEditing(message) {
    if (!this.#editing) this.#draft = this.#box.value;
    this.#editing = message;
    this.#write(message.content);
    this.#box.focus();
  }

  stopEditing() {
    if (!this.#editing) return;
    this.#editing = null;
    this.#write(this.#draft);
    this.#draft = "";
  }

  #submit() {
    const content = this.#box.value.trim();
    if (!content || this.#box.disabled) return;
    if (this.#editing) {
      this.edit(this.#editing.id, content);
      this.stopEditing();
    } else {
      this.#write("");
      this.typing(false);
      this.send(content);
    }
  }

  #key(event) {
    if (event.isComposing) return; // Enter ends the composition of a character, Escape discards it
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.#submit();
    } else if (event.key === "Escape") {
      this.stopEditing();
    } else if (event.key === "ArrowUp" && !this.#box.value && this.latest()) {
      event.preventDefault();
      this.startEditing(this.latest());
    }
  }

  #write(text) {
    this.#box.value = text;
    this.#fit();
  }

  /** Makes the box as high as its text. */
  #fit() {
    this.#box.style.height = "auto";
    this.#box.style.height = `${this.#box.scrollHeight + 2}px`; // 2: its borders
    $("editing").hidden = !this.#editing;
    $("composer").querySelector(".send").disabled = !this.#box.value.trim();
  }
}
