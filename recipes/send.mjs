// Sends each line of stdin, which is JSON, until it is on disk, and prints its id. A line that is refused is told, and left:
// BASE=http://127.0.0.1:8080 TOKEN=… node send.mjs readings < lines
import { randomUUID } from "node:crypto";
import { createInterface } from "node:readline";
import { setTimeout as pause } from "node:timers/promises";

// The key makes it safe to send again when the outcome is unknown. Throws what will never be taken.
async function send(url, token, body) {
  const headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/json", "Idempotency-Key": randomUUID() };
  for (let seconds = 0.1; ; seconds = Math.min(2 * seconds, 30)) {
    const answer = await fetch(url, { method: "POST", headers, body, signal: AbortSignal.timeout(60_000) }).catch(() => null);
    const text = await answer?.text().catch(() => null);
    if (answer?.ok && text) return JSON.parse(text);
    if (answer && answer.status < 500 && ![200, 201, 408, 425, 429].includes(answer.status)) throw new Error(text);
    await pause(1000 * (Number(answer?.headers.get("Retry-After")) || seconds));
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  try {
    console.log((await send(`${process.env.BASE}/${process.argv[2]}`, process.env.TOKEN, line)).id);
  } catch (error) {
    console.error(`refused: ${line.slice(0, 100)}: ${error.message}`);
    process.exitCode = 1;
  }
}
