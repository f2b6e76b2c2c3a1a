import type { Guest, GuestWorkload } from "../../src/machine/embedded/workloads/workload.ts";
import type { GuestMemory } from "../../src/memory/guest-memory.ts";
import { FakeClock } from "./clock.ts";
import type { TestDma, TestPages } from "./dma.ts";

/** A vCPU whose time goes on by `step` milliseconds with each look. */
export const guestOf = (
  { memory, dma, pages }: { memory: GuestMemory; dma: TestDma; pages: TestPages },
  seed = 1,
  step = 0.5,
): Guest => ({ memory, dma, pages, seed, clock: new FakeClock(0, step * 1e6) });

/** Driver and device in turn, until the workload is finished. `turn` is called before each. */
export function runWorkload(
  workload: GuestWorkload,
  device: { run(limit: number): unknown },
  turn: (n: number) => void = () => {},
): void {
  for (let n = 0; !workload.finished; n++) {
    if (n === 200_000) throw new Error("the workload does not end");
    turn(n);
    workload.poll();
    device.run(4);
  }
}
