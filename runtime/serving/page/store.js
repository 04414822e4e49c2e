// What the browser keeps: conversations, one entry each, and settings in localStorage; the key and the shown
// conversation for this tab only.

const CONVERSATION = "lrt-deploy:conversation:";
const SETTINGS = "lrt-deploy:settings";
const SHOWN = "lrt-deploy:shown";
const KEY = "lrt-deploy:key";

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

// Returns whether it was kept: storage can be full, or forbidden.
function keep(storage, name, value) {
  try {
    storage().setItem(name, value);
    return true;
  } catch {
    return false;
  }
}

function found(storage, name) {
  try {
    return storage().getItem(name);
  } catch {
    return null;
  }
}

const local = () => localStorage;
const tab = () => sessionStorage;

export const saveConversation = (conversation) =>
  keep(local, CONVERSATION + conversation.id, JSON.stringify(conversation));

// All conversations, the latest first. What is damaged is left out.
export function conversations() {
  let names = [];
  try {
    names = Object.keys(localStorage).filter((name) => name.startsWith(CONVERSATION));
  } catch {
    return [];
  }
  return names
    .map((name) => parsed(localStorage.getItem(name)))
    .filter((value) => value && Array.isArray(value.turns) && value.chosen)
    .sort((a, b) => b.updated - a.updated);
}

export function deleteConversation(id) {
  localStorage.removeItem(CONVERSATION + id);
}

export const shown = () => found(tab, SHOWN);
export const setShown = (id) => keep(tab, SHOWN, id);
export const settings = () => parsed(found(local, SETTINGS)) ?? {};
export const saveSettings = (values) => keep(local, SETTINGS, JSON.stringify(values));
export const key = () => found(tab, KEY) ?? "";
export const setKey = (value) => keep(tab, KEY, value);
