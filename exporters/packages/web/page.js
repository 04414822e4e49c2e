// The page: what a person writes goes to the worker, what the worker says is shown. Text is always text, never markup.

const $ = (id) => document.getElementById(id);
const form = $("composer");

// A worker that is started from a blob has this page's content security policy; one from a file would have none.
const script = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
const worker = new Worker(URL.createObjectURL(new Blob([script], { type: "text/javascript" })), { type: "module" });
let answer; // the element that is being written

const shown = {
  loading: ({ name, done, total }) => say(`Loading ${name}: ${Math.round((100 * done) / total)}%`),
  ready({ precision, capacity, memory, chat }) {
    document.body.dataset.state = "ready";
    $("facts").textContent = `${precision}, ${capacity} tokens, ${memory ? "with" : "without"} latent state`;
    $("chat-field").hidden = !chat;
    say("Everything is loaded; nothing leaves this page.");
    $("text").focus();
  },
  reading: ({ done, total }) => say(`Reading the prompt: ${done} of ${total} tokens`),
  prompt({ tokens, held, policy, passes, residual, fallback, ms }) {
    const exact = policy === "stepwise" ? "exact" : `${passes.toFixed(1)} passes, residual ${residual.toExponential(1)}`;
    const how = fallback ? `${exact}; ${fallback}, the rest was read stepwise` : exact;
    addFacts(`${tokens.length} tokens read ${policy} in ${Math.round(ms)} ms (${how}); ${held} in the state`);
    say("Writing");
  },
  answer({ text }) {
    answer.textContent = text;
  },
  end({ reason, tokens, text, msPerToken }) {
    answer.textContent = text;
    addFacts(`${tokens.length} tokens, ${msPerToken.toFixed(1)} ms each, ended: ${reason}`);
    document.body.dataset.state = "ready";
    say("");
  },
  error({ message }) {
    if (document.body.dataset.state !== "loading") document.body.dataset.state = "ready";
    say(`Error: ${message}`);
  },
};

worker.onmessage = ({ data }) => shown[data.type](data);
worker.onerror = (event) => say(`Error: the worker does not start: ${event.message ?? "see the console"}`);
worker.postMessage({ type: "open" });

form.onsubmit = (event) => {
  event.preventDefault();
  if (document.body.dataset.state !== "ready") return;
  document.body.dataset.state = "writing";
  const text = $("text").value;
  add("said", text);
  answer = add("answer", "");
  $("text").value = "";
  const number = (id) => Number($(id).value);
  worker.postMessage({
    type: "generate",
    text,
    chat: $("chat").checked,
    policy: $("policy").value,
    tolerance: number("tolerance"),
    temperature: number("temperature"),
    count: number("count"),
  });
};
$("stop").onclick = () => worker.postMessage({ type: "stop" });
$("new").onclick = () => {
  worker.postMessage({ type: "restart" });
  $("turns").replaceChildren();
  say("A new conversation");
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
};

function add(kind, text) {
  const element = document.createElement("p");
  element.className = kind;
  element.textContent = text;
  $("turns").append(element);
  element.scrollIntoView({ block: "nearest" });
  return element;
}

function addFacts(text) {
  const element = add("facts", text);
  if (answer && !answer.textContent) answer.before(element);
}

function say(text) {
  $("notice").textContent = text;
}
