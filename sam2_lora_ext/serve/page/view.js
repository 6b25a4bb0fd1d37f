// One panel: an image, the masks over it, and its mouse and touch input. Coordinates are pixels of the image.

const COLOURS = [[230, 25, 75], [60, 180, 75], [255, 190, 25], [0, 130, 200], [245, 130, 48], [145, 30, 180]];
const MASK = [0, 229, 255];
const MOVED = 5; // CSS pixels; beyond them a press is a drag

export const colourOf = place => COLOURS[place % COLOURS.length];

export class View {
  // figure: a copy of the template; onClick(x, y, label) and onBox([x0, y0, x1, y1]) are called for input.
  constructor(figure, tool, onClick, onBox) {
    this.figure = figure;
    this.scroll = figure.querySelector(".scroll");
    this.frame = figure.querySelector(".view");
    this.image = figure.querySelector("img");
    this.canvas = figure.querySelector("canvas");
    this.model = figure.querySelector(".model");
    this.facts = figure.querySelector(".facts");
    this.keep = figure.querySelector(".keep");
    this.masks = null;
    this.prompts = { clicks: [], box: null };
    this.drag = null;
    this.canvas.addEventListener("contextmenu", event => event.preventDefault());
    this.canvas.addEventListener("pointerdown", event => {
      const box = tool() === "box" || event.pointerType === "mouse" && event.button === 0;
      this.drag = { from: this.at(event), x: event.clientX, y: event.clientY, box, moved: false };
      if (box) this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", event => {
      if (!this.drag) return;
      this.drag.moved ||= Math.hypot(event.clientX - this.drag.x, event.clientY - this.drag.y) > MOVED;
      if (this.drag.moved && this.drag.box) this.draw(boxOf(this.drag.from, this.at(event)));
    });
    this.canvas.addEventListener("pointercancel", () => { this.drag = null; this.draw(); });
    this.canvas.addEventListener("pointerup", event => {
      const drag = this.drag, to = this.at(event);
      this.drag = null;
      if (!drag) return;
      if (drag.moved) {
        const box = boxOf(drag.from, to);
        if (drag.box && box[2] - box[0] >= 1 && box[3] - box[1] >= 1) onBox(box);
        else this.draw();
      } else if (tool() !== "box") {
        const negative = tool() === "negative" || event.button === 2 || event.shiftKey;
        onClick(...drag.from, negative ? 0 : 1);
      }
    });
  }

  at(event) {
    const place = this.canvas.getBoundingClientRect();
    const clamp = (value, most) => Math.min(Math.max(value, 0), most);
    return [clamp((event.clientX - place.left) / place.width * this.canvas.width, this.canvas.width),
      clamp((event.clientY - place.top) / place.height * this.canvas.height, this.canvas.height)];
  }

  // Shows the image of width x height pixels at an address.
  async show(address, width, height, name) {
    [this.canvas.width, this.canvas.height, this.masks] = [width, height, null];
    this.image.alt = name;
    this.image.src = address;
    await this.image.decode();
  }

  // scale: CSS pixels per image pixel.
  size(scale) {
    this.frame.style.width = `${this.canvas.width * scale}px`;
    this.frame.style.height = `${this.canvas.height * scale}px`;
    this.draw();
  }

  // layers: [{runs, colour, strong}], later ones on top.
  set(layers, prompts) {
    const { width, height } = this.canvas, pixels = new ImageData(width, height);
    for (const layer of layers) paint(pixels, layer);
    this.masks = document.createElement("canvas");
    [this.masks.width, this.masks.height] = [width, height];
    this.masks.getContext("2d").putImageData(pixels, 0, 0);
    this.prompts = prompts;
    this.draw();
  }

  draw(dragged = null) {
    const pen = this.canvas.getContext("2d"), { clicks, box } = this.prompts;
    const one = this.canvas.width / Math.max(this.canvas.clientWidth, 1); // image pixels per CSS pixel
    pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (this.masks) pen.drawImage(this.masks, 0, 0);
    for (const corners of [box, dragged]) {
      if (!corners) continue;
      const [x0, y0, x1, y1] = corners;
      for (const [colour, width] of [["#000", 3], ["#fff", 1.5]]) {
        [pen.strokeStyle, pen.lineWidth] = [colour, width * one];
        pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
      }
    }
    for (const [x, y, label] of clicks) {
      pen.beginPath();
      pen.arc(x, y, 5 * one, 0, 2 * Math.PI);
      [pen.fillStyle, pen.strokeStyle, pen.lineWidth] = [label ? "#22c55e" : "#ef4444", "#fff", 1.5 * one];
      pen.fill();
      pen.stroke();
    }
  }
}

function boxOf([x0, y0], [x1, y1]) {
  return [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];
}

// Draws a mask into the pixels: tinted, with an opaque edge.
function paint(pixels, { runs, colour = MASK, strong = false }) {
  const { width, height } = pixels, inside = new Uint8Array(width * height);
  for (let r = 0; r < runs.length; r += 2) // runs are column-major
    for (let p = runs[r]; p < runs[r] + runs[r + 1]; p++) inside[p % height * width + Math.floor(p / height)] = 1;
  for (let p = 0; p < inside.length; p++) {
    if (!inside[p]) continue;
    const x = p % width, y = Math.floor(p / width);
    const edge = !x || !y || x === width - 1 || y === height - 1 ||
      !(inside[p - 1] && inside[p + 1] && inside[p - width] && inside[p + width]);
    pixels.data.set([...colour, edge ? 255 : strong ? 110 : 60], 4 * p);
  }
}
