// The page: it connects sources, controls, connection and canvases, and decides when a frame is sent.

import { Connection } from "./connection.js";
import { COLOURS, Drawing } from "./drawing.js";
import { Panel } from "./panel.js";
import { Picture, Video, camera, screen } from "./sources.js";

const $ = (id) => document.getElementById(id);
const SIDE = 512;            // least pixels of the larger side of both canvases
const RATE = 30;             // most frames a second that are sent
const LOSSLESS = 256 * 256;  // pixels up to which frames are sent as PNG

const address = new URL("ws" + location.search, location.href);
address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
const panel = new Panel((changes) => connection.set(changes));
const connection = new Connection(address, () => panel.values);
const [source, output] = [$("source"), $("output")];
const frame = document.createElement("canvas");  // the frame that is sent, in the model's size

// --- sources of frames

const drawing = new Drawing(source);
const back = () => choose("draw");
const sources = {
  draw: drawing,
  camera: new Video(camera, back),
  screen: new Video(screen, back),
  picture: new Picture(),
};
let current = "draw";
let chosen = 0;

async function choose(name) {
  const turn = ++chosen;
  sources[current].stop?.();
  current = name;
  document.querySelector(`[name=source][value=${name}]`).checked = true;
  $("drawing-tools").hidden = name !== "draw";
  $("picture-tools").hidden = name !== "picture";
  $("camera-tools").hidden = name !== "camera";
  drawing.active = name === "draw";
  repaint = true;
  source.classList.toggle("paper", drawing.active);
  try {
    await sources[name].start?.();
    if (turn !== chosen) sources[name].stop?.();
  } catch (error) {
    if (turn !== chosen) return;
    wrong(`The ${name} cannot be used: ${error.message}`);
    if (name !== "draw") choose("draw");
  }
}

for (const radio of document.querySelectorAll("[name=source]")) {
  radio.addEventListener("change", () => choose(radio.value));
}
$("mirror").addEventListener("change", () => { sources.camera.mirrored = $("mirror").checked; });
sources.camera.mirrored = true;

async function open(file) {
  if (!file) return;
  try {
    await sources.picture.open(file);
    if (current !== "picture") choose("picture");
  } catch (error) {
    wrong(error.message);
  }
}
$("file").addEventListener("change", () => open($("file").files[0]));
for (const name of ["dragover", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    if (name === "drop") open(event.dataTransfer.files[0]);
  });
}

// --- the brush

for (const [name, colour] of Object.entries(COLOURS)) {
  const label = document.createElement("label");
  const radio = Object.assign(document.createElement("input"), { type: "radio", name: "colour", value: colour });
  radio.setAttribute("aria-label", name);
  radio.checked = colour === drawing.colour;
  label.title = name;
  label.style.setProperty("--colour", colour);
  label.append(radio);
  radio.addEventListener("change", () => { drawing.colour = colour; erase(false); });
  label.addEventListener("click", () => erase(false));
  $("swatches").append(label);
}
function erase(on) {
  drawing.erasing = on;
  $("erase").setAttribute("aria-pressed", on);
}
$("erase").addEventListener("click", () => erase(!drawing.erasing));
$("undo").addEventListener("click", () => drawing.undo());
$("clear").addEventListener("click", () => drawing.clear());
$("brush").addEventListener("input", () => {
  drawing.width = $("brush").valueAsNumber;
  panel.mark($("brush"));
});
panel.mark($("brush"));
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches?.("input.text");
  if (drawing.active && !typing && (event.ctrlKey || event.metaKey) && event.key === "z") {
    event.preventDefault();
    drawing.undo();
  }
});

// --- sending

let [paused, sending, last] = [false, false, 0];
let [version, still] = [0, null];   // how often the source was painted; its encoded frame, null if it has changed since

// By halves, so that every pixel counts: browsers skip pixels when they scale down further at once.
const halves = [document.createElement("canvas"), document.createElement("canvas")];
function shrink(from, to) {
  let turn = 0;
  while (from.width >= 2 * to.width && from.width % 2 === 0 && from.height % 2 === 0) {
    const half = from.width === 2 * to.width ? to : halves[turn++ % 2];
    if (half !== to) [half.width, half.height] = [from.width / 2, from.height / 2];
    half.getContext("2d").drawImage(from, 0, 0, half.width, half.height);
    from = half;
  }
  if (from !== to) to.getContext("2d").drawImage(from, 0, 0, to.width, to.height);
}

async function pump() {
  if (sending || paused || !connection.room) return;
  const now = performance.now();
  if (now - last < 1000 / RATE - 2) return;
  last = now;
  if (still === null) {
    const painted = version;
    sending = true;
    shrink(source, frame);
    const kind = frame.width * frame.height <= LOSSLESS ? "image/png" : "image/jpeg";
    still = await new Promise((done) => frame.toBlob(done, kind, 0.92));
    sending = false;
    if (still && !paused) connection.send(still, now);
    if (painted !== version) still = null;
  } else connection.send(still, now);
}

let [repaint, painted] = [true, 0];
function paint() {
  const now = performance.now();
  // A live source is painted only when its frame can be sent: so the page shows the frame that a picture was made of,
  // and a machine that runs the server too spends no time on other frames.
  const idle = sources[current].live && connection.live && !paused && !connection.room;
  if (!idle && now - painted >= 1000 / RATE - 4 && (sources[current].changed() || repaint)) {
    [repaint, painted, still] = [false, now, null];
    version++;
    sources[current].paint(source.getContext("2d"), source.width, source.height);
  }
  pump();
}
const animate = () => { paint(); requestAnimationFrame(animate); };
// A hidden page (another window is shared) gets no animation frames: there the answers trigger the next paint.
connection.addEventListener("room", () => { if (document.hidden) setTimeout(paint, 1000 / RATE); else paint(); });

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", paused);
  $("pause").textContent = paused ? "Go on" : "Pause";
});

// --- answers

const answers = [];
const latencies = [];
let [shown, picture] = [Promise.resolve(), null];

function draw() {
  if (!picture) return;
  const context = output.getContext("2d");
  context.imageSmoothingEnabled = $("smooth").checked;
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, output.width, output.height);
}
$("smooth").addEventListener("change", draw);

connection.addEventListener("picture", ({ detail: { blob, captured } }) => {
  answers.push(performance.now());
  shown = shown.then(async () => {   // in order, even if one takes longer to decode
    picture = await createImageBitmap(blob);
    draw();
    if (captured !== null) latencies.push(performance.now() - captured);
    if (latencies.length > 30) latencies.shift();
  });
});
connection.addEventListener("same", () => answers.push(performance.now()));

setInterval(() => {
  const now = performance.now();
  while (answers.length && answers[0] < now - 2000) answers.shift();
  $("fps").textContent = connection.live && !paused ? (answers.length / 2).toFixed(answers.length < 20 ? 1 : 0) : "–";
  const middle = [...latencies].sort((a, b) => a - b)[Math.floor(latencies.length / 2)];
  $("latency").textContent = middle === undefined ? "–" : `${Math.round(middle)} ms`;
}, 500);

connection.addEventListener("stats", ({ detail }) => {
  const { p50, p95, p99 } = detail.latency_ms;
  $("skipped").textContent = `${Math.round(100 * detail.skipped)} %`;
  $("dropped").textContent = detail.dropped;
  if (p50 !== null) $("latency").title = `In the server: half under ${p50} ms, 95 % under ${p95} ms, 99 % under ${p99} ms`;
});

// --- status

connection.addEventListener("status", ({ detail: { state, text } }) => {
  $("status").dataset.state = state;
  $("status-text").textContent = text;
  $("resume").hidden = state !== "ended";
});
let fading = null;
function wrong(text) {
  $("status").dataset.wrong = "";
  $("status-text").textContent = text;
  clearTimeout(fading);
  fading = setTimeout(() => {
    delete $("status").dataset.wrong;
    if (connection.live) $("status-text").textContent = "Streaming";
  }, 6000);
}
connection.addEventListener("wrong", ({ detail }) => wrong(detail));
$("resume").addEventListener("click", () => connection.open());

connection.addEventListener("welcome", ({ detail }) => {
  const [height, width] = detail.size;
  $("model").textContent = detail.model;
  panel.show(detail.controls, detail.embeds_guidance, detail.limits.steps);
  const factor = 2 ** Math.max(Math.ceil(Math.log2(SIDE / Math.max(height, width))), 0);
  [frame.width, frame.height] = [width, height];
  for (const canvas of [source, output]) {
    if (canvas.width === width * factor && canvas.height === height * factor) continue;
    [canvas.width, canvas.height] = [width * factor, height * factor];
    canvas.style.aspectRatio = `${width} / ${height}`;
  }
  drawing.resize(source.width, source.height);
  [repaint, still] = [true, null];
  latencies.length = 0;
  draw();
});

// --- saving and recording

function keep(blob, ending) {
  const name = new Date().toISOString().slice(0, 19).replaceAll(":", "-");
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: `lcm-jax ${name}.${ending}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
$("save").addEventListener("click", () => output.toBlob((blob) => keep(blob, "png")));

let recorder = null;
$("record").addEventListener("click", () => {
  if (recorder) return recorder.stop();
  const type = ["video/mp4;codecs=avc1", "video/webm;codecs=vp9", "video/webm"].find((name) => globalThis.MediaRecorder?.isTypeSupported(name));
  if (!type) return wrong("This browser cannot record video");
  const [parts, began] = [[], Date.now()];
  recorder = new MediaRecorder(output.captureStream(RATE), { mimeType: type, videoBitsPerSecond: 6e6 });
  const clock = setInterval(() => {
    const seconds = Math.floor((Date.now() - began) / 1000);
    $("record-text").textContent = `Stop at ${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  }, 250);
  recorder.ondataavailable = (event) => parts.push(event.data);
  recorder.onstop = () => {
    clearInterval(clock);
    keep(new Blob(parts, { type }), type.includes("mp4") ? "mp4" : "webm");
    $("record-text").textContent = "Record";
    $("record").setAttribute("aria-pressed", "false");
    recorder = null;
  };
  recorder.start(1000);
  $("record").setAttribute("aria-pressed", "true");
});

drawing.resize(SIDE, SIDE);
choose("draw");
animate();
connection.open();
