import { parseBdf } from "../../src/base/units.ts";
import type { Blocked } from "./fuzz.ts";
import { type Fault, NVME } from "./machine.ts";
import type { Piece } from "./shadow.ts";

const WORD = 4;

/**
 * What QEMU's trace says of commands whose DMA is blocked, in part or as a whole. QEMU cannot map a blocked piece (one
 * fault, at its first byte), so moves it word by word through its bounce buffer (one fault each): 129 faults for 512
 * bytes. There is one such buffer, so a second piece waits, after a first attempt (one more fault), until the first is
 * done; memory is read before the transfer, and written after it. softmmu/physmem.c of QEMU, address_space_map().
 */
function* expectedFaults(blocked: readonly Blocked[]): Generator<Fault> {
  const source = parseBdf(NVME)!;
  for (const { write, pieces } of blocked) {
    const mapped = ({ address }: Piece): Fault => ({ source, address, write });
    const words = ({ address, length }: Piece): Fault[] =>
      Array.from({ length: length / WORD }, (_, i) => ({ source, address: address + i * WORD, write }));
    const [first, second] = pieces as [Piece, Piece?];
    yield mapped(first);
    if (second && write) yield mapped(second);
    yield* words(first);
    if (!second) continue;
    if (!write) yield mapped(second);
    yield mapped(second);
    yield* words(second);
  }
}

/** How many faults there should be, and how many of the trace are those, in order, up to the first that is not. */
export function compareFaults(faults: readonly Fault[], blocked: readonly Blocked[]) {
  let expected = 0;
  let same = 0;
  for (const { source, address, write } of expectedFaults(blocked)) {
    const fault = faults[expected];
    const equal = fault?.source === source && fault.address === address && fault.write === write;
    if (equal && same === expected) same++;
    expected++;
  }
  return { expected, same };
}
