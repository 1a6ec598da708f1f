// Transcribe with transformers.js, from a folder alone: node open_in_transformers_js.mjs FOLDER AUDIO TOKENS
// AUDIO holds float32 numbers at 16 kHz. TWOFOLD_TRANSFORMERS_JS names a folder with node_modules/@huggingface/transformers.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, audio, tokens] = process.argv.slice(2);
const place = createRequire(join(process.env.TWOFOLD_TRANSFORMERS_JS, "package.json"));
const { env, pipeline } = await import(pathToFileURL(place.resolve("@huggingface/transformers")).href);
env.allowRemoteModels = false;

const transcriber = await pipeline("automatic-speech-recognition", folder, { device: "cpu" });
const bytes = readFileSync(audio);
const samples = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
const { text } = await transcriber(samples, { max_new_tokens: Number(tokens) });
console.log(JSON.stringify({ model: transcriber.model.constructor.name, version: env.version, text }));
