// How a turn looks. What a user does with it is passed on to `actions`. All text goes into text nodes, never into HTML.

import { children } from "./tree.js";
import { mean, Strip } from "./strip.js";

const ROLES = {
  chat: { user: "You", assistant: "Model" },
  completion: { user: "Text", assistant: "Continuation" },
};
const BRIEF_SECONDS = 0.25; // an answer that came so fast came in few pieces: its speed is taken from the request on
const template = document.querySelector("#turn");

export class TurnView {
  // `actions`: edit(number, text), retry(number), choose(number, by), copied().
  constructor(conversation, number, actions) {
    this.conversation = conversation;
    this.number = number;
    this.actions = actions;
    this.turn = conversation.turns[number];
    this.element = template.content.cloneNode(true).firstElementChild;
    this.text = document.createTextNode(this.turn.text);
    this.find(".text").append(this.text);
    this.fill();
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  fill() {
    const { turn, number, element } = this;
    element.className = turn.role;
    this.find("h2").textContent = ROLES[this.conversation.kind][turn.role];
    for (const name of ["previous", "next", "edit-turn", "retry", "copy"]) {
      // By the parent, so that the focus stays where it is when another version takes the place of this one.
      this.find(`.${name}`).dataset.focus = `${name}-${turn.parent}`;
    }
    this.find(".previous").onclick = () => this.actions.choose(number, -1);
    this.find(".next").onclick = () => this.actions.choose(number, 1);
    this.find(".edit-turn").onclick = () => this.edit();
    this.find(".retry").onclick = () => this.actions.retry(number);
    this.find(".copy").onclick = () => navigator.clipboard?.writeText(turn.text).then(this.actions.copied);
    this.find(".copy").hidden = !navigator.clipboard;
    if (turn.role === "assistant") {
      this.find(".edit").remove();
      this.find(".edit-turn").remove();
      this.strip = new Strip(this.find("canvas"), (token) => this.show(token));
    } else {
      for (const name of [".latents", ".facts", ".error", ".retry"]) this.find(name).remove();
      this.fillEdit();
    }
  }

  // Shows what changes while an answer comes, and at its end. `busy`: an answer of this page is being written.
  update(busy) {
    const { turn } = this;
    const writing = turn.state === "writing";
    if (this.text.data !== turn.text) {
      if (turn.text.startsWith(this.text.data)) this.text.appendData(turn.text.slice(this.text.length));
      else this.text.data = turn.text;
    }
    this.element.setAttribute("aria-busy", String(writing));
    this.find(".text").hidden = !turn.text && !writing;
    this.find(turn.role === "user" ? ".edit-turn" : ".retry").disabled = busy;
    const versions = children(this.conversation, turn.parent);
    const at = versions.indexOf(this.number);
    this.find(".versions").hidden = versions.length < 2;
    this.find(".count").textContent = `${at + 1}/${versions.length}`;
    this.find(".previous").disabled = at === 0;
    this.find(".next").disabled = at === versions.length - 1;
    if (this.strip) {
      this.find(".error").hidden = !turn.error;
      this.find(".error").textContent = turn.error ?? "";
      this.find(".latents").hidden = !turn.cosines?.length;
      this.strip.set(turn.cosines ?? []);
      this.show(this.strip.chosen);
      this.fillFacts();
    }
  }

  fillFacts() {
    const list = this.find(".facts");
    const found = facts(this.turn);
    list.hidden = !found.length;
    list.replaceChildren(
      ...found.map(([name, value]) => {
        const group = document.createElement("div");
        const [term, description] = [document.createElement("dt"), document.createElement("dd")];
        term.textContent = name;
        description.textContent = value;
        group.append(term, description);
        return group;
      }),
    );
  }

  // Shows a token that was chosen in the strip, in words and in the text; null: the mean of all.
  show(token) {
    const { cosines = [], ends = [], text } = this.turn;
    const average = mean(cosines);
    let words = average === null ? "" : `mean ${average.toFixed(2)}`;
    CSS.highlights?.delete("token");
    if (token !== null && token < cosines.length) {
      // Tokens of one chunk share its text: a character may take several.
      const end = ends[token];
      const start = ends.findLast((other, at) => at < token && other < end) ?? 0;
      const value = cosines[token] === null ? "no latent before" : cosines[token].toFixed(2);
      words = `token ${token + 1}  ${value}  ${JSON.stringify(text.slice(start, end))}`; // the text is cut where room is short
      if (globalThis.Highlight && end > start) {
        const range = new StaticRange({ startContainer: this.text, startOffset: start, endContainer: this.text, endOffset: end });
        CSS.highlights.set("token", new Highlight(range));
      }
    }
    this.find("output").textContent = words;
    const canvas = this.find("canvas");
    canvas.setAttribute("aria-valuenow", String((token ?? cosines.length - 1) + 1));
    canvas.setAttribute("aria-valuetext", words);
  }

  fillEdit() {
    const form = this.find(".edit");
    const field = form.querySelector("textarea");
    field.id = `edit-${this.number}`;
    form.querySelector("label").htmlFor = field.id;
    form.onsubmit = (event) => {
      event.preventDefault();
      if (field.value.trim()) this.actions.edit(this.number, field.value);
    };
    field.onkeydown = (event) => {
      if (event.key === "Escape") this.closeEdit();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) form.requestSubmit();
      else return;
      event.preventDefault();
      event.stopPropagation();
    };
    form.querySelector(".cancel").onclick = () => this.closeEdit();
  }

  edit() {
    const form = this.find(".edit");
    const field = form.querySelector("textarea");
    field.value = this.turn.text;
    form.hidden = false;
    this.find(".text").hidden = this.find(".actions").hidden = true;
    field.focus();
  }

  closeEdit() {
    this.find(".edit").hidden = true;
    this.find(".text").hidden = this.find(".actions").hidden = false;
    this.find(".edit-turn").focus();
  }
}

const number = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits });
const plural = (count, word) => `${number(count, 2)} ${word}${count === 1 ? "" : word.endsWith("s") ? "es" : "s"}`;

// What is known of an answer: pairs of a name and a value.
function facts(turn) {
  const found = [];
  const { usage, seconds, first, state, finish } = turn;
  if (usage?.lrt) {
    const { policy, passes, residual } = usage.lrt;
    const reused = usage.prompt_tokens_details.cached_tokens;
    found.push(["Prompt", plural(usage.prompt_tokens, "token") + (reused ? `, ${number(reused)} reused` : "")]);
    found.push(["Read", policy ? `${policy}, ${plural(passes, "pass")}` : "from memory"]);
    if (residual !== null) found.push(["Residual", residual ? residual.toExponential(1) : "0"]);
  }
  const made = usage?.completion_tokens ?? turn.cosines?.length;
  if (made) {
    const why = state === "stopped" ? ", stopped" : finish === "length" ? ", at the limit" : "";
    found.push(["Answer", plural(made, "token") + why]);
    const speed = seconds > BRIEF_SECONDS ? (made - 1) / seconds : made / (first + seconds);
    if (made > 1) found.push(["Speed", `${number(speed)} tokens/s`]);
  } else if (state === "stopped") {
    found.push(["Answer", "stopped"]);
  }
  if (first !== undefined) found.push(["First token", first < 1 ? `${number(first * 1e3)} ms` : `${number(first, 1)} s`]);
  return found;
}
