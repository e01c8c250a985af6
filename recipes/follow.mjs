// Prints each message of a stream, for ever: BASE=http://127.0.0.1:8080 TOKEN=… node follow.mjs readings [LAST_ID]
// JSON.parse rounds whole numbers above 2^53.
import { setTimeout as pause } from "node:timers/promises";

async function* messages(url, token) {
  for (;;) {
    const headers = { Authorization: `Bearer ${token}` };
    const answer = await fetch(url, { headers, signal: AbortSignal.timeout(60_000) }).catch(() => null);
    if (answer && !answer.ok && answer.status < 500 && ![408, 429].includes(answer.status)) throw new Error(await answer.text());
    const page = answer?.ok ? await answer.json().catch(() => null) : null;
    if (page) {
      yield* page.messages;
      url = new URL(page.next, url);
    }
    if (!page?.messages.length) await pause(1000 * (Number(answer?.headers.get("Retry-After")) || 1));
  }
}

const [stream, last = 0] = process.argv.slice(2); // the id of the last message that was dealt with: keep it with the results
for await (const message of messages(`${process.env.BASE}/${stream}?wait=30&limit=1000&after=${last}`, process.env.TOKEN))
  console.log(JSON.stringify(message));
