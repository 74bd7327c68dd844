// What the page asks, answered by `ulimi serve`. In a folder that `ulimi web` writes, here stands local.js instead.

/** Ask for "model", "suggest", "generate" or "score", as JSON: { error } where it was a mistake. */
export async function answer(path, request, signal) {
  let response, value;
  try {
    response = await fetch(path, request === undefined ? {} : {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request), signal,
    });
    value = await response.json();
  } catch {
    throw new Error("The server does not answer: is `ulimi serve` still running?");
  }
  // What stands between may refuse in words of its own.
  return response.ok || value.error !== undefined ? value : { error: `${response.status} ${response.statusText}` };
}
