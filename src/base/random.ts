/** Whole numbers in [0, below), for below <= 2^32; host/ has no part in it: the same seed gives the same numbers. */
export type Random = (below: number) => number;

/** Mulberry32. */
export function random(seed: number): Random {
  let state = seed;
  return (below) => {
    state = (state + 0x6d2b_79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return Math.floor((((t ^ (t >>> 14)) >>> 0) / 2 ** 32) * below);
  };
}
