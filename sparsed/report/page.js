"use strict";

const PHASES = {
  full: "full attention",
  selecting: "full attention, selection",
  sparse: "sparse attention",
  answer: "the answer's rows, cached prompt",
  cached: "a block's rows, cached keys",
};

/** Replays the denoising: the slider's step decides which tokens stand in each panel. */
function replay(runs) {
  const slider = document.getElementById("step");
  const number = document.getElementById("step-number");
  const play = document.getElementById("play");
  const panels = [...document.querySelectorAll(".tokens")].map((panel, index) => new Panel(panel, runs[index]));
  const steps = Number(slider.max);
  let timer = null;

  function show() {
    const step = Number(slider.value);
    number.textContent = step ? `step ${step} of ${steps}` : "before the first step";
    slider.setAttribute("aria-valuetext", number.textContent);
    panels.forEach((panel) => panel.show(step));
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  function advance() {
    slider.value = Number(slider.value) + 1;
    show();
    if (Number(slider.value) >= steps) stop();
  }

  slider.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (Number(slider.value) >= steps) slider.value = 0;
    show();
    play.textContent = "Pause";
    timer = setInterval(advance, Math.min(400, Math.max(40, 8000 / steps)));
  });
  show();
}

/** The tokens of one run. */
class Panel {
  constructor(element, run) {
    this.run = run;
    this.state = element.parentElement.querySelector(".state");
    this.tokens = run.pieces.map(() => element.appendChild(document.createElement("span")));
    this.committed = [];
    run.history.forEach((commits, step) => {
      for (const [position, , probability] of commits) this.committed[position] = { step: step + 1, probability };
    });
  }

  show(step) {
    let count = 0;
    this.tokens.forEach((token, position) => {
      const { step: at, probability } = this.committed[position];
      const there = at <= step;
      count += there;
      token.textContent = there ? this.text(position) : "▒";
      token.className = there ? this.classes(position, at === step, probability) : "token mask";
      token.title = there ? describe(this.run.pieces[position], position, at, probability) : "";
    });
    const seconds = this.run.seconds.slice(0, step).reduce((sum, value) => sum + value, 0);
    this.state.textContent = `${this.phase(step)}; ${count} of ${this.tokens.length} tokens, ${seconds.toFixed(2)} s`;
  }

  /** A token as the answer shows it; end tokens, of which there can be many, as a small mark. */
  text(position) {
    const piece = this.run.pieces[position];
    return position >= this.run.answer_tokens && /^<\|.*\|>$/.test(piece) ? "∎" : piece;
  }

  classes(position, isNew, probability) {
    const after = position >= this.run.answer_tokens ? " after" : "";
    return `token ${shade(probability)}${after}${isNew ? " new" : ""}`;
  }

  /** A run of fewer steps than the other has ended before the slider has. */
  phase(step) {
    return step ? PHASES[this.run.phases[step - 1]] ?? "at its end" : "all masked";
  }
}

function shade(probability) {
  if (probability === null) return "";
  return `c${1 + [0.5, 0.7, 0.9, 0.99].filter((bound) => probability >= bound).length}`;
}

function describe(piece, position, step, probability) {
  const sure = probability === null ? "" : `, probability ${probability.toFixed(3)}`;
  return `token ${position + 1}, ${JSON.stringify(piece)}: step ${step}${sure}`;
}

/** Draws the kept blocks of the head that the pickers name, and of all heads of its layer. */
function pattern(kept) {
  const layer = document.getElementById("layer");
  const head = document.getElementById("head");
  const canvas = document.getElementById("pattern");
  const note = document.getElementById("kept");
  const cells = Uint8Array.from(atob(kept.cells), (character) => character.charCodeAt(0));
  const { rows, columns, heads } = kept;
  const scale = Math.max(1, Math.round(640 / Math.max(rows, columns)));
  const border = kept.border * columns;
  const buttons = Array.from({ length: heads }, (_, index) => headButton(index));

  function isKept(headIndex, row, column) {
    const bit = ((Number(layer.value) * heads + headIndex) * rows + row) * columns + column;
    return (cells[bit >> 3] >> (7 - (bit & 7))) & 1;
  }

  /** Paints one head with `size` pixels a cell; returns how many cells are kept. */
  function paint(target, headIndex, size) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    target.width = columns * size;
    target.height = rows * size;
    const context = target.getContext("2d");
    context.fillStyle = colour("--off");
    context.fillRect(0, 0, target.width, target.height);
    const gap = size >= 8 ? 1 : 0;
    let count = 0;
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        if (!isKept(headIndex, row, column)) continue;
        count++;
        context.fillStyle = colour(column + 0.5 < border ? "--accent" : "--deep");
        context.fillRect(column * size, row * size, size - gap, size - gap);
      }
    }
    if (size > 1) drawBorder(context, colour("--ink"), target.width, target.height);
    return count;
  }

  /** Lines between the prompt and the generated region. */
  function drawBorder(context, colour, width, height) {
    context.fillStyle = colour;
    context.fillRect(Math.min(kept.border * width, width - 2) - 1, 0, 2, height);
    context.fillRect(0, Math.min(kept.border * height, height - 2) - 1, width, 2);
  }

  function headButton(index) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(document.createElement("canvas"), `head ${index}`);
    button.addEventListener("click", () => { head.value = index; show(); });
    return document.querySelector(".heads").appendChild(button);
  }

  function show() {
    const chosen = Number(head.value);
    const share = (100 * paint(canvas, chosen, scale)) / (rows * columns);
    note.textContent = `${share.toFixed(1)} % of the cells kept`;
    canvas.setAttribute("aria-label", `Kept blocks of layer ${layer.value}, head ${chosen}: ${note.textContent}`);
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", index === chosen));
  }

  function showLayer() {
    buttons.forEach((button, index) => paint(button.firstChild, index, 1));
    show();
  }

  layer.addEventListener("change", showLayer);
  head.addEventListener("change", show);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showLayer);
  showLayer();
}

const data = JSON.parse(document.getElementById("data").textContent);
if (data.replay) replay(data.replay);
if (data.pattern) pattern(data.pattern);
