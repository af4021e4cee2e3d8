// The WebSocket: docs/serve.md describes its messages.

const VERSION = 1, HEADER = 12, FRAME = 1, PICTURE = 2, SAME = 3;
const WINDOW = 2;          // frames without an answer: one is drawn, one waits
const EARLY = 10;          // milliseconds that a frame should wait for its turn: a longer wait only adds latency
const PATIENCE = 4000;     // milliseconds after which an answer is no longer waited for
const PACE = 60;           // milliseconds between two messages with controls
const ENDED = {            // close codes after which the page does not reconnect by itself
  1000: "The session has ended",
  4000: "This page is older than the server: load it again",
  4001: "The server does not take these controls",
  4002: "The session ended, as nothing was sent for a while",
  4003: "The stream failed",
};

export class Connection extends EventTarget {
  // controls: a function that returns the controls to begin with.
  constructor(url, controls) {
    super();
    Object.assign(this, { url, controls, live: false, tries: 0, pending: {}, timer: null });
  }

  open() {
    clearTimeout(this.again);
    this.said = "";
    this.sent = new Map();           // sequence number to the time of capture
    [this.next, this.answered, this.lastSent] = [0, -1, 0];
    [this.pace, this.due] = [0, 0];  // milliseconds from an answer to the next frame, and the time of that frame
    this.show("connecting", this.tries ? "Connecting again" : "Connecting");
    const socket = this.socket = new WebSocket(this.url);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => this.say("hello", { controls: this.controls() });
    socket.onmessage = (event) => {
      if (typeof event.data === "string") this.onText(JSON.parse(event.data));
      else this.onBinary(event.data);
    };
    socket.onclose = (event) => { if (socket === this.socket) this.onClose(event); };
  }

  show(state, text) { this.tell("status", { state, text }); }
  tell(name, detail) { this.dispatchEvent(new CustomEvent(name, { detail })); }
  say(type, fields) { this.socket.send(JSON.stringify({ v: VERSION, type, ...fields })); }

  onText(message) {
    if (message.type === "waiting") this.show("waiting", `Waiting in line, at position ${message.position}`);
    else if (message.type === "compiling") this.show("compiling", "Compiling for the new settings; the old ones stay in use until then");
    else if (message.type === "bye") this.said = message.reason;
    else if (message.type === "error") {
      if (message.sequence !== undefined) this.settle(message.sequence);
      this.tell("wrong", message.message);
    } else {
      if (message.type === "welcome") [this.live, this.tries] = [true, 0];
      if (message.type === "welcome" || message.type === "controls") this.show("streaming", "Streaming");
      this.tell(message.type, message);
    }
  }

  onBinary(data) {
    const view = new DataView(data);
    const [kind, waited] = [view.getUint8(1), view.getUint16(2)];
    const [sequence, shows] = [view.getUint32(4), view.getUint32(8)];
    const captured = this.sent.get(shows) ?? null;
    this.pace = Math.max(this.pace + (waited - EARLY) / (waited < EARLY ? 2 : 5), 0);
    this.settle(sequence);
    if (kind === SAME) {             // it answers this frame and all before it
      this.sent.clear();
      this.tell("same", {});
    }
    this.sent.delete(shows);         // shown again later, this frame gives no latency
    if (kind === PICTURE) this.tell("picture", { blob: new Blob([data.slice(HEADER)]), captured });
  }

  // An answer to one frame says that those before it are answered or dropped. Their times are kept for a while, as the
  // pictures in the stream batch will show some of them.
  settle(sequence) {
    this.answered = sequence;
    for (const old of this.sent.keys()) if (old < sequence - 16) this.sent.delete(old);
    this.due = performance.now() + this.pace;
    setTimeout(() => this.tell("room", {}), this.pace);
  }

  onClose(event) {
    this.live = false;
    clearTimeout(this.timer);
    this.timer = null;
    const reason = this.said || event.reason;
    if (event.code in ENDED) this.show("ended", reason ? `${ENDED[event.code]}: ${reason}` : ENDED[event.code]);
    else {
      const wait = Math.min(1000 * 2 ** this.tries++, 15000);
      const why = event.code === 1013 ? "The server is full" : reason ? `Not connected: ${reason}` : "Not connected";
      this.show("error", `${why}; trying again in ${wait / 1000} s`);
      this.again = setTimeout(() => this.open(), wait);
    }
  }

  // Changes of controls are collected, and sent a few times a second.
  set(changes) {
    Object.assign(this.pending, changes);
    if (!this.live || this.timer !== null) return;
    const flush = () => {
      this.timer = null;
      if (!this.live || !Object.keys(this.pending).length) return;
      this.say("set", { controls: this.pending });
      this.pending = {};
      this.timer = setTimeout(flush, PACE);
    };
    flush();
  }

  get room() {
    if (!this.live) return false;
    const [now, open] = [performance.now(), this.next - 1 - this.answered];
    if (now - this.lastSent > PATIENCE || open === 0) return true;
    return open < WINDOW && now >= this.due - 1;
  }

  send(blob, captured) {
    if (!this.live) return;
    const head = new DataView(new ArrayBuffer(HEADER));
    head.setUint8(0, VERSION);
    head.setUint8(1, FRAME);
    head.setUint32(4, this.next);
    this.sent.set(this.next++, captured);
    this.lastSent = performance.now();
    this.socket.send(new Blob([head, blob]));
  }
}
