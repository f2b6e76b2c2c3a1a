import type { Trace, TraceEvent } from "./trace.ts";

/**
 * What no policy can beat that pins on request: Belady's choice, made with knowledge of all that comes (L. A. Belady, A
 * study of replacement algorithms for a virtual-storage computer, 1966).
 *
 * A frame must be pinned while it is mapped. Between two mappings it is kept, which costs its time, or let go of at once,
 * and then the operation that maps it again has to ask. All frames of one operation are asked for together, so letting go
 * of all the gaps that it ends costs no more than letting go of one, and the savings of operations add up: the best use
 * of so many operations that ask are those that save most. Operations with a frame that was never pinned ask in any case.
 *
 * Speculative pins can come out below: frames that nobody has asked for yet join an operation that asks.
 */
export class Optimal {
  /** Operations that ask whatever is kept, and when nothing is. */
  readonly asksMin: number;
  readonly asksMax: number;
  /** With so many operations more than the least that ask. */
  readonly #frameSeconds: Float64Array;

  constructor(trace: Trace) {
    const { forced, savings, mapped, gaps } = scan(trace);
    const sorted = Float64Array.from(savings).sort().reverse();
    this.asksMin = forced;
    this.asksMax = forced + sorted.length;
    this.#frameSeconds = new Float64Array(sorted.length + 1);
    let left = mapped + gaps;
    this.#frameSeconds[0] = left / 1e9;
    for (const [i, saving] of sorted.entries()) {
      left -= saving;
      this.#frameSeconds[i + 1] = left / 1e9;
    }
  }

  /** The least pinned frame-seconds when so many operations may ask; undefined for fewer than have to. */
  frameSeconds(asks: number): number | undefined {
    if (asks < this.asksMin) return undefined;
    return this.#frameSeconds[Math.min(asks, this.asksMax) - this.asksMin];
  }

  /** At most `points` points of the curve, evenly spread. */
  curve(points: number): [asks: number, frameSeconds: number][] {
    const span = this.asksMax - this.asksMin;
    const steps = Math.min(points - 1, span);
    return Array.from({ length: steps + 1 }, (_, i) => {
      const asks = this.asksMin + (steps === 0 ? 0 : Math.round((i * span) / steps));
      return [asks, this.frameSeconds(asks)!];
    });
  }
}

/** In ns. `gaps`: what is kept when only those operations ask that have to. */
interface Scanned {
  readonly forced: number;
  readonly savings: readonly number[];
  readonly mapped: number;
  readonly gaps: number;
}

interface Frame {
  count: number;
  /** When it was mapped, or unmapped. */
  since: number;
}

function scan({ events }: Trace): Scanned {
  const frames = new Map<number, Frame>();
  const savings: number[] = [];
  const end = events.at(-1)?.time ?? 0;
  let [forced, mapped] = [0, 0];
  for (const event of events) {
    if (event.kind === "unmap") mapped += unmap(event, frames);
    else {
      const { gap, fresh } = map(event, frames);
      if (fresh) forced++;
      else if (gap > 0) savings.push(gap);
    }
  }
  for (const { count, since } of frames.values()) if (count > 0) mapped += end - since;
  return { forced, savings, mapped, gaps: savings.reduce((a, b) => a + b, 0) };
}

/** How long the frames of an operation had not been mapped, and whether one never was. */
function map({ ranges, time }: TraceEvent, frames: Map<number, Frame>): { gap: number; fresh: boolean } {
  let [gap, fresh] = [0, false];
  for (const [first, n] of ranges)
    for (let gfn = first; gfn < first + n; gfn++) {
      const frame = frames.get(gfn);
      if (!frame) {
        fresh = true;
        frames.set(gfn, { count: 1, since: time });
      } else if (frame.count++ === 0) {
        gap += time - frame.since;
        frame.since = time;
      }
    }
  return { gap, fresh };
}

/** For how long those frames were mapped that are not any more. */
function unmap({ ranges, time }: TraceEvent, frames: Map<number, Frame>): number {
  let mapped = 0;
  for (const [first, n] of ranges)
    for (let gfn = first; gfn < first + n; gfn++) {
      const frame = frames.get(gfn)!;
      if (--frame.count > 0) continue;
      mapped += time - frame.since;
      frame.since = time;
    }
  return mapped;
}
