// A detector that `mmlite export --format web` wrote, run by ONNX Runtime Web. What happens to an
// image is what mmlite/export/detector.py does: the names of the functions are the same.

const RUNTIME = { wasm: 'ort/ort.wasm.min.mjs', webgpu: 'ort/ort.webgpu.min.mjs' };

export async function load(backend = 'wasm') {
  const description = await (await fetch('detector.json')).json();
  const ort = await import(new URL(RUNTIME[backend], document.baseURI));
  ort.env.wasm.wasmPaths = new URL('ort/', document.baseURI).href;
  const session = await ort.InferenceSession.create(description.model, {
    executionProviders: [backend],
    logSeverityLevel: 3,
  });
  return new Detector(ort, session, description);
}

class Detector {
  constructor(ort, session, description) {
    Object.assign(this, { ort, session, description, classes: description.classes });
  }

  // Find objects in an ImageData: a list of {box: [x1, y1, x2, y2], score, label}, best first.
  async detect(image, threshold = 0) {
    const { preprocessing, input } = this.description;
    const size = resizedSize([image.height, image.width], preprocessing.resize);
    const content = padded(resized(image, size), preprocessing.pad);
    const outputs = await this.session.run(this.arguments(content, input));
    const { boxes, scores, labels } = outputs;
    const scale = [image.width / size[1], image.height / size[0]];
    const found = [];
    for (let i = 0; i < scores.dims[1]; i++) {
      const score = scores.data[i];
      if (score < Math.max(threshold, 0)) continue; // what a graph leaves out scores -1
      const box = [0, 1, 2, 3].map((side) => boxes.data[4 * i + side] * scale[side % 2]);
      found.push({ box, score, label: Number(labels.data[i]) });
    }
    return found;
  }

  arguments(content, input) {
    const up = (side) => Math.ceil(side / input.divisor) * input.divisor;
    const height = input.height ?? up(content.height);
    const width = input.width ?? up(content.width);
    const tokens = input.levels.reduce(
      (sum, [stride, rest]) =>
        sum + Math.floor((height + rest) / stride) * Math.floor((width + rest) / stride),
      0,
    );
    if (tokens < input.least_tokens) {
      throw new Error(`An image of ${height} x ${width} pixels is too small for the model.`);
    }
    const plane = height * width;
    const pixels = new Float32Array(3 * plane);
    for (let y = 0; y < content.height; y++) {
      for (let x = 0; x < content.width; x++) {
        for (let channel = 0; channel < 3; channel++) {
          pixels[channel * plane + y * width + x] =
            content.data[3 * (y * content.width + x) + channel];
        }
      }
    }
    const { Tensor } = this.ort;
    const given = { images: new Tensor('float32', pixels, [1, 3, height, width]) };
    if (input.padded) {
      const sides = BigInt64Array.of(BigInt(content.height), BigInt(content.width));
      given.image_sizes = new Tensor('int64', sides, [1, 2]);
    }
    return given;
  }
}

// The size [height, width] that an image is resized to.
export function resizedSize(size, resize) {
  if (!resize) return size;
  let factor;
  if (resize.canvas) {
    factor = Math.min(resize.canvas[0] / size[0], resize.canvas[1] / size[1]);
  } else if (resize.keep_ratio) {
    factor = Math.min(
      Math.max(...resize.scale) / Math.max(...size),
      Math.min(...resize.scale) / Math.min(...size),
    );
  } else {
    return [resize.scale[1], resize.scale[0]];
  }
  const half = resize.rounds_down ? 0 : 0.5;
  return size.map((side) => Math.max(Math.floor(side * factor + half), 1));
}

// The pixels as BGR, resized bilinearly as OpenCV does, to within one step of a channel.
function resized(image, [height, width]) {
  const data = new Uint8ClampedArray(3 * height * width);
  const rows = places(image.height, height);
  const columns = places(image.width, width);
  for (let y = 0; y < height; y++) {
    const [top, bottom, south] = rows[y];
    for (let x = 0; x < width; x++) {
      const [left, right, east] = columns[x];
      for (let channel = 0; channel < 3; channel++) {
        const pixel = (row, column) => image.data[4 * (row * image.width + column) + 2 - channel];
        const north = pixel(top, left) * (1 - east) + pixel(top, right) * east;
        const other = pixel(bottom, left) * (1 - east) + pixel(bottom, right) * east;
        data[3 * (y * width + x) + channel] = Math.round(north * (1 - south) + other * south);
      }
    }
  }
  return { data, height, width };
}

// For each of `count` places along a side of `side` pixels: two neighbours, and the second's share.
function places(side, count) {
  return Array.from({ length: count }, (_, place) => {
    const at = Math.min(Math.max(((place + 0.5) * side) / count - 0.5, 0), side - 1);
    const first = Math.floor(at);
    return [first, Math.min(first + 1, side - 1), at - first];
  });
}

function padded(image, pad) {
  if (!pad) return image;
  const divisor = pad.size_divisor ?? 1;
  const least = pad.size ?? [0, 0];
  const [height, width] = [image.height, image.width].map(
    (side, axis) => Math.ceil(Math.max(side, least[axis]) / divisor) * divisor,
  );
  const data = new Uint8ClampedArray(3 * height * width);
  const value = Array.isArray(pad.value) ? pad.value : [pad.value, pad.value, pad.value];
  for (let i = 0; i < data.length; i++) data[i] = value[i % 3];
  for (let y = 0; y < image.height; y++) {
    const row = image.data.subarray(3 * y * image.width, 3 * (y + 1) * image.width);
    data.set(row, 3 * y * width);
  }
  return { data, height, width };
}
