// The model, in a thread of its own, so that the page stays quick while it computes. One question after another.

import * as ort from "./lib/ort.wasm.min.mjs";
import { Tokenizer } from "./lib/tokenizers.min.mjs";
import { load } from "./ulimi.js";

const loading = load("./model/", { ort, Tokenizer });
const answers = {
  model: (model) => ({ model: model.config.name, vocab_size: model.config.tokens.length, ulimi: model.config.ulimi }),
  suggest: (model, { text, num }) => model.suggest(text, num),
  generate: async (model, { prompt, ...asked }) => ({ texts: [await model.write(prompt, asked)] }),
  score: async (model, { lines }) => {
    const scored = [];
    for (const line of lines) scored.push(await model.score(line));
    return { lines: scored };
  },
};
const dropped = new Set();  // nobody waits for them any more
let turn = loading.catch(() => {});

onmessage = ({ data: { number, path, request } }) => {
  if (path === undefined) {
    dropped.add(number);
    return;
  }
  turn = turn.then(async () => {
    await new Promise((done) => setTimeout(done));  // whoever has given up meanwhile says so before this begins
    if (dropped.delete(number)) return;
    let value;
    try {
      value = await answers[path](await loading, request);
    } catch (error) {
      value = { error: error.message };
    }
    postMessage({ number, value });
  });
};
