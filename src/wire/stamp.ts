/**
 * Contents that say what they are: the number of a block, a packet or a piece of a buffer, and its generation,
 * followed by bytes that depend on both and on the position. What the workloads write, and compare byte by byte.
 */
import { le64, struct } from "./struct.ts";

export const Stamp = struct("stamp", 16, { number: le64(0), generation: le64(8) });

const mix = (x: number): number => {
  const y = Math.imul(x ^ (x >>> 16), 0x85eb_ca6b);
  return Math.imul(y ^ (y >>> 13), 0xc2b2_ae35);
};
const seedOf = (number: number, generation: number): number =>
  mix(number ^ mix(Math.floor(number / 2 ** 32) ^ mix(generation)));
const wordAt = (seed: number, at: number): number => {
  const x = Math.imul(seed ^ at, 0x9e37_79b1);
  return (x ^ (x >>> 15)) >>> 0;
};

const viewOf = (b: Uint8Array) => new DataView(b.buffer, b.byteOffset, b.byteLength);

/** Fill `into`, of 16 bytes or more. */
export function stamp(into: Uint8Array, number: number, generation: number): void {
  Stamp.write(into, { number, generation });
  const view = viewOf(into);
  const seed = seedOf(number, generation);
  let at = Stamp.size;
  for (; at + 4 <= into.length; at += 4) view.setUint32(at, wordAt(seed, at), true);
  for (; at < into.length; at++) into[at] = wordAt(seed, at);
}

/** Whether `bytes` are what stamp() writes, all of them. */
export function isStamped(bytes: Uint8Array, number: number, generation: number): boolean {
  const view = viewOf(bytes);
  const head = Stamp.read(bytes);
  if (head.number !== number || head.generation !== generation) return false;
  const seed = seedOf(number, generation);
  let at = Stamp.size;
  for (; at + 4 <= bytes.length; at += 4) if (view.getUint32(at, true) !== wordAt(seed, at)) return false;
  for (; at < bytes.length; at++) if (bytes[at] !== (wordAt(seed, at) & 0xff)) return false;
  return true;
}
