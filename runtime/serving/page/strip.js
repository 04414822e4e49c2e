// The strip under an answer: a bar for each token, as high as the cosine of its latent to the one before.
//
// The scale is the same in all strips, LOWEST to 1, with a line at 0. A pointer or the arrow keys choose a token.

const LOWEST = -0.25;
const WIDEST = 7; // pixels of a bar with its gap

export class Strip {
  // `onToken` is called with the number of the chosen token, or null.
  constructor(canvas, onToken) {
    this.canvas = canvas;
    this.onToken = onToken;
    this.values = [];
    this.chosen = null;
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.addEventListener("pointermove", (event) => this.choose(Math.floor(event.offsetX / this.step)));
    canvas.addEventListener("pointerleave", () => this.choose(null));
    canvas.addEventListener("blur", () => this.choose(null));
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  get step() {
    return Math.min(WIDEST, this.canvas.clientWidth / Math.max(1, this.values.length));
  }

  set(values) {
    this.values = values;
    this.canvas.setAttribute("aria-valuemin", "1");
    this.canvas.setAttribute("aria-valuemax", String(values.length));
    this.draw();
  }

  key(event) {
    const last = this.values.length - 1;
    const now = this.chosen ?? last + 1;
    const next = { ArrowLeft: now - 1, ArrowRight: (this.chosen ?? -1) + 1, Home: 0, End: last, PageUp: now - 10, PageDown: now + 10 };
    if (!(event.key in next)) return;
    event.preventDefault();
    this.choose(Math.max(0, Math.min(last, next[event.key])));
  }

  choose(token) {
    const found = token !== null && token < this.values.length ? token : null;
    if (found === this.chosen) return;
    this.chosen = found;
    this.onToken(found);
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width) return;
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    const style = getComputedStyle(this.canvas);
    const color = (name) => style.getPropertyValue(name).trim();
    const y = (value) => (height - 1) * (1 - (Math.max(LOWEST, value) - LOWEST) / (1 - LOWEST));
    context.fillStyle = color("--line");
    context.fillRect(0, Math.round(y(0)), width, 1);
    const step = this.step;
    const bar = Math.max(1, step - (step > 3 ? 2 : 0));
    this.values.forEach((value, token) => {
      if (value === null) return;
      const low = value < 0;
      context.globalAlpha = this.chosen === null || this.chosen === token ? 1 : 0.5;
      context.fillStyle = color(low ? "--bar-low" : "--bar");
      context.beginPath();
      const length = Math.max(1, Math.abs(y(value) - y(0)));
      const corner = Math.min(bar / 2, 2);
      context.roundRect(token * step, low ? y(0) + 1 : y(0) - length, bar, length, low ? [0, 0, corner, corner] : [corner, corner, 0, 0]);
      context.fill();
    });
  }
}

export function mean(values) {
  const found = values.filter((value) => value !== null);
  return found.length ? found.reduce((sum, value) => sum + value, 0) / found.length : null;
}
