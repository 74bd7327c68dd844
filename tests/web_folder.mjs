// Asks a folder of `ulimi web` in Node.js: node web_folder.mjs DIR < questions.json > answers.json
// A question is [method, ...arguments] of its model; an answer is what it gives, or { error }.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const folder = process.argv[2];
const part = (name) => import(pathToFileURL(`${folder}/${name}`));
const json = (name) => JSON.parse(readFileSync(`${folder}/model/${name}`, "utf8"));
const [ort, { Tokenizer }, { create }] = await Promise.all([
  part("lib/ort.wasm.min.mjs"), part("lib/tokenizers.min.mjs"), part("ulimi.js"),
]);
const graph = readFileSync(`${folder}/model/model.onnx`);
const files = { config: json("model.json"), tokenizer: json("tokenizer.json"), graph };
const model = await create(files, { ort, Tokenizer });
const answers = [];
for (const [method, ...given] of JSON.parse(readFileSync(0, "utf8"))) {
  try {
    answers.push(await model[method](...given));
  } catch (error) {
    answers.push({ error: error.message });
  }
}
console.log(JSON.stringify(answers));
