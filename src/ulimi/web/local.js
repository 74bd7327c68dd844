// What the page asks, answered by a worker beside it, in this browser: nothing that is typed leaves it.

const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
let asked = 0, broken = null;

worker.onmessage = ({ data: { number, value } }) => {
  waiting.get(number)?.(value);
  waiting.delete(number);
};
worker.onerror = () => {
  broken = "The model's program cannot be loaded: a file is missing, the web server sends .js under another type, "
    + "or this browser is too old.";
  for (const tell of waiting.values()) tell({ error: broken });
  waiting.clear();
};

/** Ask for "model", "suggest", "generate" or "score", as JSON: { error } where it was a mistake. */
export function answer(path, request, signal) {
  return new Promise((resolve, reject) => {
    if (broken !== null) {
      resolve({ error: broken });
      return;
    }
    const number = asked++;
    waiting.set(number, resolve);
    signal?.addEventListener("abort", () => {
      if (waiting.delete(number)) worker.postMessage({ number });
      reject(signal.reason);
    });
    worker.postMessage({ number, path, request });
  });
}
