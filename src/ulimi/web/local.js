// What the page asks, answered by a worker beside it, in this browser: nothing that is typed leaves it.

const worker = new Worker("./worker.js", { type: "module" });
const waiting = new Map();
let asked = 0;

worker.onmessage = ({ data: { number, value } }) => {
  waiting.get(number)?.(value);
  waiting.delete(number);
};
worker.onerror = () => {
  for (const tell of waiting.values()) tell({ error: "This browser cannot run the model: it wants a newer one." });
  waiting.clear();
};

/** Ask for "model", "suggest", "generate" or "score", as JSON: { error } where it was a mistake. */
export function answer(path, request, signal) {
  return new Promise((resolve, reject) => {
    const number = asked++;
    waiting.set(number, resolve);
    signal?.addEventListener("abort", () => {
      if (waiting.delete(number)) worker.postMessage({ number });
      reject(signal.reason);
    });
    worker.postMessage({ number, path, request });
  });
}
