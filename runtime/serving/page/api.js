// The server's API: the model, the number of tokens of a text, and streams. Addresses are relative to the page's own.

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function call(address, key, body, signal) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const request = { headers, signal, credentials: "omit" };
  if (body) {
    headers["content-type"] = "application/json";
    Object.assign(request, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(address, request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", 0);
  }
  if (response.ok) return response;
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // No error in OpenAI's form; a proxy answered.
  }
  throw new ApiError(message, response.status);
}

export async function model(key) {
  const response = await call("v1/models", key);
  return (await response.json()).data[0];
}

export async function countTokens(text, key, signal) {
  const response = await call("tokenize", key, { prompt: text }, signal);
  return (await response.json()).count;
}

// Yields the chunks of an answer.
export async function* stream(address, body, key, signal) {
  const response = await call(address, key, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message, 200);
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("The connection was lost before the answer was complete.", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ApiError("The answer ended before it was complete.", 0);
}
