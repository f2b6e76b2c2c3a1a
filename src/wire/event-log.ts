/**
 * The event log that `run --record FILE` writes: what a guest mapped, and what the host had pinned. A line of text each,
 * behind a header line of JSON; the order of lines is that of their writers, not of time.
 *
 *     {"format":"coiommu-log/1","memoryMiB":1024,…}
 *     1203400 0 0000:00:04.0 map 1a2b 1a2d+3          ns since the start, CPU, function, event, frames in hex
 *     1203950 - - pinned 1a2b                         of the host
 *     # lost 17                                       events that should be here
 */
import { type Bdf, formatBdf, GFN_LIMIT, type Gfn, parseBdf } from "../base/units.ts";

/** [first, number of frames]. */
export type LoggedRange = readonly [first: number, frames: number];

export interface LogHeader {
  readonly format: "coiommu-log/1";
  readonly memoryMiB: number;
  readonly machine: string;
  readonly workload: string;
}
export const LOG_FORMAT = "coiommu-log/1";

const KINDS = ["map", "unmap", "pinned", "unpinned"] as const;
export interface LoggedEvent {
  /** Since the recording began, in ns. */
  readonly time: number;
  readonly kind: (typeof KINDS)[number];
  /** Of the guest's events; null of the host's. */
  readonly source: { readonly cpu: number; readonly endpoint: Bdf } | null;
  readonly ranges: readonly LoggedRange[];
}

export function formatEvent({ time, kind, source, ranges }: LoggedEvent): string {
  const who = source ? `${source.cpu} ${formatBdf(source.endpoint)}` : "- -";
  const frames = ranges.map(([first, n]) => first.toString(16) + (n === 1 ? "" : `+${n}`));
  return `${Math.round(time)} ${who} ${kind} ${frames.join(" ")}\n`;
}

export const formatLost = (events: number): string => `# lost ${events}\n`;

/** More than any list of a driver has. */
export const RANGES_MAX = 65_536;
const RANGE = /^([0-9a-f]{1,11})(?:\+(\d{1,12}))?$/;

/** Undefined for a line that is none. */
export function parseEvent(line: string): LoggedEvent | undefined {
  const [time = "", cpu = "", bdf = "", kind, ...words] = line.split(" ");
  if (!/^\d{1,16}$/.test(time) || !isKind(kind) || words.length === 0 || words.length > RANGES_MAX) return;
  const endpoint = parseBdf(bdf);
  const hosts = cpu === "-" && bdf === "-";
  if (!hosts && (endpoint === undefined || !/^\d{1,4}$/.test(cpu))) return;
  const ranges: LoggedRange[] = [];
  for (const word of words) {
    const match = RANGE.exec(word);
    const [first, n] = match ? [Number.parseInt(match[1]!, 16), Number(match[2] ?? 1)] : [0, 0];
    if (n < 1 || first + n > GFN_LIMIT) return;
    ranges.push([first, n]);
  }
  const source = hosts ? null : { cpu: Number(cpu), endpoint: endpoint! };
  return { time: Number(time), kind, source, ranges };
}

const isKind = (word: string | undefined): word is LoggedEvent["kind"] =>
  (KINDS as readonly (string | undefined)[]).includes(word);

/** Collects lines, and hands them on in pieces. */
export class EventLogWriter {
  readonly #began: number;
  readonly #write: (lines: string) => void;
  #lines = "";
  // Of the line that is being put together.
  #time = 0;
  #kind: LoggedEvent["kind"] = "map";
  #ranges: [first: number, frames: number][] = [];

  /** `began`: when the recording did. `write` is given whole lines. */
  constructor(began: number, write: (lines: string) => void) {
    this.#began = began;
    this.#write = write;
  }

  add(event: LoggedEvent): void {
    this.#lines += formatEvent({ ...event, time: event.time - this.#began });
    if (this.#lines.length >= PIECE) this.#pass();
  }

  /** Of the host, frame by frame: those of one moment are one line. */
  addFrame(gfn: Gfn, kind: LoggedEvent["kind"], time: number): void {
    if (time !== this.#time || kind !== this.#kind) this.#endLine();
    [this.#time, this.#kind] = [time, kind];
    const last = this.#ranges.at(-1);
    if (last && gfn === last[0] + last[1]) last[1]++;
    else this.#ranges.push([gfn, 1]);
    if (this.#ranges.length === RANGES_MAX) this.#endLine();
  }

  /** What has been added so far is handed on. */
  flush(): void {
    this.#endLine();
    if (this.#lines !== "") this.#pass();
  }

  #endLine(): void {
    const ranges = this.#ranges;
    this.#ranges = [];
    if (ranges.length > 0) this.add({ time: this.#time, kind: this.#kind, source: null, ranges });
  }

  #pass(): void {
    const lines = this.#lines;
    this.#lines = "";
    this.#write(lines);
  }
}

/** Characters handed on at once. */
const PIECE = 65_536;
