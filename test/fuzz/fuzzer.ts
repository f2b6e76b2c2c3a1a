/**
 * A mutating fuzzer with coverage guidance. An input that reaches new code joins the pool that others are made from.
 * Everything random comes from the seed; how far a run gets depends on the time it has.
 */
import { random } from "../support/random.ts";
import { takeCoverage } from "./coverage.ts";

/** As random(). */
export type Next = (below: number) => number;

export interface Target {
  readonly name: string;
  /** Throws for a finding. Anything it does must depend on `input` alone. */
  run(input: Uint8Array): void;
  /** A piece that means something to the target, to put into inputs. */
  piece(next: Next): Uint8Array;
  /** Where pieces begin and end in `input`. */
  boundaries(input: Uint8Array): readonly number[];
  /** What `input` does, a line for each step. */
  explain(input: Uint8Array): string[];
}

export interface Finding {
  /** Made as small as it gets while it fails with the same message. */
  readonly input: Uint8Array;
  readonly error: Error;
}

export interface FuzzOptions {
  /** How long: a time, or a number of inputs, which is the same on a machine that is busy. */
  readonly limit: { readonly seconds: number } | { readonly inputs: number };
  readonly seed: number;
  /** Inputs to begin with. */
  readonly corpus: readonly Uint8Array[];
  /** Told of every input that reached new code. */
  readonly onFresh?: (input: Uint8Array, blocks: readonly string[]) => void;
}

export interface FuzzResult {
  readonly inputs: number;
  readonly blocks: number;
  readonly pool: number;
  readonly finding: Finding | undefined;
}

const INPUT_MAX = 2048;
/** Numbers that break things. */
const EDGES = [
  0,
  1,
  2,
  4,
  8,
  15,
  16,
  31,
  32,
  63,
  64,
  127,
  128,
  224,
  254,
  255,
  256,
  1023,
  1024,
  4096,
  0xffff,
  2 ** 31,
  2 ** 32 - 1,
];

export function failureOf(target: Target, input: Uint8Array): Error | undefined {
  try {
    target.run(input);
    return undefined;
  } catch (error) {
    return error instanceof Error ? error : new Error(String(error));
  }
}

/** Numbers in a message differ from input to input; the mistake is the same. */
const kindOf = (error: Error): string =>
  `${error.name} ${error.message.split("\n")[0]!.replace(/\b(0x)?[\da-f]*\d[\da-f]*\b/g, "N")}`;

/** Leave out and zero what is not needed for `keeps` to hold: whole pieces first, from the last on. */
export function minimized(
  target: Target,
  input: Uint8Array,
  keeps: (input: Uint8Array) => boolean,
): Uint8Array {
  let best = input;
  const without = (from: number, to: number): boolean => {
    const shorter = joined(best.subarray(0, from), best.subarray(to));
    const kept = shorter.length < best.length && keeps(shorter);
    if (kept) best = shorter;
    return kept;
  };
  const ends = target.boundaries(best);
  for (let i = ends.length - 1; i > 0; i--) without(ends[i - 1]!, ends[i]!);
  for (let size = 1 << 6; size >= 1; size >>= 1)
    for (let at = 0; at < best.length; ) if (!without(at, at + size)) at += size;
  for (let at = 0; at < best.length; at++) {
    const simpler = best.slice();
    simpler[at] = 0;
    if (best[at] !== 0 && keeps(simpler)) best = simpler;
  }
  return best;
}

function joined(...parts: Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(parts.reduce((sum, p) => sum + p.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

class Mutator {
  readonly #target: Target;
  readonly #next: Next;
  constructor(target: Target, next: Next) {
    this.#target = target;
    this.#next = next;
  }

  from(pool: readonly Uint8Array[]): Uint8Array {
    // Half of the time one of the latest: what reached new code last is worth another step.
    const pick = () => {
      const recent = this.#next(2) === 0 ? Math.min(8, pool.length) : pool.length;
      return pool[pool.length - 1 - this.#next(recent)] ?? new Uint8Array(1);
    };
    let input = pick();
    for (let n = 1 + this.#next(8); n > 0; n--) input = this.#changed(input, pick);
    return input.slice(0, INPUT_MAX);
  }

  #changed(input: Uint8Array, pick: () => Uint8Array): Uint8Array {
    const kind = this.#next(12);
    if (kind < 3) return this.#byteChanged(input, kind);
    // Mostly whole pieces: what is shifted by a byte means something else to its end.
    const [at, until] = this.#range(input);
    const [from, to] = [input.subarray(0, at), input.subarray(until)];
    if (kind === 3) return joined(from, to);
    if (kind === 4) return joined(from, input.subarray(at, until), input.subarray(at));
    if (kind === 5) {
      const other = pick();
      const [start, end] = this.#range(other);
      return joined(from, other.subarray(start, end), input.subarray(at));
    }
    return joined(from, this.#target.piece(this.#next), input.subarray(at));
  }

  #byteChanged(input: Uint8Array, kind: number): Uint8Array {
    const at = this.#next(input.length + 1);
    if (kind === 0) return this.#with(input, at, [(input[at] ?? 0) ^ (1 << this.#next(8))]);
    if (kind === 1) return this.#with(input, at, [this.#next(256)]);
    const edge = EDGES[this.#next(EDGES.length)]!;
    return this.#with(input, at, [edge, edge >>> 8, edge >>> 16, edge >>> 24].slice(0, 1 << this.#next(3)));
  }

  #range(input: Uint8Array): [from: number, to: number] {
    if (this.#next(8) === 0) {
      const from = this.#next(input.length + 1);
      return [from, Math.min(input.length, from + 1 + this.#next(16))];
    }
    const ends = this.#target.boundaries(input);
    const first = this.#next(ends.length);
    return [ends[first] ?? 0, ends[first + this.#next(4)] ?? input.length];
  }

  #with(input: Uint8Array, at: number, bytes: readonly number[]): Uint8Array {
    const changed = input.slice();
    bytes.forEach((byte, i) => {
      if (at + i < changed.length) changed[at + i] = byte;
    });
    return changed;
  }
}

/** Inputs between two looks at the coverage: a look costs as much as a few inputs. */
const BATCH = 32;

export function fuzz(target: Target, { limit, seed, corpus, onFresh }: FuzzOptions): FuzzResult {
  takeCoverage(); // what ran before is no input's doing
  const mutator = new Mutator(target, random(seed));
  const seen = new Set<string>();
  const pool: Uint8Array[] = [];
  let inputs = 0;
  let finding: Finding | undefined;
  /** Run them; true when one failed. */
  const failed = (batch: readonly Uint8Array[]): boolean =>
    batch.some((input) => {
      inputs++;
      const error = failureOf(target, input);
      if (error) finding = smallest(target, input, error);
      return error !== undefined;
    });
  /** Run them, and keep those that reach new code: found by halves, because each look takes time. */
  const explore = (batch: readonly Uint8Array[]): boolean => {
    if (failed(batch)) return true;
    const fresh = takeCoverage().filter((block) => !seen.has(block));
    if (fresh.length === 0) return false;
    if (batch.length > 1) {
      const half = batch.length >> 1;
      return explore(batch.slice(0, half)) || explore(batch.slice(half));
    }
    for (const block of fresh) seen.add(block);
    pool.push(batch[0]!);
    onFresh?.(batch[0]!, fresh);
    return false;
  };

  let over = corpus.some((input) => explore([input]));
  const began = performance.now();
  const goesOn = () =>
    "inputs" in limit ? inputs < limit.inputs : performance.now() < began + 1000 * limit.seconds;
  while (!over && goesOn()) over = explore(Array.from({ length: BATCH }, () => mutator.from(pool)));
  return { inputs, blocks: seen.size, pool: pool.length, finding };
}

function smallest(target: Target, input: Uint8Array, error: Error): Finding {
  const small = minimized(target, input, (i) => {
    const other = failureOf(target, i);
    return other !== undefined && kindOf(other) === kindOf(error);
  });
  return { input: small, error: failureOf(target, small) ?? error };
}
