// Camera, screen and picture file: each paints itself onto a canvas, which its middle part fills.

function cover(context, image, imageWidth, imageHeight, width, height, mirrored) {
  if (!imageWidth || !imageHeight) return;
  const scale = Math.max(width / imageWidth, height / imageHeight);
  const [w, h] = [imageWidth * scale, imageHeight * scale];
  context.save();
  if (mirrored) {
    context.translate(width, 0);
    context.scale(-1, 1);
  }
  context.imageSmoothingQuality = scale < 0.5 ? "high" : "medium";  // high is slow, and visible only when much is scaled away
  context.drawImage(image, (width - w) / 2, (height - h) / 2, w, h);
  context.restore();
}

export class Video {
  // get: returns a promise of a stream. ended: called when the user or the system stops the stream.
  constructor(get, ended) {
    Object.assign(this, { get, ended, mirrored: false, live: true });  // live: it changes by itself
    this.video = Object.assign(document.createElement("video"), { muted: true, playsInline: true });
  }

  async start() {
    this.stream = await this.get();
    for (const track of this.stream.getVideoTracks()) track.addEventListener("ended", this.ended);
    this.video.srcObject = this.stream;
    await this.video.play();
  }

  changed() {
    const was = this.time;
    this.time = this.video.currentTime;
    return was !== this.time;
  }

  stop() {
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.video.srcObject = null;
  }

  paint(context, width, height) {
    cover(context, this.video, this.video.videoWidth, this.video.videoHeight, width, height, this.mirrored);
  }
}

export const camera = () => {
  if (!navigator.mediaDevices) throw new Error("browsers allow the camera only on https:// and localhost");
  return navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 640 }, height: { ideal: 640 }, frameRate: { ideal: 30 } } });
};

export const screen = () => {
  if (!navigator.mediaDevices?.getDisplayMedia) throw new Error("this browser cannot share a screen with this page");
  return navigator.mediaDevices.getDisplayMedia({ video: { frameRate: { ideal: 30 } } });
};

export class Picture {
  async open(file) {
    try {
      this.image = await createImageBitmap(file);
      this.dirty = true;
    } catch {
      throw new Error(`${file.name} is no picture that this browser can read`);
    }
  }

  changed() {
    const was = this.dirty;
    this.dirty = false;
    return was;
  }

  paint(context, width, height) {
    context.fillStyle = "#ffffff";
    context.fillRect(0, 0, width, height);
    if (this.image) cover(context, this.image, this.image.width, this.image.height, width, height, false);
  }
}
