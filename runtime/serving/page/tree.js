// A conversation as a tree of turns. Knows neither the page nor the server.
//
// A turn is {parent, role, text} and, in answers, what is known of them. Its number is its place in `turns`, its parent
// the number of another turn or ROOT. `chosen` tells which child of a turn is shown; the shown turns are the path.

export const ROOT = -1;

export function newConversation(kind, model) {
  const now = Date.now();
  return { id: crypto.randomUUID?.() ?? `${now}-${Math.random()}`, kind, model, updated: now, turns: [], chosen: {} };
}

export function children(conversation, parent) {
  return conversation.turns.flatMap((turn, number) => (turn.parent === parent ? [number] : []));
}

export function path(conversation) {
  const found = [];
  for (let at = ROOT; ; ) {
    const next = children(conversation, at);
    if (!next.length) return found;
    at = conversation.chosen[at] ?? next.at(-1);
    found.push(at);
  }
}

// Adds a turn and shows it; returns its number.
export function add(conversation, parent, role, text) {
  const number = conversation.turns.push({ parent, role, text }) - 1;
  conversation.chosen[parent] = number;
  return number;
}

// Shows the version of a turn that is `by` places after it.
export function choose(conversation, number, by) {
  const { parent } = conversation.turns[number];
  const versions = children(conversation, parent);
  const found = versions[versions.indexOf(number) + by];
  if (found !== undefined) conversation.chosen[parent] = found;
}

// The turns before a turn, the first one first.
export function before(conversation, number) {
  const found = [];
  for (let at = conversation.turns[number].parent; at !== ROOT; at = conversation.turns[at].parent) {
    found.unshift(conversation.turns[at]);
  }
  return found;
}

// Where a new message goes: after the last shown turn, or in place of a message whose answer failed.
export function end(conversation) {
  const last = path(conversation).at(-1) ?? ROOT;
  const turn = conversation.turns[last];
  if (!turn?.error || turn.text) return last;
  const question = conversation.turns[turn.parent];
  return question?.role === "user" ? question.parent : turn.parent;
}

export function title(conversation) {
  const first = path(conversation).map((number) => conversation.turns[number].text.trim()).find(Boolean);
  return first?.slice(0, 200) ?? "Empty";
}
