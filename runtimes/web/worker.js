// A classic worker around engine.js: one question after the other; only `stop` may come in between.
importScripts("sha256.js");
let engine, queue = Promise.resolve();

onmessage = ({ data }) => {
  if (data.call === "stop") engine?.stop();
  else queue = queue.then(() => answer(data));
};

async function answer({ number, call, ...question }) {
  const tell = (message) => postMessage({ number, ...message });
  try {
    if (call === "open") {
      const { open } = await import("./engine.js");
      engine = await open(question, (progress) => postMessage({ progress }));
      tell({ result: engine.facts });
    } else {
      tell({ result: await engine.generate(question.prompt, question.options, (piece) => tell({ piece })) });
    }
  } catch (error) {
    tell({ error: error?.message ?? String(error) });
  }
}
