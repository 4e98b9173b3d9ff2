// Detection in a browser, in a worker beside the page: letterbox, inference, NMS, back to the image, as detect.py has
// them (utils/images.py, utils/nms.py, utils/boxes.py). ONNX Runtime runs the model in WebAssembly on one thread, so
// that any static server will do; on the GPU where that agrees with WebAssembly, and is faster, on the first image.

const BEST_ROWS = 100; // whose boxes are compared, however unsure they are: an image may show none of the classes
const WASM = "WebAssembly";

/** Returns the whole number nearest to a value, of two the even one, as Python does. */
export function roundEven(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 ? below + 1 : below;
}

/** Returns for each of `length` places along a side resized from `from`: two places in it and their weights of 2048. */
function taps(from, length) {
  return Array.from({length}, (_, place) => {
    const at = Math.min(Math.max(Math.fround((place + 0.5) * (from / length) - 0.5), 0), from - 1), low = Math.floor(at);
    const second = Math.fround(at - low);
    return [low, Math.min(low + 1, from - 1), roundEven((1 - second) * 2048), roundEven(second * 2048)];
  });
}

/**
 * Resizes an image with bilinear interpolation to fit the model's input, the rest grey; in whole numbers, as OpenCV.
 * @param {Uint8ClampedArray} pixels RGBA, row by row.
 * @returns {{input: Float32Array, hw: number[], ratio: number[], pad: number[]}} planes (3, h, w) RGB of values 0 to 1;
 *   height and width; what leads back to the image: x_padded = x * ratio[0] + pad[0].
 */
export function letterbox(pixels, width, height, {shapeHw, stride, dynamic, padColour}) {
  const scale = Math.min(shapeHw[0] / height, shapeHw[1] / width);
  const resizedW = Math.max(roundEven(width * scale), 1), resizedH = Math.max(roundEven(height * scale), 1);
  let padW = shapeHw[1] - resizedW, padH = shapeHw[0] - resizedH;
  if (dynamic) [padW, padH] = [padW % stride, padH % stride];
  const [w, h] = [resizedW + padW, resizedH + padH], left = Math.round(padW / 2 - 0.1), top = Math.round(padH / 2 - 0.1);
  const input = new Float32Array(3 * h * w), xs = taps(width, resizedW), ys = taps(height, resizedH);
  padColour.forEach((level, channel) => input.fill(level / 255, channel * h * w, (channel + 1) * h * w));
  ys.forEach(([above, below, up, down], y) => {
    for (let x = 0; x < resizedW; x++) {
      const [before, after, first, second] = xs[x], target = (top + y) * w + left + x;
      for (let channel = 0; channel < 3; channel++) {
        const at = (row, column) => pixels[4 * (row * width + column) + channel];
        const upper = (at(above, before) * first + at(above, after) * second) >> 4;
        const lower = (at(below, before) * first + at(below, after) * second) >> 4;
        input[channel * h * w + target] = (((up * upper) >> 16) + ((down * lower) >> 16) + 2 >> 2) / 255;
      }
    }
  });
  return {input, hw: [h, w], ratio: [resizedW / width, resizedH / height], pad: [padW / 2, padH / 2]};
}

/**
 * Chooses detections among a model's rows, each [x, y, w, h in px, objectness, class probabilities].
 * @param {Float32Array} rows all rows, one after the other.
 * @param {number} columns of a row.
 * @returns {{xyxy: number[], confidence: number, class: number}[]} in px of the input, most confident first.
 */
export function suppress(rows, columns, {lowestConf, iou, maxDet, minSide, maxSide, maxCandidates}) {
  const candidates = [], least = Math.fround(lowestConf);
  for (let at = 0; at < rows.length; at += columns) {
    const [x, y, w, h, objectness] = rows.subarray(at, at + 5);
    if (!(objectness > least) || !(Math.min(w, h) >= minSide && Math.max(w, h) <= maxSide)) continue;
    let best = 0, confidence = -1;
    for (let number = 0; number < columns - 5; number++) {
      const score = Math.fround(rows[at + 5 + number] * objectness);
      if (score > confidence) [best, confidence] = [number, score];
    }
    const xyxy = [x - w / 2, y - h / 2, x + w / 2, y + h / 2].map(Math.fround);
    if (confidence > least) candidates.push({xyxy, confidence, class: best});
  }
  candidates.sort((first, second) => second.confidence - first.confidence); // equal ones stay in order
  const kept = [];
  for (const candidate of candidates.slice(0, maxCandidates)) {
    if (kept.length === maxDet) break;
    if (!kept.some((other) => other.class === candidate.class && overlaps(other.xyxy, candidate.xyxy, iou))) kept.push(candidate);
  }
  return kept;
}

/** Says whether the IoU of two boxes is above a limit. */
function overlaps(first, second, limit) {
  const area = ([left, top, right, bottom]) => (right - left) * (bottom - top);
  const shared = [0, 1].map((axis) => Math.max(Math.min(first[axis + 2], second[axis + 2]) - Math.max(first[axis], second[axis]), 0));
  const inter = shared[0] * shared[1];
  return inter > limit * (area(first) + area(second) - inter);
}

/** Takes a box from the letterboxed input to the image, and clips it there. */
export function toImage(xyxy, width, height, {ratio, pad}) {
  const sides = [width, height];
  return xyxy.map((value, index) => Math.min(Math.max((value - pad[index % 2]) / ratio[index % 2], 0), sides[index % 2]));
}

/**
 * Measures how far a runtime's rows are from another's: the largest difference of a box's side in the best rows, px,
 * and of objectness or a class probability anywhere.
 */
export function differences(rows, others, columns, bestRows = BEST_ROWS) {
  if (rows.length !== others.length) return {box: Infinity, score: Infinity};
  const found = {box: 0, score: 0}, confidences = [];
  const differ = (what, at) => { // what is no number differs too
    const by = Math.abs(rows[at] - others[at]);
    if (!(by <= found[what])) found[what] = Number.isNaN(by) ? Infinity : by;
  };
  for (let at = 0; at < rows.length; at += columns) {
    confidences.push([rows[at + 4] * Math.max(...rows.subarray(at + 5, at + columns)), at]);
    for (let column = 4; column < columns; column++) differ("score", at + column);
  }
  confidences.sort((first, second) => second[0] - first[0]);
  for (const [, at] of confidences.slice(0, bestRows)) for (let side = 0; side < 4; side++) differ("box", at + side);
  return found;
}

/** Loads the model into a runtime; returns a function from a letterboxed image to its rows and the ms that they took. */
async function openModel(model, provider) {
  const ort = await import(provider === "webgpu" ? "./ort/ort.webgpu.min.mjs" : "./ort/ort.wasm.min.mjs");
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = 1; // more need headers that few static servers send
  ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
  const session = await ort.InferenceSession.create(model, {executionProviders: [provider], graphOptimizationLevel: "all"});
  return async ({input, hw}) => {
    const start = performance.now();
    const {output} = await session.run({images: new ort.Tensor("float32", input, [1, 3, ...hw])});
    return {rows: await output.getData(), columns: output.dims[2], ms: performance.now() - start};
  };
}

/** Detects in images with one runtime, and looks once whether another may take its place. */
export class Detector {
  constructor(settings, run, open) {
    Object.assign(this, {settings, run, open, chosen: !navigator.gpu});
  }

  async detect(image) {
    const {width, height} = image, start = performance.now();
    const context = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true});
    context.drawImage(image, 0, 0);
    const boxed = letterbox(context.getImageData(0, 0, width, height).data, width, height, this.settings);
    const prepared = performance.now(), answer = await this.run(boxed), inferred = performance.now();
    const objects = suppress(answer.rows, answer.columns, this.settings).map(({xyxy, confidence, class: number}) => {
      const [xmin, ymin, xmax, ymax] = toImage(xyxy, width, height, boxed);
      return {xmin, ymin, xmax, ymax, confidence, class: number, name: this.settings.names[number] ?? String(number)};
    });
    const stages = [["pre-process", prepared - start], ["inference", answer.ms], ["NMS", performance.now() - inferred]];
    return {found: {objects, stages}, boxed, answer};
  }

  /** Compares WebGPU with what WebAssembly has answered, and goes on with it if it agrees and is faster; says which. */
  async choose({boxed, answer}) {
    this.chosen = true;
    try {
      const adapter = await navigator.gpu.requestAdapter();
      if (!adapter || adapter.info?.isFallbackAdapter) return `${WASM} (no GPU that WebGPU may use)`;
      const run = await this.open("webgpu");
      await run(boxed); // compiles
      const other = await run(boxed), {box, score} = differences(answer.rows, other.rows, answer.columns);
      const apart = `boxes within ${box.toPrecision(2)} px, scores within ${score.toPrecision(2)}`;
      if (!(box <= this.settings.boxPx && score <= this.settings.score)) return `${WASM} (WebGPU does not agree: ${apart})`;
      const {ms} = await this.run(boxed); // once more: the first run of all is slow
      if (other.ms >= ms) return `${WASM} (WebGPU takes ${other.ms.toFixed(0)} ms instead of ${ms.toFixed(0)})`;
      this.run = run;
      return `WebGPU (agrees with ${WASM}: ${apart})`;
    } catch (error) {
      return `${WASM} (WebGPU fails: ${error.message})`;
    }
  }
}

/** Answers the page: first come the settings, then images, one after the other. */
function serve() {
  let detector, last = Promise.resolve();
  const start = async ({settings}) => {
    const answer = await fetch(new URL(settings.file, import.meta.url));
    if (!answer.ok) throw new Error(`${settings.file}: the server answered ${answer.status}.`);
    const model = new Uint8Array(await answer.arrayBuffer()), open = (provider) => openModel(model, provider);
    detector = new Detector(settings, await open("wasm"), open);
    postMessage({status: WASM});
  };
  const detect = async ({image}) => {
    if (!detector) return; // told already
    const result = await detector.detect(image);
    postMessage(result.found);
    if (!detector.chosen) postMessage({status: await detector.choose(result)});
  };
  addEventListener("message", ({data}) => {
    const work = data.settings ? start : detect, kind = data.settings ? "fatal" : "error";
    last = last.then(() => work(data)).catch((error) => postMessage({[kind]: error.message}));
  });
}

if ("WorkerGlobalScope" in globalThis) serve();
