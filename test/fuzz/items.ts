/** Inputs as a list of items: a kind, a length of 16 bits, and bytes. The last one may be cut short. */
export interface Item {
  readonly kind: number;
  readonly bytes: Uint8Array;
}

const HEAD = 3;

export function itemsIn(input: Uint8Array): Item[] {
  const found: Item[] = [];
  for (let at = 0; at + HEAD <= input.length; ) {
    const end = Math.min(input.length, at + HEAD + lengthAt(input, at));
    found.push({ kind: input[at]!, bytes: input.subarray(at + HEAD, end) });
    at = end;
  }
  return found;
}

export const items = {
  encode: (kind: number, bytes: Uint8Array): Uint8Array =>
    Uint8Array.of(kind, bytes.length & 0xff, bytes.length >> 8, ...bytes),
  boundaries(input: Uint8Array): number[] {
    const found = [0];
    for (let at = 0; at + HEAD <= input.length; at = found.at(-1)!)
      found.push(Math.min(input.length, at + HEAD + lengthAt(input, at)));
    return found;
  },
};

const lengthAt = (input: Uint8Array, at: number): number => input[at + 1]! | (input[at + 2]! << 8);
