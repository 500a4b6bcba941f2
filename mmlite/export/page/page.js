// The page around the detector: a picture is chosen, dropped or comes from the camera.

import { load } from './detector.js';

const COLORS = ['#ffb43c', '#3cc85a', '#288cff', '#e646c8', '#eb463c', '#28c8d2', '#a0646e'];
const element = (id) => document.getElementById(id);
const canvas = document.createElement('canvas');
let detector;
let picture; // ImageData of what is shown
let found = []; // everything in it, whatever its score
let camera; // the stream, while it is on

function say(error) {
  element('problem').textContent = error ? (error.message ?? String(error)) : '';
}

async function start() {
  const backend = element('webgpu').checked ? 'webgpu' : 'wasm';
  element('title').textContent = 'Loading the model';
  detector = await load(backend);
  const { detector: name, schedule } = detector.description;
  element('title').textContent = `${name}${schedule ? `, ${schedule}` : ''}`;
  document.title = name;
}

async function look(source, width, height) {
  canvas.width = width;
  canvas.height = height;
  const pen = canvas.getContext('2d', { willReadFrequently: true });
  pen.fillStyle = '#000'; // under what is transparent
  pen.fillRect(0, 0, width, height);
  pen.drawImage(source, 0, 0);
  picture = pen.getImageData(0, 0, width, height);
  const began = performance.now();
  found = await detector.detect(picture);
  element('status').textContent = `${width} x ${height} pixels, ${Math.round(performance.now() - began)} ms`;
  element('drop').replaceChildren(canvas);
  show();
}

function show() {
  const threshold = Number(element('threshold').value);
  element('shown').textContent = threshold.toFixed(2);
  if (!picture) return;
  const pen = canvas.getContext('2d');
  pen.putImageData(picture, 0, 0);
  const size = Math.max(12, Math.round(Math.max(canvas.width, canvas.height) / 50));
  pen.font = `${size}px sans-serif`;
  pen.lineWidth = Math.max(2, size / 6);
  const chosen = found.filter(({ score }) => score >= threshold);
  for (const { box, score, label } of chosen) {
    const [x1, y1, x2, y2] = box;
    pen.strokeStyle = pen.fillStyle = COLORS[label % COLORS.length];
    pen.strokeRect(x1, y1, x2 - x1, y2 - y1);
    pen.fillText(`${nameOf(label)} ${score.toFixed(2)}`, x1 + 2, Math.max(y1 - 3, size));
  }
  element('found').replaceChildren(...chosen.map(row));
}

const nameOf = (label) => detector.classes[label] ?? String(label);

function row({ box, score, label }) {
  const line = document.createElement('tr');
  for (const text of [nameOf(label), score.toFixed(4), ...box.map((side) => side.toFixed(2))]) {
    line.insertCell().textContent = text;
  }
  return line;
}

async function open(file) {
  stop();
  say();
  try {
    const options = { premultiplyAlpha: 'none', colorSpaceConversion: 'none' };
    const bitmap = await createImageBitmap(file, options).catch(() => {
      throw new Error(`${file.name} cannot be read as a picture.`);
    });
    await ready;
    await look(bitmap, bitmap.width, bitmap.height);
  } catch (error) {
    say(error);
  }
}

function stop() {
  camera?.getTracks().forEach((track) => track.stop());
  camera = undefined;
}

async function watch() {
  if (camera) return stop();
  say();
  try {
    await ready;
    camera = await navigator.mediaDevices.getUserMedia({ video: true });
    const video = document.createElement('video');
    video.srcObject = camera;
    await video.play();
    while (camera) {
      await look(video, video.videoWidth, video.videoHeight);
      await new Promise(requestAnimationFrame);
    }
  } catch (error) {
    stop();
    say(error);
  }
}

const drop = element('drop');
element('file').addEventListener('change', (event) => event.target.files[0] && open(event.target.files[0]));
element('threshold').addEventListener('input', show);
element('camera').addEventListener('click', watch);
element('webgpu').addEventListener('change', () => (ready = start().catch(say)));
drop.addEventListener('dragover', (event) => {
  event.preventDefault();
  drop.classList.add('over');
});
drop.addEventListener('dragleave', () => drop.classList.remove('over'));
drop.addEventListener('drop', (event) => {
  event.preventDefault();
  drop.classList.remove('over');
  if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
});
element('gpu').hidden = !navigator.gpu;
let ready = start().catch(say);
