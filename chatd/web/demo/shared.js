/** What every part of the page needs: its elements, and who is who in the demo. */

export const $ = (id) => document.getElementById(id);
export const fromTemplate = (id) => $(id).content.firstElementChild.cloneNode(true);

/** The only way in which text enters the page. The same text again would be read out again and drop the selection. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const USERS = new Map([[1, "Ada"], [2, "Grace"], [3, "Alan"], [4, "Margaret"]]);
export const ROOMS = new Map([[1, "general"], [2, "engineering"], [3, "coffee"]]);

export const parameters = new URLSearchParams(location.search);
export const me = idFrom("user", USERS, "User");
export const firstRoom = idFrom("room", ROOMS, "room");

/** Any number will do in the address; one without a name gets one. */
function idFrom(parameter, names, title) {
  const id = Number(parameters.get(parameter));
  if (!Number.isSafeInteger(id) || id < 1) return 1;
  if (!names.has(id)) names.set(id, `${title} ${id}`);
  return id;
}

export const nameOf = (user) => USERS.get(user) ?? (user ? `User ${user}` : "Somebody");

/** The first letter, or the number of one without a name. */
export const initialOf = (user) => nameOf(user).replace("User ", "").match(/^\d{1,3}|^./u)[0];

/** The golden angle keeps the colours of neighbours apart. */
export const hueOf = (user) => Math.round((user * 137.5 + 95) % 360);
