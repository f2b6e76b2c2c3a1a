/**
 * The memory that the processes of a stress run share: RAM of a guest whose frames are mapped, its table, and words
 * through which guests and host meet. guest.c has the same offsets.
 */
import koffi from "koffi";
import type { Gpa } from "../../src/base/units.ts";
import { buildTable, type TableGeometry } from "../../src/driver/table.ts";
import { FdMapper } from "../../src/host/mapping.ts";
import type { GuestMemory, GuestRegion } from "../../src/memory/guest-memory.ts";

export const RAM = 16 * 2 ** 20;
/** What is mapped: frames around the boundary of two leaves. */
export const FIRST = 992;
export const FRAMES = 64;
export const FRAMES_PER_MAP_MAX = 4;
/** Mappings that a guest has at a time. */
export const MAPPINGS = 2;
/** Table pages lie from here on. */
const TABLE = 12 * 2 ** 20;

// Words of everybody.
const CONTROL = 8 * 2 ** 20;
/** Processes that are set up; that have done what they must, and go on until all have; guests that have unmapped all. */
export const READY = CONTROL;
export const DONE = CONTROL + 64;
export const GONE = CONTROL + 128;
/** A word per frame: the pinner adds 1 when it pins, and 1 when it releases. Odd: the page is held. */
const HELD = CONTROL + 4096;
export const heldWord = (gfn: number): number => HELD + 4 * gfn;
/** A cache line per guest: the question's state, first frame, number of frames, and the answer's status. */
const MAILBOXES = CONTROL + 16 * 4096;
export const mailbox = (guest: number) => {
  const at = MAILBOXES + 64 * guest;
  return { state: at, gfn: at + 4, frames: at + 8, status: at + 12 };
};
export const IDLE = 0;
export const ASKED = 1;
export const ANSWERED = 2;

/** What a process is told, as JSON or as arguments. */
export interface Orders {
  readonly geometry: TableGeometry;
  /** Guests, and all processes. */
  readonly guests: number;
  readonly processes: number;
  readonly id: number;
  /** Of each guest, and of the host, at least. */
  readonly maps: number;
  readonly unpins: number;
  readonly seed: number;
  /** Between the starts of two unpin passes, at least. */
  readonly pauseMs: number;
  readonly twin: Twin;
}
export type Twin = "none" | "torn-unpin" | "plain-counting";

/** What a guest says at its end. */
export interface GuestTotals {
  readonly mapped: number;
  readonly unmapped: number;
  readonly asked: number;
  /** Frames that were not held all the time that they were mapped with P seen. */
  readonly lost: number;
  /** Mappings that failed. */
  readonly failed: number;
}
export interface HostTotals {
  readonly pinned: number;
  readonly unpinned: number;
  readonly passes: number;
}

/** Takes the fd over. */
export const ram = (mapper: FdMapper, fd: number): GuestRegion => ({
  gpa: 0 as Gpa,
  size: RAM,
  ...mapper.map(fd, 0, RAM),
});
/** In a process that inherited the file. */
export const inheritedRam = (): GuestRegion => ram(new FdMapper(), 3);

export function makeTable(memory: GuestMemory): TableGeometry {
  let next = TABLE;
  return buildTable(memory, {
    allocate(frames) {
      next += frames * 4096;
      return (next - frames * 4096) as Gpa;
    },
    free() {},
  });
}

/** Let another process run, which is quicker than to sleep. SAFETY: no memory. */
export const rest: () => number = koffi.load(null).func("int sched_yield()");

export function meet(memory: GuestMemory, word: number, parties: number): void {
  memory.add32(word, 1);
  while (memory.load32(word) < parties) rest();
}
