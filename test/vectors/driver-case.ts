import type { DmaDirection } from "../../src/driver/dma-api.ts";

/** How test/vectors/driver-cases.ts is written, and what test/support/run-driver-case.ts reads. */

/**
 * Units by frame: flags (P A W D) and COUNT, as "100: P A 3, 101: A". Those of frames that are not named are 0. "max"
 * is the highest COUNT that a map may leave, 0xFFFF less the number of CPUs; "max-1" is one below.
 */
export type Units = string;
/** "100, 102+2": frame 100, and 2 frames from 102 on. */
export type Ranges = string;
export type Piece = readonly [gfn: number, offset: number, length: number];
/** A buffer, or a scatter list. */
export interface Buffers {
  readonly kind: "single" | "sg";
  readonly pieces: readonly Piece[];
  /** "bidirectional" unless said otherwise. */
  readonly direction?: DmaDirection;
}

export type StatusName = "IOERR" | "UNSUPP" | "DEVERR" | "INVAL" | "RANGE" | "NOENT" | "FAULT" | "NOMEM";
/** A status; "unwritten" of a device that does not know the request; or none within the driver's patience. */
export type Answer = "OK" | StatusName | number | "unwritten" | "silence";
/** "mapped", or a DmaMapFailure of src/driver/dma-api.ts. */
export type Result =
  | "mapped"
  | "no-unit"
  | "saturated"
  | "not-seen"
  | "lost"
  | "off"
  | `refused ${StatusName | "unknown"}`;

/** A PIN request that the driver makes. */
export interface PinRequest {
  /** What it asks for, in this order. */
  readonly ranges: Ranges;
  /** At that moment. */
  readonly units: Units;
  /** The host sets P of these frames before it answers. */
  readonly pins: readonly number[];
  readonly answer: Answer;
}

/** `units`: after the step. */
export type Step =
  | {
      readonly map: Buffers;
      readonly asks: readonly PinRequest[];
      readonly result: Result;
      readonly units: Units;
    }
  /** `counted`: how many frames had a mapping. The rest is a bug of the caller's, which the driver reports. */
  | { readonly unmap: Buffers; readonly counted: number; readonly units: Units }
  /** The host changes units, or another CPU does. */
  | { readonly set: Units }
  /** The request that was not answered in time comes back; the host has set P of these. */
  | { readonly late: readonly number[] }
  | { readonly device: "on" | "off" };

export interface Case {
  readonly name: string;
  /** Of docs/abi.md. */
  readonly section: string;
  /** pin_batch_max; 16 unless said otherwise. */
  readonly batchMax?: number;
  /** The device has PIN_DIRTY. */
  readonly pinDirty?: boolean;
  readonly steps: readonly Step[];
}

const FRAME = 4096;

export const single = (...piece: Piece): Buffers => ({ kind: "single", pieces: [piece] });
export const sg = (...pieces: Piece[]): Buffers => ({ kind: "sg", pieces });
/** One buffer of whole frames. */
export const frames = (gfn: number, count = 1): Buffers => single(gfn, 0, count * FRAME);
/** A scatter list with an entry for each frame. */
export const list = (...gfns: number[]): Buffers => sg(...gfns.map((gfn): Piece => [gfn, 0, FRAME]));

/** That the device only reads, or only writes. */
export const toDevice = (buffers: Buffers): Buffers => ({ ...buffers, direction: "to-device" });
export const fromDevice = (buffers: Buffers): Buffers => ({ ...buffers, direction: "from-device" });

/** Of a host that keeps to docs/abi.md: with OK, P is set in every frame that is asked for. */
export const ask = (
  ranges: Ranges,
  units: Units,
  answer: Answer = "OK",
  pins = answer === "OK" ? parseRanges(ranges).flatMap(framesOf) : [],
): PinRequest => ({ ranges, units, pins, answer });
export const map = (buffers: Buffers, units: Units, ...asks: PinRequest[]): Step =>
  fails("mapped", buffers, units, ...asks);
export const fails = (result: Result, buffers: Buffers, units: Units, ...asks: PinRequest[]): Step => ({
  ...{ map: buffers, asks, result, units },
});
export const unmap = (buffers: Buffers, units: Units, counted = touched(buffers).length): Step => ({
  ...{ unmap: buffers, counted, units },
});
export const set = (units: Units): Step => ({ set: units });
export const late = (...pins: number[]): Step => ({ late: pins });
export const device = (state: "on" | "off"): Step => ({ device: state });

export type Range = readonly [gfn: number, count: number];
export const parseRanges = (text: Ranges): Range[] =>
  text.split(", ").map((part) => {
    const [gfn, count = "1"] = part.split("+");
    return [Number(gfn), Number(count)];
  });
export const formatRanges = (ranges: readonly Range[]): Ranges =>
  ranges.map(([gfn, count]) => (count === 1 ? `${gfn}` : `${gfn}+${count}`)).join(", ");
const framesOf = ([gfn, count]: Range): number[] => Array.from({ length: count }, (_, i) => gfn + i);

/** Every frame of every piece, in order: as often as it is counted. */
export const touched = ({ pieces }: Buffers): number[] =>
  pieces.flatMap(([gfn, offset, length]) => framesOf([gfn, Math.ceil((offset + length) / FRAME)]));
