// The chat page: what is shown, what is being written, and what the buttons do.

import * as api from "./api.js";
import * as store from "./store.js";
import * as tree from "./tree.js";
import { TurnView } from "./turns.js";

const COMPLETION_TOKENS = 128; // where the options do not say
const SAVE_MS = 1000; // while an answer is being written
const TOUCH = matchMedia("(pointer: coarse)").matches; // no Shift+Enter: Enter is a new line, and the button sends
const NEAR_END = 80; // pixels from the end of the page, within which it follows an answer

const $ = (selector) => document.querySelector(selector);
const message = $("#message");
const send = $("#send");
const settings = $("#settings");

let model = null;
let conversation = null;
let views = new Map(); // of the shown turns, by number
let writing = null; // {controller, number, conversation}

// What is shown

function show() {
  const focus = document.activeElement?.dataset?.focus;
  const shown = tree.path(conversation);
  views = new Map(shown.map((number) => [number, new TurnView(conversation, number, actions)]));
  $("#turns").replaceChildren(...[...views.values()].map((view) => view.element));
  document.body.classList.toggle("completion", conversation.kind === "completion");
  document.body.classList.toggle("connected", model !== null);
  for (const view of views.values()) view.update(writing !== null);
  showWelcome(!shown.length);
  showControls();
  if (focus) focusAgain(focus);
}

// Puts the focus on the button that has taken the place of another one; at the last version, on its neighbour.
function focusAgain(name) {
  const button = document.querySelector(`[data-focus="${CSS.escape(name)}"]`);
  const enabled = button?.disabled ? button.parentElement.querySelector("button:enabled") : button;
  enabled?.focus({ preventScroll: true });
}

function showWelcome(empty) {
  $("#welcome").hidden = !empty || !model;
  if (!model) return;
  const chat = conversation.kind === "chat";
  $("#welcome-title").textContent = model.id;
  $("#welcome-text").textContent = "A Latent Recurrent Transformer. It carries one vector, its latent state, from each token to the next.";
  $("#kind-text").textContent = chat
    ? "You and the model take turns."
    : model.lrt.chat
      ? "The model continues your text."
      : "The model continues your text. It was not trained on chats.";
  $(`.modes [value="${conversation.kind}"]`).checked = true;
  $("#system-field").hidden = !chat;
  settings.elements.max_tokens.placeholder = chat ? "no limit" : String(COMPLETION_TOKENS);
}

function showControls() {
  const completion = conversation.kind === "completion";
  const goesOn = completion && views.size > 0 && !message.value;
  document.body.classList.toggle("writing", writing !== null);
  send.textContent = writing ? "Stop" : goesOn ? "Continue" : "Send";
  send.disabled = !model || !(writing || goesOn || message.value.trim());
  message.placeholder = completion ? (views.size ? "Add text, or continue" : "The beginning of a text") : "Message";
  $("label[for=message]").textContent = completion ? "Text to continue" : "Message";
  const usage = [...views.values()].findLast((view) => view.turn.usage)?.turn.usage;
  const all = model?.lrt.max_seq_len.toLocaleString("en");
  $("#context").textContent = usage && all ? `${usage.total_tokens.toLocaleString("en")} of ${all} tokens` : "";
}

function say(text) {
  $("#status").textContent = text;
}

function notice(text) {
  $("#notice").hidden = !text;
  $("#notice").textContent = text;
}

function save(kept = conversation) {
  if (!kept.turns.length || kept.deleted) return;
  if (!store.saveConversation(kept)) {
    notice("The browser's storage is full or closed: this conversation will not outlive the page. Delete others in History.");
  }
}

// Conversations

function open(next) {
  stop();
  conversation = next;
  for (const turn of conversation.turns) {
    if (turn.state === "writing") turn.state = "stopped"; // the page was closed
  }
  store.setShown(conversation.id);
  notice("");
  show();
}

function start() {
  const kind = store.settings()[kindSetting()] ?? (model?.lrt.chat ? "chat" : "completion");
  open(tree.newConversation(kind, model?.id));
}

const kindSetting = () => `kind of ${model?.id}`; // what was chosen last for this model

function showHistory() {
  const item = $("#conversation").content;
  const found = store.conversations();
  $("#conversations").replaceChildren(
    ...found.map((kept) => {
      const row = item.cloneNode(true).firstElementChild;
      const [opener, deleter] = row.querySelectorAll("button");
      row.querySelector(".title").textContent = tree.title(kept);
      row.querySelector(".when").textContent = `${kept.model ?? "unknown model"}, ${new Date(kept.updated).toLocaleString()}`;
      if (kept.id === conversation.id) opener.ariaCurrent = "true";
      opener.onclick = () => {
        $("#history").close();
        if (kept.id !== conversation.id) open(kept);
        message.focus();
      };
      deleter.ariaLabel = `Delete ${tree.title(kept)}`;
      deleter.onclick = () => {
        if (deleter.dataset.sure) {
          store.deleteConversation(kept.id);
          if (kept.id === conversation.id) {
            conversation.deleted = true; // what still comes of it is not saved
            start();
          }
          showHistory();
          $("#history .close").focus();
        }
        deleter.dataset.sure = "true";
        deleter.textContent = "Delete?";
      };
      return row;
    }),
  );
  if (!found.length) $("#conversations").textContent = "No conversations yet.";
}

// Answers

// What the options say that is not left to the server.
function options() {
  const found = {};
  for (const { name, value, type, checked } of settings.elements) {
    if (!name || name === "key" || name === "system" || !value) continue;
    if (type === "number") found[name] = Number(value);
    else if (name === "stop") found.stop = value.split("\n").filter(Boolean).map((text) => text.replaceAll("\\n", "\n"));
    else if (name === "prefill") found.prefill = value;
    else if (name === "latent_cosine") found.lrt = { latent_cosine: checked && model.lrt.latent };
  }
  return found;
}

async function request(number, signal) {
  const turns = tree.before(conversation, number);
  const body = { model: model.id, stream: true, stream_options: { include_usage: true }, ...options() };
  // With a seed, each version of an answer has one of its own.
  if (body.seed !== undefined) {
    body.seed += tree.children(conversation, conversation.turns[number].parent).indexOf(number);
  }
  if (conversation.kind === "chat") {
    const system = settings.elements.system.value;
    const messages = turns.map(({ role, text }) => ({ role, content: text }));
    body.messages = system ? [{ role: "system", content: system }, ...messages] : messages;
    return ["v1/chat/completions", body];
  }
  body.prompt = turns.map((turn) => turn.text).join("");
  if (body.max_tokens === undefined) {
    const room = model.lrt.max_seq_len - (await api.countTokens(body.prompt, store.key(), signal)) + 1;
    body.max_tokens = Math.max(1, Math.min(COMPLETION_TOKENS, room));
  }
  return ["v1/completions", body];
}

// Asks for an answer to the turns before it, and shows it as it comes.
async function write(number) {
  const turn = conversation.turns[number];
  const controller = new AbortController();
  const run = { controller, number, conversation };
  writing = run;
  Object.assign(turn, { text: "", state: "writing", cosines: [], ends: [] });
  for (const name of ["error", "usage", "seconds", "first", "finish"]) delete turn[name];
  show();
  follow(true);
  say("The model is writing.");
  let [began, saved, frame] = [0, performance.now(), 0];
  try {
    const [address, body] = await request(number, controller.signal);
    const asked = performance.now();
    for await (const chunk of api.stream(address, body, store.key(), controller.signal)) {
      const now = performance.now();
      if (!began) {
        began = now;
        turn.first = (began - asked) / 1e3;
      }
      take(turn, chunk);
      if (chunk.choices.length) turn.seconds = (now - began) / 1e3;
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        refresh(run);
      });
      if (now - saved > SAVE_MS) {
        saved = now;
        save(run.conversation);
      }
    }
    turn.state = "done";
  } catch (error) {
    turn.state = "stopped";
    if (error.name !== "AbortError") fail(turn, error);
  }
  cancelAnimationFrame(frame);
  end(run);
}

function take(turn, chunk) {
  if (chunk.usage) turn.usage = chunk.usage;
  const [choice] = chunk.choices;
  if (!choice) return;
  turn.text += choice.text ?? choice.delta.content ?? "";
  turn.finish = choice.finish_reason ?? turn.finish;
  for (const value of choice.lrt?.latent_cosine ?? []) {
    turn.cosines.push(value === null ? null : Math.round(value * 1e3) / 1e3);
    turn.ends.push(turn.text.length);
  }
}

function fail(turn, error) {
  turn.state = "failed";
  turn.error = error.message;
  if (error.status === 401) askForKey();
  else if (!(error instanceof api.ApiError)) console.error(error);
}

function refresh(run) {
  if (run.conversation !== conversation) return;
  const following = nearEnd();
  views.get(run.number)?.update(writing !== null);
  follow(following);
}

function end(run) {
  if (writing === run) writing = null;
  run.conversation.updated = Date.now();
  save(run.conversation);
  const turn = run.conversation.turns[run.number];
  say(turn.error ?? (turn.state === "stopped" ? "Stopped." : `The answer is complete. ${turn.text}`));
  if (run.conversation !== conversation) return;
  const following = nearEnd();
  for (const view of views.values()) view.update(writing !== null);
  showControls();
  follow(following);
}

function stop() {
  writing?.controller.abort();
  writing = null;
}

const nearEnd = () => innerHeight + scrollY > document.documentElement.scrollHeight - NEAR_END;

function follow(wanted) {
  if (wanted) scrollTo({ top: document.documentElement.scrollHeight });
}

// What the user does

function submit() {
  if (!model || writing) return;
  const text = message.value;
  const at = tree.end(conversation);
  if (text.trim()) {
    message.value = "";
    ask(at, text);
  } else if (conversation.kind === "completion" && at !== tree.ROOT) {
    write(tree.add(conversation, at, "assistant", ""));
  }
}

// Adds a user's turn after a turn, and asks for an answer.
function ask(parent, text) {
  const question = tree.add(conversation, parent, "user", text);
  write(tree.add(conversation, question, "assistant", ""));
}

const actions = {
  edit(number, text) {
    if (writing) return;
    ask(conversation.turns[number].parent, text);
    message.focus({ preventScroll: true });
  },
  retry(number) {
    if (writing) return;
    const turn = conversation.turns[number];
    const again = turn.error && !turn.text ? number : tree.add(conversation, turn.parent, "assistant", "");
    write(again);
    message.focus({ preventScroll: true });
  },
  choose(number, by) {
    tree.choose(conversation, number, by);
    show();
    save();
    const versions = tree.children(conversation, conversation.turns[number].parent);
    say(`Version ${versions.indexOf(number) + by + 1} of ${versions.length}`);
  },
  copied() {
    say("Copied.");
  },
};

message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || TOUCH) return;
  event.preventDefault();
  submit();
});
message.addEventListener("input", showControls);
send.addEventListener("click", () => {
  if (writing) stop();
  else submit();
  message.focus({ preventScroll: true });
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && writing && !$("dialog[open]")) stop();
});
$("#composer").addEventListener("submit", (event) => event.preventDefault());
$("#new").addEventListener("click", () => {
  start();
  message.focus();
});
$(".modes").addEventListener("change", (event) => {
  store.saveSettings({ ...store.settings(), [kindSetting()]: event.target.value });
  conversation.kind = event.target.value;
  show();
});

for (const [button, dialog] of [["#open-history", "#history"], ["#open-options", "#options"]]) {
  $(button).addEventListener("click", () => {
    if (dialog === "#history") showHistory();
    $(dialog).showModal();
  });
  $(`${dialog} .close`).addEventListener("click", () => $(dialog).close());
  $(dialog).addEventListener("click", (event) => {
    if (event.target === $(dialog) && (event.offsetX < 0 || event.offsetX > event.target.offsetWidth)) $(dialog).close();
  });
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const view of views.values()) view.strip?.draw();
});

// Options

function fillOptions() {
  const kept = store.settings();
  for (const field of settings.elements) {
    if (!field.name) continue;
    if (field.type === "checkbox") field.checked = kept[field.name] ?? true;
    else field.value = field.name === "key" ? store.key() : (kept[field.name] ?? "");
  }
}

settings.addEventListener("input", ({ target }) => {
  if (target.name === "key") store.setKey(target.value);
  else store.saveSettings({ ...store.settings(), [target.name]: target.type === "checkbox" ? target.checked : target.value });
});
settings.addEventListener("submit", (event) => event.preventDefault());
settings.elements.key.addEventListener("change", () => {
  if (!model) connect();
});
$("#defaults").addEventListener("click", () => {
  store.saveSettings({});
  fillOptions();
});

function askForKey() {
  notice("This server asks for an API key. It was missing or is wrong; write it into the options.");
  if (!$("#options").open) $("#options").showModal();
  settings.elements.key.focus();
}

// Start

async function connect() {
  try {
    model = await api.model(store.key());
  } catch (error) {
    if (error.status === 401) askForKey();
    else notice(`${error.message} Reload the page to try again.`);
    return;
  }
  notice("");
  document.title = `${model.id} · lrt-deploy`;
  $("#model").textContent = model.id;
  if (conversation.turns.length) show();
  else start();
}

addEventListener("pagehide", () => save());
fillOptions();
const kept = store.conversations();
open(kept.find(({ id }) => id === store.shown()) ?? (store.shown() ? null : kept[0]) ?? tree.newConversation("chat", null));
message.focus();
connect();
