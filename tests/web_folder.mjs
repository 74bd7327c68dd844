// Asks a folder of `ulimi web` in Node.js: node web_folder.mjs DIR < questions.json > answers.json
// A question is [method, ...arguments] of its model; an answer is what it gives, or { error }. The questions of
// ["together", questions] are asked at once.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const { load } = await import(pathToFileURL(`${process.argv[2]}/ulimi.js`));
const model = await load();

async function answer([method, ...given]) {
  try {
    return method === "together" ? await Promise.all(given[0].map(answer)) : await model[method](...given);
  } catch (error) {
    return { error: error.message };
  }
}

const answers = [];
for (const question of JSON.parse(readFileSync(0, "utf8"))) answers.push(await answer(question));
console.log(JSON.stringify(answers));
