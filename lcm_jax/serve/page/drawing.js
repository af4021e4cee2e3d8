// A canvas to paint on with mouse, pen or finger.

export const COLOURS = {   // OpenMoji's palette
  black: "#000000", white: "#ffffff", grey: "#9b9b9a", yellow: "#fcea2b", orange: "#f1b31c", peach: "#fadcbc",
  brown: "#a57939", "dark brown": "#6a462f", pink: "#ffa7c0", red: "#ea5a47", "dark red": "#d22f27",
  purple: "#b399c8", "light blue": "#92d3f5", blue: "#61b2e4", green: "#b1cc33", "dark green": "#5c9e31",
};
const REMEMBERED = 20;     // strokes that can be undone

export class Drawing {
  constructor(canvas) {
    this.canvas = canvas;
    this.layer = document.createElement("canvas");
    this.context = this.layer.getContext("2d", { willReadFrequently: true });
    Object.assign(this, { colour: COLOURS.yellow, width: 28, erasing: false, past: [], active: false, last: null, dirty: true });
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { this.last = null; });
  }

  resize(width, height) {
    if (this.layer.width === width && this.layer.height === height) return;
    [this.layer.width, this.layer.height, this.past] = [width, height, []];
    this.fill();
    this.sketch();
  }

  fill() {
    this.dirty = true;
    this.context.fillStyle = "#ffffff";
    this.context.fillRect(0, 0, this.layer.width, this.layer.height);
  }

  // A drawing to begin with: a cat of a few strokes.
  sketch() {
    const { context: c, layer: { width: w, height: h } } = this;
    const s = Math.min(w, h) / 512;
    c.setTransform(s, 0, 0, s, w / 2 - 256 * s, h / 2 - 256 * s);
    Object.assign(c, { lineWidth: 12, lineJoin: "round", lineCap: "round", strokeStyle: COLOURS.black });
    const shape = (fill, path) => {
      c.beginPath();
      path();
      if (fill) [c.fillStyle = fill, c.fill()];
      c.stroke();
    };
    for (const side of [-1, 1]) {
      shape(COLOURS.yellow, () => {
        for (const [x, y] of [[160, 220], [165, 60], [50, 145]]) c.lineTo(256 + side * x, y);
        c.closePath();
      });
    }
    shape(COLOURS.yellow, () => c.ellipse(256, 285, 179, 164, 0, 0, 2 * Math.PI));
    for (const side of [-1, 1]) {
      shape(COLOURS.black, () => c.ellipse(256 + side * 61, 262, 10, 14, 0, 0, 2 * Math.PI));
      for (const slope of [0, 45]) {
        shape(null, () => {
          c.moveTo(256 + side * 120, 310 + 0.8 * slope);
          c.lineTo(256 + side * 215, 295 + 1.5 * slope);
        });
      }
    }
    c.lineWidth = 8;
    shape(COLOURS.black, () => {
      for (const [x, y] of [[238, 312], [274, 312], [256, 330]]) c.lineTo(x, y);
      c.closePath();
    });
    for (const side of [-1, 1]) shape(null, () => c.ellipse(256 + side * 28, 338, 28, 26, 0, 0, Math.PI));
    c.resetTransform();
  }

  // Whether the drawing has changed since the last call.
  changed() {
    const was = this.dirty;
    this.dirty = false;
    return was;
  }

  clear() {
    this.remember();
    this.fill();
  }

  remember() {
    this.past.push(this.context.getImageData(0, 0, this.layer.width, this.layer.height));
    if (this.past.length > REMEMBERED) this.past.shift();
  }

  undo() {
    const before = this.past.pop();
    this.dirty = true;
    if (before) this.context.putImageData(before, 0, 0);
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.layer.width,
      ((event.clientY - box.top) / box.height) * this.layer.height,
    ];
  }

  begin(event) {
    if (!this.active || event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.remember();
    this.last = this.at(event);
    this.line(this.last, this.last);
  }

  move(event) {
    if (!this.last) return;
    for (const step of event.getCoalescedEvents?.() ?? [event]) {
      const point = this.at(step);
      this.line(this.last, point);
      this.last = point;
    }
  }

  line(from, to) {
    this.dirty = true;
    const c = this.context;
    c.strokeStyle = this.erasing ? "#ffffff" : this.colour;
    c.lineWidth = this.width * (this.layer.width / 512);
    c.lineCap = "round";
    c.beginPath();
    c.moveTo(...from);
    c.lineTo(...to);
    c.stroke();
  }

  paint(context, width, height) { context.drawImage(this.layer, 0, 0, width, height); }
}
