/** Helpers that every part of the page uses, and the demo's users and rooms. */

export const $ = (id) => document.getElementById(id);
export const fromTemplate = (id) => $(id).content.firstElementChild.cloneNode(true);

/** All text enters the page through this. Equal text is not set again, so that it is not announced again or deselected. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const USERS = new Map([[1, "Ada"], [2, "Grace"], [3, "Alan"], [4, "Margaret"]]);
export const ROOMS = new Map([[1, "general"], [2, "engineering"], [3, "coffee"]]);

export const parameters = new URLSearchParams(location.search);
export const me = idFrom("user", USERS, "User");
export const firstRoom = idFrom("room", ROOMS, "room");

/** Returns the id in the address. Any number is accepted, and one without a name gets a name. */
function idFrom(parameter, names, title) {
  const id = Number(parameters.get(parameter));
  if (!Number.isSafeInteger(id) || id < 1) return 1;
  if (!names.has(id)) names.set(id, `${title} ${id}`);
  return id;
}

export const nameOf = (user) => USERS.get(user) ?? (user ? `User ${user}` : "Somebody");

/** The first letter of a user's name, or the number of a user without one. */
export const initialOf = (user) => nameOf(user).replace("User ", "").match(/^\d{1,3}|^./u)[0];

/** The golden angle keeps the colours of neighbours apart. */
export const hueOf = (user) => Math.round((user * 137.5 + 95) % 360);
