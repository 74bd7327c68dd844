// A model of ulimi without a server: in a browser, in a worker, in Node.js. `ulimi web` writes what it reads.
//
//   import { load } from "./ulimi.js";
//   const model = await load();
//   await model.suggest("Ngiyabonga kakh", 3);  // { suggestions: [{ word, probability }], covered }
//   await model.write("Namhlanje", { max_words: 20 });
//   await model.score("Sawubona, unjani?");
//
// ONNX Runtime Web computes, Hugging Face's tokenizers cut text into tokens; what is here is what ulimi does with them.
// The words, figures and names are those of ulimi's Python (ulimi/suggest.py, spelling.py, words.py, writer.py), which
// says why things are done so; tests hold both equal. Only chance is another: a seed gives another text than there.
//
// Bytes are strings of characters U+0000 to U+00FF, so that they can be compared, cut and joined as Python's are.

const MAX_BEGUN_BYTES = 64, MAX_WORDS = 1000, MAX_KNOWN = 512, WINDOW = 64, PAUSE_MS = 50;
const APOSTROPHES = "'’", JOINERS = "-\u2011" + APOSTROPHES;
const IN_WORD = /[\p{L}\p{M}\p{N}]/u;
// As Python has it.
const WHITE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const SPACE = new RegExp(`^[${WHITE}]`), NO_SPACE = new RegExp(`[^${WHITE}]`);
const SENTENCE_END = /[.!?…]["'”’»)\]]*$/;
const PIECE = / ?\p{L}[\p{L}\p{M}]*|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+/gu;
const SURROGATE = /\p{Surrogate}/u;
const ENDS = ["never", "paragraph", "sentence"];
const NOTHING = { text: "", logprob: 0, num_tokens: 0 };

const toBytes = (text) => String.fromCharCode(...new TextEncoder().encode(text));
const arrayOf = (bytes) => Uint8Array.from(bytes, (byte) => byte.charCodeAt(0));
const toText = (bytes) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(arrayOf(bytes));
const beginsInside = (bytes) => bytes >= "\x80" && bytes < "\xc0";
const isWordCharacter = (character) => JOINERS.includes(character) || IN_WORD.test(character);
const isUtf8 = (bytes) => {
  try { new TextDecoder("utf-8", { fatal: true }).decode(arrayOf(bytes)); return true; } catch { return false; }
};

function logAddExp(a, b) {
  if (a === -Infinity) return b;
  const [most, least] = a > b ? [a, b] : [b, a];
  return most + Math.log1p(Math.exp(least - most));
}

/** Logits to log-probabilities in nats: softmax. */
function logProbs(logits) {
  let most = -Infinity, sum = 0;
  for (const logit of logits) {
    if (!(logit < Infinity)) throw new Error("the model's logits are not finite");
    if (logit > most) most = logit;
  }
  // Loops: a function called for each of thousands of numbers takes several times as long.
  const found = new Float64Array(logits.length);
  for (let id = 0; id < logits.length; id++) sum += Math.exp(found[id] = logits[id] - most);
  const log = Math.log(sum);
  for (let id = 0; id < found.length; id++) found[id] -= log;
  return found;
}

const massOf = (ids, logs) => ids.reduce((sum, id) => sum + Math.exp(logs[id]), 0);

/** The `num` most probable of some ids, best first; of equal ones the lower id; none that is impossible. */
function best(ids, logs, num) {
  // Numbers alone are sorted faster than ids by a function: they tell which ids are worth it.
  const least = ids.length > num ? Float64Array.from(ids, (id) => logs[id]).sort()[ids.length - num] : -Infinity;
  return bestFrom(least, ids, logs, num).filter((id) => logs[id] > -Infinity);
}

/** The same where the value of the last of them is known. */
function bestFrom(least, ids, values, num) {
  return ids.filter((id) => values[id] >= least).sort((a, b) => values[b] - values[a] || a - b).slice(0, num);
}

/** What some bytes do to a word that they are added to, see ulimi.suggest. */
function scan(bytes) {
  let end = 0;
  while (end < bytes.length) {
    const first = bytes.charCodeAt(end), length = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    const character = bytes.slice(end, end + length);
    if (character.length < length) {
      const begun = ["\x80", "\xbf"].some((rest) => isUtf8(character.padEnd(length, rest)));
      return begun ? { num: end, ends: false, pending: character } : { num: end, ends: true, pending: "" };
    }
    if (!isUtf8(character) || !isWordCharacter(toText(character))) return { num: end, ends: true, pending: "" };
    end += length;
  }
  return { num: end, ends: false, pending: "" };
}

/**
 * Fetch a model that `ulimi web` wrote, in a browser or in Node.js: from `base`, the address of its folder with a slash
 * at its end, or where it lies beside this file. `libraries` are { ort, Tokenizer }, by default those of libraries.js;
 * with { wasm }, too, the address of ONNX Runtime's program, it is loaded from there.
 */
export async function load(base = new URL("./model/", import.meta.url), libraries = undefined) {
  const part = (name) => new URL(name, new URL(base, globalThis.location?.href));
  const json = async (name) => {
    const bytes = await fetched(part(name));
    try { return JSON.parse(new TextDecoder().decode(bytes)); } catch { throw new Error(`${part(name)} is no JSON`); }
  };
  const [config, tokenizer, graph, known] = await Promise.all([
    json("model.json"), json("tokenizer.json"), fetched(part("model.onnx.gz")), withProgram(libraries),
  ]);
  try {
    return await create({ config, tokenizer, graph }, known);
  } catch (error) {
    throw new Error(`${part("model.onnx.gz")} cannot be used: ${error.message ?? error}`);
  }
}

async function withProgram(libraries) {
  const known = libraries ?? await import("./libraries.js");
  if (known.wasm) known.ort.env.wasm.wasmBinary ??= await fetched(known.wasm);
  return known;
}

async function fetched(address) {
  if (address.protocol === "file:") {  // Node.js
    return unpacked(await (await import("node:fs/promises")).readFile(address), address);
  }
  let bytes;
  try {
    const answer = await fetch(address);
    if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
    bytes = new Uint8Array(await answer.arrayBuffer());
  } catch (error) {
    throw new Error(`${address} cannot be loaded: ${error.message}`);
  }
  return unpacked(bytes, address);
}

/** Bytes as they were before gzip, if they are packed: some servers unpack such files on their way. */
async function unpacked(bytes, name) {
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes;
  try {
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch (error) {
    throw new Error(`${name} cannot be unpacked: ${error.message}`);
  }
}

/** The same from what is there: the JSON of model.json and tokenizer.json, the bytes of model.onnx, packed or not. */
export async function create({ config, tokenizer, graph }, { ort, Tokenizer }) {
  // A step is too short to share, and threads want headers that a plain server does not send.
  ort.env.wasm.numThreads = 1;
  graph = await unpacked(new Uint8Array(graph), "the graph");
  const session = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"] });
  // An "<eos>" that somebody types is text and not the token.
  return new Model(config, new Tokenizer({ ...tokenizer, added_tokens: [] }, {}), session, ort.Tensor);
}

export class Model {
  #tokenizer; #session; #Tensor; #tokens; #eos; #sorted; #scans; #ends; #goesOn; #endsWithin; #begin; #inside; #outside;
  #known = new Map();  // what was read, by its ids: log-probabilities of the next token, state; the oldest first
  #turn = Promise.resolve();
  #rested = performance.now();

  constructor(config, tokenizer, session, Tensor) {
    /** What model.json says: name, kind of tokenizer, tokens as bytes, sizes and first values of the state. */
    this.config = config;
    this.#tokenizer = tokenizer;
    this.#session = session;
    this.#Tensor = Tensor;
    const tokens = this.#tokens = config.tokens, eos = this.#eos = tokens.length - 1;  // <eos> is the last
    const ids = [...tokens.keys()];
    this.#sorted = ids.slice(0, eos).sort((a, b) => (tokens[a] < tokens[b] ? -1 : tokens[a] > tokens[b] ? 1 : a - b));
    const scans = this.#scans = tokens.map(scan);
    scans[eos] = { num: 0, ends: true, pending: "" };
    this.#ends = ids.filter((id) => scans[id].ends && !scans[id].num);
    this.#goesOn = ids.filter((id) => !scans[id].ends);
    this.#endsWithin = ids.filter((id) => scans[id].ends && scans[id].num);
    this.#begin = ids.filter((id) => SPACE.test(toText(tokens[id])));
    this.#inside = ids.filter((id) => id !== eos && beginsInside(tokens[id]));
    this.#outside = ids.filter((id) => id === eos || !beginsInside(tokens[id]));
  }

  /** The ids of a text; each "\n" is <eos>, and nothing is added at the end. */
  encode(text) {
    checkText(text);
    if (SURROGATE.test(text)) throw new Error("the text holds a lone surrogate; it is no Unicode");
    return text.split("\n").flatMap((line) => [...this.#tokenizer.encode(line).ids, this.#eos]).slice(0, -1);
  }

  /** The `num` most probable words that the end of a text may become, as `ulimi suggest`. */
  async suggest(text, num = 5, { max_steps = 32, min_ratio = 1, ...others } = {}) {
    refuseOthers(others, "max_steps, min_ratio");
    check("num", num, Number.isInteger(num) && num >= 1, "a whole number, 1 or more");
    check("max_steps", max_steps, Number.isInteger(max_steps) && max_steps >= 1, "a whole number, 1 or more");
    check("min_ratio", min_ratio, min_ratio >= 0 && min_ratio <= 1, "0 to 1");
    const { context, begun } = this.#split(text);
    const search = new Search(num, min_ratio, wordBegun(text.normalize("NFC")));
    const root = await this.#readAll(context);
    let found = [{ ids: [], logprob: 0, surplus: "", before: root }], total = 0;
    if (begun) {
      ({ found, total } = await this.#covers(root, begun, { max_covers: max_steps, min_share: 1e-3, max_steps }));
    }
    for (const { ids, logprob, surplus, before } of found) {
      const { num: length, ends, pending } = scan(surplus);
      if (ends) search.settle(surplus.slice(0, length), Math.exp(logprob - total));
      else search.push(logprob - total, surplus.slice(0, length), pending, before, ids.at(-1));
    }
    for (let step = 0; step < max_steps; step++) {
      const next = search.pop();
      if (!next) break;
      const known = next.id === undefined ? next.known : await this.#read(next.id, next.known);
      if (next.pending) this.#goOnInsideCharacter(search, next, known);
      else this.#goOn(search, next, known, max_steps);
    }
    return { suggestions: search.best(), covered: Math.min(1, search.settled) };
  }

  /**
   * Write on from a prompt, by sampling, as `ulimi generate --probabilities`: { prompt, text, words }, where words are
   * those of the prompt that are surely whole and those that were written, { text, probability, num_tokens }.
   * 0 is no limit; `end` is "never", "paragraph" or "sentence"; without a seed, chance decides.
   */
  async write(prompt, { max_tokens = 100, max_words = 0, end = "never", temperature, top_p, seed, ...others } = {}) {
    refuseOthers(others, "max_tokens, max_words, end, temperature, top_p, seed");
    checkText(prompt);
    check("max_tokens", max_tokens, Number.isInteger(max_tokens) && max_tokens >= 1, "a whole number, 1 or more");
    check("max_words", max_words, Number.isInteger(max_words) && max_words >= 0, "a whole number, 0 (none) or more");
    check("end", end, ENDS.includes(end), ENDS.join(", "));
    // Where nothing is asked for, from the nucleus; see ulimi.writer.
    const nucleus = top_p ?? (temperature === undefined ? 0.8 : 1), heat = temperature ?? 1, chance = random(seed);
    check("temperature", heat, heat >= 0 && heat < Infinity, "0 (the most probable token) or more");
    check("top_p", nucleus, nucleus > 0 && nucleus <= 1, "above 0, at most 1");
    const isSeed = seed === undefined || (Number.isInteger(seed) && seed >= 0 && seed < 2 ** 32);
    check("seed", seed, isSeed, "a whole number, 0 to 4294967295");
    prompt = prompt.normalize("NFC");
    const { context, begun } = this.#split(prompt);
    const typed = toText(begun), before = await this.#promptWords(context);
    const writer = new WordWriter(this.#tokens, { max_words, end }, typed);
    let known = await this.#readAll(context), left = max_tokens;
    if (begun) {
      const { found } = await this.#covers(known, begun, { max_covers: 1000, min_share: 1e-4, max_steps: 200 });
      // What was typed is certain: one of these it was.
      const total = found.reduce((sum, { logprob }) => logAddExp(sum, logprob), -Infinity);
      const start = found[draw(Float64Array.from(found, (cover) => cover.logprob - total), heat, nucleus, chance)];
      start.ids.forEach((id, i) => writer.push(id, i === start.ids.length - 1 ? start.logprob - total : 0));
      if (!writer.stopped && --left) known = await this.#read(start.ids.at(-1), start.before);
    }
    while (!writer.stopped && left > 0) {
      const id = draw(known.logs, heat, nucleus, chance);
      writer.push(id, known.logs[id]);
      if (!writer.stopped && --left) known = await this.#read(id, known);
    }
    const words = writer.flush(), written = words.map((word) => word.text).join("").slice(typed.length);
    const told = ({ text, logprob, num_tokens }) => ({ text, probability: Math.exp(logprob), num_tokens });
    return { prompt, text: prompt + written, words: [...before, ...words].map(told) };
  }

  /** How probable a line is by itself, its end included, as `ulimi score`, and each word of it, as with `--words`. */
  async score(line) {
    checkText(line);
    check("line", line, !line.includes("\n"), "one line, without a line end in it");
    const ids = [this.#eos, ...this.encode(line), this.#eos], num_chars = [...line].length + 1;
    const read = await this.#logProbsOf(ids, (logs, id) => [logs[id], Math.log(massOf(this.#begin, logs) || 1e-300)]);
    const nats = -read.reduce((sum, [logprob]) => sum + logprob, 0);
    const bits_per_char = nats / Math.LN2 / num_chars, words = this.#surprisals(ids.slice(1), read);
    return { text: line, nats, num_tokens: ids.length - 1, num_chars, bits_per_char, ...words };
  }

  /** What each word of a line costs, see ulimi.surprisal; `read`: log p(token), log p(one that begins a word). */
  #surprisals(ids, read) {
    const words = [];
    ids.forEach((id, place) => {
      const [logprob, logBegins] = read[place], text = this.#tokens[id], before = words.at(-1);
      // A character has four bytes at most; white space alone stands in front of the word after it.
      const bytes = ids.slice(place, place + 4).map((next) => this.#tokens[next]).join("").slice(0, 4);
      const isKnown = SPACE.test(toText(text)), begins = isKnown || SPACE.test(toText(bytes));
      if (!before || (begins && NO_SPACE.test(toText(before.text)))) {
        const moved = before && isKnown ? logBegins : 0;
        if (before) before.nats -= moved;
        words.push({ text, nats: moved - logprob, num_tokens: 1 });
      } else {
        before.text += text;
        before.nats -= logprob;
        before.num_tokens++;
      }
    });
    const told = words.map(({ text, nats, num_tokens }) => ({ text: toText(text), bits: nats / Math.LN2, num_tokens }));
    const end = told.pop();
    return { words: told, end_bits: end.bits, end_tokens: end.num_tokens };
  }

  // What was read

  #initialState() {
    return this.config.state.map(({ size, ends }) => {
      const values = new Float32Array(size);
      values.set(ends, size - ends.length);
      return values;
    });
  }

  /** Read ids of one stream; give the logits after each, (T, V) in a row, and the state. One call after another. */
  #run(ids, state) {
    const feeds = { ids: new this.#Tensor("int64", BigInt64Array.from(ids, BigInt), [ids.length, 1]) };
    this.config.state.forEach(({ name, size }, i) => {
      feeds[name] = new this.#Tensor("float32", state[i], [1, 1, size]);
    });
    const result = this.#turn.then(async () => {
      // Whatever else the thread has to do, another question for one, gets its turn.
      if (performance.now() - this.#rested > PAUSE_MS) {
        await new Promise((done) => setTimeout(done));
        this.#rested = performance.now();
      }
      const out = await this.#session.run(feeds);
      return { logits: out.logits.data, state: this.config.state.map(({ name }) => out[`${name}_out`].data) };
    });
    this.#turn = result.catch(() => {});
    return result;
  }

  #remember(ids, logs, state) {
    const known = { ids, logs, state };
    this.#known.set(ids.join(), known);
    if (this.#known.size > MAX_KNOWN) this.#known.delete(this.#known.keys().next().value);
    return known;
  }

  #recall(ids) {
    const key = ids.join(), known = this.#known.get(key);
    if (known) { this.#known.delete(key); this.#known.set(key, known); }  // the newest again
    return known;
  }

  /** Read a token after what is known, or remember it. */
  async #read(id, before) {
    const ids = [...before.ids, id], known = this.#recall(ids);
    if (known) return known;
    const { logits, state } = await this.#run([id], before.state);
    return this.#remember(ids, logProbs(logits), state);
  }

  /** Read a text, from the longest beginning of it that is known. */
  async #readAll(ids) {
    const lengths = new Set([...this.#known.values()].map((read) => read.ids.length));
    let length = 0, known;
    for (const candidate of [...lengths].filter((some) => some <= ids.length).sort((a, b) => b - a)) {
      if ((known = this.#recall(ids.slice(0, candidate)))) { length = candidate; break; }
    }
    let state = known ? known.state : this.#initialState(), logits;
    if (length === ids.length) return known;
    for (let start = length; start < ids.length; start += WINDOW) {
      ({ logits, state } = await this.#run(ids.slice(start, start + WINDOW), state));
    }
    return this.#remember(ids, logProbs(logits.slice(-this.#tokens.length)), state);
  }

  /** The log-probabilities of ids[1:], each after all that stand before it; or what `each` takes of all those there. */
  async #logProbsOf(ids, each = (logs, id) => logs[id]) {
    const size = this.#tokens.length, found = [];
    let state = this.#initialState(), logits;
    for (let start = 0; start < ids.length - 1; start += WINDOW) {
      const window = ids.slice(start, Math.min(start + WINDOW, ids.length - 1));
      ({ logits, state } = await this.#run(window, state));
      window.forEach((_, i) => found.push(each(logProbs(logits.slice(i * size, (i + 1) * size)), ids[start + i + 1])));
    }
    return found;
  }

  async #promptWords(context) {
    const writer = new WordWriter(this.#tokens, { max_words: 0, end: "never" }, "");
    const logs = await this.#logProbsOf(context);
    logs.forEach((logprob, i) => writer.push(context[i + 1], logprob));
    return writer.flush(false);
  }

  // What was typed, see ulimi.spelling

  #split(text) {
    const ids = [this.#eos, ...this.encode(text)], line = text.slice(text.lastIndexOf("\n") + 1).normalize("NFC");
    const piece = this.config.kind === "char" ? "" : lastPiece(line).slice(-MAX_BEGUN_BYTES);
    const length = Math.min(toBytes(piece).length, MAX_BEGUN_BYTES);
    let begun = "";
    while (begun.length < length || beginsInside(begun)) begun = this.#tokens[ids.pop()] + begun;
    return { context: ids, begun };
  }

  /** Where in the sorted tokens the first stands that is not before `bytes`. */
  #place(bytes) {
    let low = 0, high = this.#sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#tokens[this.#sorted[middle]] < bytes) low = middle + 1; else high = middle;
    }
    return low;
  }

  *#from(bytes, fits) {
    for (let place = this.#place(bytes); place < this.#sorted.length; place++) {
      const id = this.#sorted[place];
      if (!fits(this.#tokens[id])) return;
      yield id;
    }
  }

  /** The ways to spell what was begun, best first, { ids, logprob, surplus, before }; `total` is the log of all. */
  async #covers(root, begun, { max_covers, min_share, max_steps }) {
    const known = new Float64Array(begun.length + 1).fill(-Infinity);
    known[0] = 0;
    const add = (first, last, logprob) => {
      for (let n = first; n <= last; n++) known[n] = logAddExp(known[n], logprob);
    };
    const nodes = [{ ids: [], place: 0, logprob: 0, before: root }], found = [];
    let steps = 0;
    while (nodes.length) {
      const shares = nodes.map((node) => Math.exp(node.logprob - known[node.place]));
      const done = shares.reduce((a, b) => a + b) <= min_share || steps >= max_steps;
      if ((found.length && done) || steps >= max_steps + begun.length) break;
      let first = 0;
      nodes.forEach((node, i) => {
        const better = steps >= max_steps
          ? (node.place - nodes[first].place || node.logprob - nodes[first].logprob) > 0
          : shares[i] > shares[first];
        if (better) first = i;
      });
      const [node] = nodes.splice(first, 1);
      let after = node.before;
      if (node.ids.length) { after = await this.#read(node.ids.at(-1), node.before); steps++; }
      const rest = begun.slice(node.place);
      let reached = -Infinity;
      for (const id of this.#from(rest, (bytes) => bytes.startsWith(rest))) {
        const logprob = after.logs[id] + node.logprob;
        if (logprob === -Infinity) continue;
        found.push({ ids: [...node.ids, id], logprob, surplus: this.#tokens[id].slice(rest.length), before: after });
        reached = logAddExp(reached, logprob);
      }
      if (reached > -Infinity) add(node.place + 1, begun.length, reached);
      for (let length = 1; length < rest.length; length++) {
        const part = rest.slice(0, length);
        for (const id of this.#from(part, (bytes) => bytes === part)) {
          const logprob = after.logs[id] + node.logprob, place = node.place + length;
          if (logprob === -Infinity) continue;
          nodes.push({ ids: [...node.ids, id], place, logprob, before: after });
          add(node.place + 1, place, logprob);
        }
      }
    }
    return { found: found.sort((a, b) => b.logprob - a.logprob).slice(0, max_covers), total: known[begun.length] };
  }

  // Words that go on, see ulimi.suggest

  #goOn(search, { logprob, spelt }, known, max_steps) {
    search.settle(spelt, Math.exp(logprob) * massOf(this.#ends, known.logs));
    for (const id of best(this.#endsWithin, known.logs, MAX_WORDS)) {
      search.settle(spelt + this.#tokens[id].slice(0, this.#scans[id].num), Math.exp(logprob + known.logs[id]));
    }
    for (const id of best(this.#goesOn, known.logs, max_steps)) {
      const { num, pending } = this.#scans[id];
      search.push(logprob + known.logs[id], spelt + this.#tokens[id].slice(0, num), pending, known, id);
    }
  }

  #goOnInsideCharacter(search, { logprob, spelt, pending }, known) {
    search.settle(spelt, Math.exp(logprob) * massOf(this.#outside, known.logs));
    for (const id of best(this.#inside, known.logs, MAX_WORDS)) {
      const bytes = pending + this.#tokens[id], { num, ends, pending: rest } = scan(bytes);
      if (ends) search.settle(spelt + bytes.slice(0, num), Math.exp(logprob + known.logs[id]));
      else search.push(logprob + known.logs[id], spelt + bytes.slice(0, num), rest, known, id);
    }
  }
}

/** One search for words; the most probable beginning of a word goes first. */
class Search {
  settled = 0;
  #queue = []; #words = new Map(); #num; #least; #typed;

  constructor(num, least, typed) { this.#num = num; this.#least = least; this.#typed = typed; }

  push(logprob, spelt, pending, known, id) {
    if (spelt && !this.#typed && JOINERS.includes([...toText(spelt)][0])) this.settled += Math.exp(logprob);
    else this.#queue.push({ logprob, spelt, pending, known, id });
  }

  /** The next to look at; none once no word that is missing can be among the best. */
  pop() {
    let first = 0;
    this.#queue.forEach(({ logprob }, i) => { if (logprob > this.#queue[first].logprob) first = i; });
    const worst = this.best()[this.#num - 1];
    if (worst && this.#queue[first]?.logprob < Math.log(worst.probability * this.#least)) return undefined;
    return this.#queue.splice(first, 1)[0];
  }

  settle(spelt, probability) {
    this.settled += probability;
    const text = toText(spelt), characters = [...text];
    const isWord = text && !JOINERS.includes(characters.at(-1)) && (this.#typed || !JOINERS.includes(characters[0]));
    if (isWord && probability > 0) {
      const word = this.#typed + text;
      this.#words.set(word, (this.#words.get(word) ?? 0) + probability);
    }
  }

  best() {
    const words = [...this.#words].map(([word, probability]) => ({ word, probability }));
    return words.sort((a, b) => b.probability - a.probability || (a.word < b.word ? -1 : 1)).slice(0, this.#num);
  }
}

/** Tokens to whole words, see ulimi.words. */
class WordWriter {
  stopped = false;
  #tokens; #ending; #typed; #numChars;
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true }); #open = { ...NOTHING }; #words = []; #numWords = 0;

  constructor(tokens, ending, typed) {
    this.#tokens = tokens; this.#ending = ending; this.#typed = typed; this.#numChars = -typed.length;
  }

  push(id, logprob) {
    if (this.stopped) return;
    const isEos = id === this.#tokens.length - 1;
    const text = this.#decoder.decode(arrayOf(this.#tokens[id]), { stream: true });
    const wordEnds = this.#open.num_tokens > 0 && (SPACE.test(text) || isEos);
    if ((wordEnds && this.#endsHere()) || (isEos && this.#ending.end !== "never")) this.stopped = true;
    else {
      if (wordEnds) this.#close();
      const { text: before, logprob: sum, num_tokens } = this.#open;
      this.#open = { text: before + text, logprob: sum + logprob, num_tokens: num_tokens + 1 };
    }
    if (isEos || this.stopped) this.#close();
  }

  /** All words; the last is left out where a limit cut it off, unless it is all that there is. */
  flush(cutOff = true) {
    if (!this.stopped) {
      this.#open.text += this.#decoder.decode();
      if (cutOff && this.#open.num_tokens && this.#numWords) this.#open = { ...NOTHING };
    }
    this.#close();
    const left = this.#typed.length - this.#words.reduce((sum, word) => sum + word.text.length, 0);
    return left > 0 ? [...this.#words, { text: this.#typed.slice(-left), logprob: 0, num_tokens: 0 }] : this.#words;
  }

  #isWord() { return NO_SPACE.test(this.#open.text.slice(Math.max(0, -this.#numChars))); }

  #endsHere() {
    if (this.#ending.max_words && this.#numWords + this.#isWord() >= this.#ending.max_words) return true;
    const written = this.#numChars + this.#open.text.length;
    return this.#ending.end === "sentence" && SENTENCE_END.test(this.#open.text) && written > 0;
  }

  #close() {
    if (this.#open.text || this.#open.num_tokens) {
      this.#words.push(this.#open);
      this.#numWords += this.#isWord();
      this.#numChars += this.#open.text.length;
    }
    this.#open = { ...NOTHING };
  }
}

/** The end of a line that what is written after it could still change, see ulimi.tokenizer. */
function lastPiece(line) {
  let piece = "", end = 0;
  for (const match of line.matchAll(PIECE)) { piece = match[0]; end = match.index + piece.length; }
  return end < line.length ? line.slice(end) : piece;
}

function wordBegun(text) {
  const characters = [...text];
  let start = characters.length;
  while (start && isWordCharacter(characters[start - 1])) start--;
  while (start < characters.length && JOINERS.includes(characters[start])) start++;
  return characters.slice(start).join("");
}

/** Draw an index: temperature, then the nucleus (Holtzman et al. 2020). At temperature 0 the most probable. */
function draw(logs, temperature, topP, chance) {
  let top = -Infinity, total = 0;
  for (const log of logs) if (log > top) top = log;
  if (temperature === 0) return logs.indexOf(top);
  const weights = new Float64Array(logs.length);
  for (let id = 0; id < logs.length; id++) total += weights[id] = Math.exp((logs[id] - top) / temperature);
  // All that have no more than this hold together less than what is left out: only the others need to be sorted.
  const least = 0.99 * (1 - topP) * total / logs.length, ids = [];
  for (let id = 0; id < logs.length; id++) if (weights[id] > least) ids.push(id);
  if (topP < 1) ids.sort((a, b) => weights[b] - weights[a] || a - b);
  let kept = 0, mass = 0;
  while (kept < ids.length && (kept === 0 || mass < topP * total)) mass += weights[ids[kept++]];
  let left = chance() * mass, i = 0;
  while (i < kept - 1 && (left -= weights[ids[i]]) >= 0) i++;
  return ids[i];
}

/** Numbers from 0 to below 1: mulberry32 of a seed, or the machine's own. */
function random(seed) {
  if (seed === undefined) return Math.random;
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

function check(name, value, ok, allowed) {
  if (!ok) throw new Error(`${name} is ${String(value).slice(0, 40)}; allowed: ${allowed}`);
}

function checkText(text) {
  check("the text", text, typeof text === "string", "a string");
}

function refuseOthers(others, allowed) {
  for (const name of Object.keys(others)) throw new Error(`unknown option ${name}; allowed: ${allowed}`);
}
