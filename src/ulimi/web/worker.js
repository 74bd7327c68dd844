// The model, in a thread of its own, so that the page stays quick while it computes.

import { load } from "./ulimi.js";

const loading = load();
const answers = {
  model: (model) => {
    const { name, about, tokens, ulimi } = model.config;
    return { model: name, vocab_size: tokens.length, sparse: false, ulimi, about };
  },
  suggest: (model, { text, num }) => model.suggest(text, num),
  generate: async (model, { prompt, probabilities, ...asked }) => ({ texts: [await model.write(prompt, asked)] }),
  score: async (model, { lines }) => {
    const scored = [];
    for (const line of lines) scored.push(await model.score(line));
    return { lines: scored };
  },
};
const dropped = new Set();  // nobody waits for them any more
const turns = { suggest: loading.catch(() => {}), other: loading.catch(() => {}) };

onmessage = ({ data: { number, path, request } }) => {
  if (path === undefined) {
    dropped.add(number);
    return;
  }
  // One question after another; but words are suggested while a text is written or scored.
  const line = path === "suggest" ? "suggest" : "other";
  turns[line] = turns[line].then(async () => {
    await new Promise((done) => setTimeout(done));  // whoever has given up meanwhile says so before this begins
    if (dropped.delete(number)) return;
    let value;
    try {
      value = await answers[path](await loading, request);
    } catch (error) {
      value = { error: String(error?.message ?? error) };
    }
    postMessage({ number, value });
  });
};
