// Run .tflite files in LiteRT.js (WebAssembly) in Node.js: `node litert_js_child.mjs PACKAGES`, where PACKAGES holds
// @litertjs/core. It answers the lines of JSON of `edgeq.system.worker`: {"do": "load", "path"} and
// {"do": "run", "signature", "inputs"}. LiteRT.js passes 32-bit integers and floats only, in and out.

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
  litert ??= await import(pathToFileURL(path.join(core, "dist", "index.js")));
  if (!litert.isLoaded) {
    await litert.loadLiteRt(`${globalThis.__dirname}/`, { threads: false });
    litert = { ...litert, isLoaded: true };
  }
  model?.delete();
  model = undefined;
  model = await litert.loadAndCompile(new Uint8Array(fs.readFileSync(file)), { accelerator: "wasm" });
  return { signatures: Object.keys(model.signatures) };
}

async function run({ signature, inputs }) {
  const given = {};
  for (const [name, packed] of Object.entries(inputs)) {
    if (packed.dtype !== "<i4") throw new Error(`input ${name} is ${packed.dtype}; <i4 is needed`);
    const bytes = Buffer.from(packed.data, "base64");
    const numbers = new Int32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
    given[name] = new litert.Tensor(numbers, packed.shape);
  }
  const results = await model.run(signature, given);
  const outputs = {};
  for (const [name, tensor] of Object.entries(results)) {
    const array = tensor.toTypedArray();
    const data = Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString("base64");
    outputs[name] = { dtype: "<i4", shape: [...tensor.type.layout.dimensions], data };
    if (!(array instanceof Int32Array)) throw new Error(`output ${name} has no 32-bit integers`);
    tensor.delete();
  }
  for (const tensor of Object.values(given)) tensor.delete();
  return { outputs };
}

const actions = { load, run };
for await (const line of readline.createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  put({ announce: `${request.do} of ${request.path ?? "the model"}` });
  try {
    put(await actions[request.do](request));
  } catch (error) {
    put({ error: `${error}` });
  }
}
