import { Readable } from "node:stream";
import { finished, pipeline } from "node:stream/promises";
import { createGunzip } from "node:zlib";
import { UserError } from "../base/errors.ts";
import type { Nanoseconds } from "../base/units.ts";
import { monotonicClock } from "../host/clock.ts";
import type { GuestAgent } from "../machine/qemu/agent.ts";
import { readGuestFile } from "../machine/qemu/guest-file.ts";
import { eachLine } from "../machine/qemu/lines.ts";
import { findMark, TRACE_LINE_MAX, type TraceBounds, TraceReader } from "../machine/qemu/trace-text.ts";
import { EventLogWriter, formatLost } from "../wire/event-log.ts";
import { demand, MAPS_TRACE } from "./guest-side.ts";
import type { MachineOptions } from "./machine.ts";
import type { Recording } from "./recording.ts";

/** Where guest/agent/init writes marks: a buffer of its own, to be read while the other is written to. */
const MARKS_TRACE = "/sys/kernel/tracing/instances/coiommu_marks";
const TEXT = "/run/coiommu-maps.gz";

/** Of the guest's memory: holds some 29,000 events per MiB. */
const BUFFER_SHARE = 1 / 8;
/** An event takes 36 bytes of the buffer, and about 100 of text. */
const TEXT_PER_BUFFER = 4;
/** The quickest of so many tells how the clocks relate. */
const MARKS_TRIED = 20;
const MARK_MS_MAX = 10_000;
const TEXT_MS_MAX = 600_000;
/** Characters; those of 64 CPUs are a sixth of it. */
const STATS_MAX = 65_536;

/** One moment by both clocks. */
interface Anchor {
  readonly guest: Nanoseconds;
  readonly host: Nanoseconds;
}

type Settings = Pick<MachineOptions, "memoryMiB" | "cpus" | "onWarning" | "onProgress"> &
  Pick<TraceBounds, "frames">;

/**
 * What a VM's guest maps and unmaps, for a recording: the module's trace events, kept in the guest's memory until its
 * work is done. Its clock is related to ours at both ends.
 */
export class GuestRecording {
  readonly #agent: GuestAgent;
  readonly #recording: Recording;
  readonly #settings: Settings;
  readonly #first: Anchor;

  private constructor(agent: GuestAgent, recording: Recording, settings: Settings, first: Anchor) {
    this.#agent = agent;
    this.#recording = recording;
    this.#settings = settings;
    this.#first = first;
  }

  /** Before loadDrivers(). Throws UserError for a guest without tracing. */
  static async begin(agent: GuestAgent, recording: Recording, settings: Settings): Promise<GuestRecording> {
    const kib = Math.floor((settings.memoryMiB * 1024 * BUFFER_SHARE) / settings.cpus);
    // Without overwrite what is lost are the last events, so that no unmap is without its map.
    const script = `set -e
echo 0 >/sys/kernel/tracing/options/record-cmd
mkdir ${MARKS_TRACE} ${MAPS_TRACE}
for i in ${MARKS_TRACE} ${MAPS_TRACE}; do cd $i; echo mono >trace_clock; echo 0 >options/irq-info; done
echo 0 >options/overwrite
echo ${kib} >buffer_size_kb`;
    await demand(agent, script, "making room for the recording");
    return new GuestRecording(agent, recording, settings, await anchor(agent));
  }

  /** When nothing is mapped any more. What cannot be had is told as a warning. */
  async end(): Promise<void> {
    const { onWarning, onProgress } = this.#settings;
    onProgress?.("fetching what the guest has mapped");
    try {
      const { missing, full } = await this.#fetch();
      if (missing > 0) this.#recording.write(formatLost(missing));
      const why = full > 0 ? `; its buffer for ${full} of them was full, and grows with --memory` : "";
      if (missing > 0)
        onWarning?.(`the recording lacks ${missing} of the guest's map and unmap events${why}`);
    } catch (error) {
      if (!(error instanceof UserError)) throw error;
      onWarning?.(`the recording lacks what the guest mapped: ${error.message}`);
    }
  }

  async #fetch(): Promise<{ missing: number; full: number }> {
    const { cpus, frames } = this.#settings;
    const last = await anchor(this.#agent);
    const { kept, full } = await this.#stop();
    const log = new EventLogWriter(this.#recording.began, (lines) => this.#recording.write(lines));
    const reader = new TraceReader({ cpus, frames, from: this.#first.guest, to: last.guest }, (operation) =>
      log.add({ ...operation, time: between(this.#first, last, operation.time) }),
    );
    await this.#lines((line) => reader.line(line));
    reader.end();
    log.flush();
    return { missing: Math.max(kept - reader.segments, reader.malformed) + full, full };
  }

  /** How many events the buffer has, and how many it had no room for. */
  async #stop(): Promise<{ kept: number; full: number }> {
    const script = `echo 0 >${MAPS_TRACE}/tracing_on && cat ${MAPS_TRACE}/per_cpu/cpu*/stats`;
    const stats = (await demand(this.#agent, script, "ending the guest's trace")).slice(0, STATS_MAX);
    const sum = (names: RegExp) =>
      [...stats.matchAll(names)].reduce((total, [, number]) => total + Number(number), 0);
    return {
      kept: sum(/^entries: (\d{1,15})$/gm),
      full: sum(/^(?:overrun|commit overrun|dropped events): (\d{1,15})$/gm),
    };
  }

  async #lines(take: (line: string) => void): Promise<void> {
    const bufferSize = this.#settings.memoryMiB * 2 ** 20 * BUFFER_SHARE;
    const { code, output } = await this.#agent.run(
      `gzip -c <${MAPS_TRACE}/trace >${TEXT} && stat -c %s ${TEXT}`,
      {
        timeoutMs: TEXT_MS_MAX,
        what: "packing the guest's trace",
      },
    );
    const size = Number(output);
    if (code !== 0 || !(size <= bufferSize))
      throw new UserError(`the guest's trace: ${output.slice(0, 200).trim()}`, 1);
    const text = createGunzip();
    eachLine(text, TRACE_LINE_MAX, take);
    let length = 0;
    text.on("data", (chunk: Buffer) => {
      length += chunk.length;
      if (length > TEXT_PER_BUFFER * bufferSize)
        text.destroy(new UserError("the guest's trace is too long", 1));
    });
    const arrived = pipeline(Readable.from(readGuestFile(this.#agent, TEXT, size)), text);
    await Promise.all([arrived, finished(text)]).catch((error) => {
      throw error instanceof UserError ? error : new UserError("the guest's trace arrived damaged", 1);
    });
  }
}

/** Now. The guest's moment lies within the quickest of several round trips, of which ours is the middle. */
async function anchor(agent: GuestAgent): Promise<Anchor> {
  let quickest = { mark: 0, began: 0, took: Number.POSITIVE_INFINITY };
  for (let i = 0; i < MARKS_TRIED; i++) {
    const began = monotonicClock.now();
    const mark = await agent.mark(MARK_MS_MAX);
    const took = monotonicClock.now() - began;
    if (took < quickest.took) quickest = { mark, began, took };
  }
  const trace = await demand(agent, `cat ${MARKS_TRACE}/trace`, "reading the guest's clock");
  const guest = findMark(trace, quickest.mark);
  if (guest === undefined) throw new UserError("the guest's trace has no marks of its clock", 1);
  return { guest, host: (quickest.began + quickest.took / 2) as Nanoseconds };
}

/** `time`, of the guest, by our clock. */
const between = (first: Anchor, last: Anchor, time: number): number =>
  first.host +
  ((time - first.guest) * (last.host - first.host)) / Math.max(last.guest - first.guest, Number.EPSILON);
