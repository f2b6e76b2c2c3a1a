/**
 * The pipe transport's records (transport/pipe.ts): an opcode, its operands, and for some a tail of as many bytes as
 * the last operand says. Small numbers on purpose: random bytes are to mean something.
 */
import { le16, le32, le64bits, struct, u8, type Value } from "./struct.ts";

const none = struct("pipe_none", 0, {});
const access = struct("pipe_access", 3, { offset: le16(0), size: u8(2) });
const accessValue = struct("pipe_access_value", 11, { offset: le16(0), size: u8(2), value: le64bits(3) });
const frame = struct("pipe_frame", 2, { gfn: le16(0) });
const amount = struct("pipe_amount", 1, { amount: u8(0) });

/** In the order of their opcodes. `size` of an access: its two low bits, as a power of two. */
export const PIPE_RECORDS = {
  // What the VMM's bus does to the function. Offsets into the BAR go beyond its end.
  configRead: access,
  configWrite: accessValue,
  barRead: access,
  barWrite: accessValue,
  machineReset: none,
  /** The VMM's memory map: bit n, block n of guest RAM is there; bit n + 4: it is backed by other memory. */
  memoryMap: amount,

  // What a driver does.
  /** Stores into guest RAM; `length` bytes follow. */
  write: struct("pipe_write", 5, { gpa: le32(0), length: u8(4) }),
  /** Reset, negotiate, enable the request queue. Bits of `without` take features away; see transport/pipe.ts. */
  start: struct("pipe_start", 1, { without: u8(0) }),
  pinOn: struct("pipe_pin_on", 2, { levels: u8(0), flags: u8(1) }),
  pinControl: amount,
  /** Counts a mapping in the table, and sends a PIN request when P is clear. */
  map: frame,
  unmap: frame,
  /** A PIN request; `count` modulo 16 ranges (pipe_range) follow. */
  pin: struct("pipe_pin", 3, { endpoint: le16(0), count: u8(2) }),
  /** A request: `length` bytes follow, of which `split` lie in a first buffer. `hold`, odd: without a kick. */
  send: struct("pipe_send", 4, { hold: u8(0), room: u8(1), split: u8(2), length: u8(3) }),
  /** A raw descriptor, and a raw head in the available ring. */
  describe: struct("pipe_describe", 13, {
    index: u8(0),
    addr: le32(1),
    len: le32(5),
    flags: le16(9),
    next: le16(11),
  }),
  offer: struct("pipe_offer", 2, { head: le16(0) }),
  /** Queue `amount`, which need not exist. */
  kick: amount,

  // What the host and the assigned device do.
  /** An unpin pass; after `amount` slices something else may come. 0: all of it. */
  pass: amount,
  /** Milliseconds. */
  advance: amount,
  /** Pages that the host lets be pinned from now on (255: any), and whether it fails with ENOMEM (even) or EPERM. */
  hostPins: struct("pipe_host_pins", 2, { pages: u8(0), errno: u8(1) }),
  /** Pages that the host releases before it refuses (255: any). */
  hostReleases: amount,
  /** The device opens or closes a DMA window. */
  window: none,
  /** The device touches a frame. */
  touch: frame,
} as const;

export type PipeOpcode = keyof typeof PIPE_RECORDS;
export type PipeOperands<K extends PipeOpcode> = Value<(typeof PIPE_RECORDS)[K]["fields"]>;
/** An opcode byte is taken modulo their number, so that each names a record. */
export const PIPE_OPCODES = Object.keys(PIPE_RECORDS) as readonly PipeOpcode[];

export const pipeRanges = (count: number): number => count % 16;
/** One range of a `pin` record. */
export const PipeRange = struct("pipe_range", 3, { gfn: le16(0), nrFrames: u8(2) });

/** Bytes that follow a record's operands. */
export function pipeTail(opcode: PipeOpcode, operands: { length?: number; count?: number }): number {
  if (opcode === "pin") return PipeRange.size * pipeRanges(operands.count ?? 0);
  return operands.length ?? 0;
}
