// What ulimi.js computes with, from lib/: ONNX Runtime Web, and Hugging Face's tokenizers.

import * as ort from "./lib/ort.wasm.min.js";
import { Tokenizer } from "./lib/tokenizers.min.js";

// Its other half is called .mjs at home, which some web servers do not know for JavaScript.
ort.env.wasm.wasmPaths = { mjs: new URL("./lib/ort-wasm-simd-threaded.js", import.meta.url).href };

/** Its program, packed. */
export const wasm = new URL("./lib/ort-wasm-simd-threaded.wasm.gz", import.meta.url);

export { ort, Tokenizer };
