// The controls: every element with data-control is the server's control of that name. Prompts and filter are extra cases.

const $ = (id) => document.getElementById(id);
const MOST_PROMPTS = 8;
const AFTER = 150;           // milliseconds after the last key after which a text is sent
const DECIMALS = { strength: 2, feedback: 2, scale: 1, delta: 2, similarity: 3, motion: 2 };

export class Panel {
  // changed: called with {name: value} whenever the user changes something.
  constructor(changed) {
    this.changed = changed;
    this.values = {};        // all that was changed on this page: a new connection begins with it
    this.fields = [...document.querySelectorAll("[data-control]")];
    for (const field of this.fields) {
      const act = () => this.put({ [field.dataset.control]: this.read(field) });
      const texts = field.type === "text";
      let timer = null;
      field.addEventListener("input", () => {
        this.mark(field);
        clearTimeout(timer);
        if (texts) timer = setTimeout(act, AFTER);
        else if (field.type !== "number" || field.validity.valid && field.value !== "") act();
      });
    }
    $("panel").addEventListener("submit", (event) => event.preventDefault());
    $("filter").addEventListener("change", () => this.put({ similarity: this.read(this.field("similarity")) }));
    $("dice").addEventListener("click", () => {
      this.field("seed").value = Math.floor(Math.random() * 100000);
      this.put({ seed: this.read(this.field("seed")) });
    });
    $("add-prompt").addEventListener("click", () => { this.addPrompt("", 0.5).querySelector(".text").focus(); this.countPrompts(); });
  }

  field(name) { return this.fields.find((field) => field.dataset.control === name); }

  read(field) {
    if (field.dataset.control === "similarity" && !$("filter").checked) return null;
    if (field.type === "checkbox") return field.checked;
    if (field.type === "range" || field.type === "number") return field.valueAsNumber;
    return field.value;
  }

  put(changes) {
    Object.assign(this.values, changes);
    this.enable();
    this.changed(changes);
  }

  // Show the server's values, at a welcome. embeds: the network takes the guidance scale as an input.
  show(controls, embeds, steps) {
    this.field("steps").max = steps;
    this.embeds = embeds;
    for (const field of this.fields) {
      const value = controls[field.dataset.control];
      if (field.dataset.control === "similarity") {
        $("filter").checked = value !== null;
        if (value !== null) field.value = value;
      } else if (field.dataset.control === "seed") field.value = value[0][0];
      else if (field.type === "checkbox") field.checked = value;
      else field.value = value;
      this.mark(field);
    }
    if (!document.querySelector(".prompt")) {
      for (const [text, weight] of controls.prompt) this.addPrompt(text, Math.min(weight, 1));
      this.countPrompts();
    }
    this.enable();
  }

  // Update a slider's number and its filled part.
  mark(field) {
    if (field.type !== "range") return;
    const name = field.dataset.control;
    const output = field.parentElement.querySelector(".value");
    if (output) output.textContent = field.valueAsNumber.toFixed(DECIMALS[name] ?? (name ? 0 : 2));
    field.style.setProperty("--part", (field.value - field.min) / (field.max - field.min));
  }

  // Disable the controls that have no effect with the present kind of guidance.
  enable() {
    const kind = this.field("guidance").value;
    const can = {
      residual: kind !== "none",
      negative: kind === "full" || kind === "onetime",
      filter: $("filter").checked,
    };
    for (const label of document.querySelectorAll("[data-for]")) {
      label.querySelector("[data-control]").disabled = !can[label.dataset.for];
    }
    this.field("scale").disabled = kind === "none" && !this.embeds;
  }

  // --- prompts

  addPrompt(text, weight) {
    const row = $("prompt-row").content.firstElementChild.cloneNode(true);
    const [words, slider] = [row.querySelector(".text"), row.querySelector("[type=range]")];
    [words.value, slider.value] = [text, weight];
    let timer = null;
    words.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.prompts(), AFTER);
    });
    slider.addEventListener("input", () => { this.mark(slider); this.prompts(); });
    row.querySelector(".remove").addEventListener("click", () => {
      row.remove();
      this.countPrompts();
      this.prompts();
      $("add-prompt").focus();
    });
    $("prompt-rows").append(row);
    this.mark(slider);
    return row;
  }

  countPrompts() {
    const rows = [...document.querySelectorAll(".prompt")];
    $("prompt-rows").classList.toggle("several", rows.length > 1);
    $("add-prompt").hidden = rows.length >= MOST_PROMPTS;
    rows.forEach((row, i) => {
      row.querySelector(".text").setAttribute("aria-label", rows.length > 1 ? `Prompt ${i + 1}` : "Prompt");
      row.querySelector(".text").placeholder = i ? "and what else?" : "What should it become?";
    });
  }

  prompts() {
    const rows = [...document.querySelectorAll(".prompt")];
    const pairs = rows.map((row) => [row.querySelector(".text").value, rows.length > 1 ? row.querySelector("[type=range]").valueAsNumber : 1]);
    const some = pairs.some(([, weight]) => weight > 0);
    $("prompt-hint").textContent = some ? "" : "Give at least one prompt a weight above 0";
    if (some) this.put({ prompt: pairs });
  }
}
