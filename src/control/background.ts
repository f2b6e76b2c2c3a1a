import { setTimeout as sleep } from "node:timers/promises";
import { FRAME_SIZE } from "../base/units.ts";
import { STOPPED_BY } from "../tracking/background-pins.ts";
import type { TrackingCounters } from "../tracking/tracker.ts";
import type { Started } from "./host-side.ts";

/** How far all RAM is pinned in the background; null when that is not asked for. */
export function backgroundOf(pins: TrackingCounters) {
  const { backgroundFrames: frames, backgroundPinned: pinned, backgroundStopped: stopped } = pins;
  return frames === 0 ? null : { pinned, frames, stopped: stopped === 0 ? null : STOPPED_BY[stopped]! };
}

/** The same for a person; undefined when there is nothing to tell. */
export function backgroundText(pins: TrackingCounters): string | undefined {
  const background = backgroundOf(pins);
  if (!background) return undefined;
  const { pinned, frames, stopped } = background;
  const size = `${Math.floor((frames * FRAME_SIZE) / 2 ** 20)} MiB`;
  if (pinned === frames) return `all ${size} of the guest's memory are pinned`;
  // Few steps, each of which is a line where there is no terminal.
  const percent = 10 * Math.floor((10 * pinned) / frames);
  return `pinning all of the guest's memory: ${percent} % of ${size}${stopped === null ? "" : `, stopped by the ${stopped}`}`;
}

/** Ask until what is to be pinned before the guest starts is. */
export async function whenPinned(
  pins: TrackingCounters,
  started: () => Promise<Started>,
  progress: (text: string) => void = () => {},
): Promise<Started> {
  for (;;) {
    const answer = await started();
    if (!answer.pinning) return answer;
    progress(backgroundText(pins) ?? "");
    await sleep(20);
  }
}
