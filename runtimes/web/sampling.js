// Which token comes next, of logits (V,) as a Float32Array. The same steps as in runtimes/generation/sampling.py.

export function likeliest(logits) {
  let best = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
  return best;
}

/** A function of logits that chooses a token. */
export function sampler({ temperature = 0, topK = 0, topP = 1, seed } = {}) {
  if (!(temperature >= 0) || !(topK >= 0) || !(topP > 0 && topP <= 1)) {
    throw new Error(`temperature ${temperature}, topK ${topK}, topP ${topP}: they need >= 0, >= 0, and above 0 up to 1`);
  }
  if (temperature === 0) return likeliest;
  const random = generator(seed ?? crypto.getRandomValues(new Uint32Array(1))[0]);
  return (logits) => {
    const top = logits[likeliest(logits)];
    let kept = Array.from(logits, (logit, id) => ({ id, weight: Math.exp((logit - top) / temperature) }));
    if (topK || topP < 1) kept.sort((a, b) => b.weight - a.weight);
    if (topK) kept = kept.slice(0, topK);
    if (topP < 1) kept = nucleus(kept, topP);
    let left = random() * total(kept);
    return (kept.find(({ weight }) => (left -= weight) <= 0) ?? kept.at(-1)).id;
  };
}

const total = (kept) => kept.reduce((sum, { weight }) => sum + weight, 0);

/** The fewest likeliest tokens that together have a share of `topP`. */
function nucleus(kept, topP) {
  let left = topP * total(kept);
  const end = kept.findIndex(({ weight }) => (left -= weight) <= 0);
  return end < 0 ? kept : kept.slice(0, end + 1);
}

/** Numbers from 0 to 1, always the same ones of a seed. Source: mulberry32, public domain. */
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}
