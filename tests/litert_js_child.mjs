// Run .tflite files in LiteRT.js (WebAssembly) in Node.js: `node litert_js_child.mjs PACKAGES`, where PACKAGES holds
// @litertjs/core. It answers the lines of JSON of `edgeq.system.worker`: {"do": "load", "path"} and
// {"do": "run" or "run_many", "signature", "inputs"}. LiteRT.js passes 32-bit integers and floats only, in and out.

import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import readline from "node:readline";
import { pathToFileURL } from "node:url";
import vm from "node:vm";

const put = (message) => fs.writeSync(1, JSON.stringify(message) + "\n");
for (const name of ["log", "info", "debug"]) console[name] = console.error; // standard output is for replies

const core = path.join(path.resolve(process.argv[2]), "@litertjs", "core");
// The package is written for a browser: it loads its WebAssembly as a worker there does.
globalThis.self = globalThis;
globalThis.navigator ??= {};
globalThis.require = createRequire(import.meta.url);
globalThis.__dirname = path.join(core, "wasm");
globalThis.importScripts = (file) => vm.runInThisContext(fs.readFileSync(file, "utf8"), file);

let litert, model;

async function load({ path: file }) {
  if (!litert) {
    litert = await import(pathToFileURL(path.join(core, "dist", "index.js")));
    await litert.loadLiteRt(`${globalThis.__dirname}/`, { threads: false });
  }
  model?.delete();
  model = undefined;
  model = await litert.loadAndCompile(new Uint8Array(fs.readFileSync(file)), { accelerator: "wasm" });
  return { signatures: Object.keys(model.signatures) };
}

function unpack({ dtype, shape, data }) {
  if (dtype !== "<i4") throw new Error(`an input is ${dtype}; <i4 is needed`);
  const bytes = Buffer.from(data, "base64");
  return { shape, numbers: new Int32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length)) };
}

async function once(signature, arrays) {
  const given = {};
  for (const [name, { numbers, shape }] of Object.entries(arrays)) given[name] = new litert.Tensor(numbers, shape);
  const found = {};
  for (const [name, tensor] of Object.entries(await model.run(signature, given))) {
    const array = tensor.toTypedArray();
    if (!(array instanceof Int32Array)) throw new Error(`output ${name} has no 32-bit integers`);
    const bytes = array.buffer.slice(array.byteOffset, array.byteOffset + array.byteLength);
    found[name] = { shape: [...tensor.type.layout.dimensions], bytes: Buffer.from(bytes) };
    tensor.delete();
  }
  for (const tensor of Object.values(given)) tensor.delete();
  return found;
}

function packed(shape, bytes) {
  return { dtype: "<i4", shape, data: bytes.toString("base64") };
}

async function run({ signature, inputs }) {
  const arrays = Object.fromEntries(Object.entries(inputs).map(([name, item]) => [name, unpack(item)]));
  const found = Object.entries(await once(signature, arrays));
  return { outputs: Object.fromEntries(found.map(([name, { shape, bytes }]) => [name, packed(shape, bytes)])) };
}

async function runMany({ signature, inputs }) {
  const arrays = Object.entries(inputs).map(([name, item]) => [name, unpack(item)]);
  const count = arrays[0][1].shape[0];
  const rows = [];
  for (let row = 0; row < count; row++) {
    const one = arrays.map(([name, { numbers, shape }]) => {
      const size = numbers.length / count;
      return [name, { numbers: numbers.slice(row * size, (row + 1) * size), shape: shape.slice(1) }];
    });
    rows.push(await once(signature, Object.fromEntries(one)));
  }
  const outputs = {};
  for (const [name, { shape }] of Object.entries(rows[0])) {
    outputs[name] = packed([count, ...shape], Buffer.concat(rows.map((found) => found[name].bytes)));
  }
  return { outputs };
}

const actions = { load, run, run_many: runMany };
for await (const line of readline.createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  put({ announce: `${request.do} of ${request.path ?? "the model"}` });
  try {
    put(await actions[request.do](request));
  } catch (error) {
    put({ error: `${error}` });
  }
}
