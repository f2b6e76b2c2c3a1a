/** What `bench -- vfio` measures, on the machine that this runs on: `node here.js BDF LIBRARY ROUNDS` prints JSON. */
import os from "node:os";
import { VfioDevice } from "../../src/host/vfio-device.ts";
import { creation } from "./creation.ts";
import { entries } from "./entries.ts";
import { pinsAgainstC } from "./pins.ts";
import type { VfioReport } from "./report.ts";

const SIZES_MIB = [256, 512, 1024, 2048];
const CREATION_ROUNDS = 3;
/** Of a guest whose memory is the same 256 MiB again and again. */
const RAM_MIB = 16 * 1024;
/** Frames in no order: twice what can be pinned page by page. */
const TOUCHES_MAX = 131_072;

export function here(o: {
  /** As in "0000:00:06.0", bound to vfio-pci. */
  readonly device: string;
  /** bench/native/vfio.c, compiled. */
  readonly native: string;
  readonly rounds: number;
  say(text: string): void;
}): VfioReport {
  const { device, native, rounds, say } = o;
  const opened = VfioDevice.open(device);
  try {
    say("pins against bare ioctls");
    const pins = pinsAgainstC(opened.container, native, rounds);
    const found = entries(opened.container, RAM_MIB, TOUCHES_MAX, say);
    opened.close(); // for those that are created now
    const created = creation(device, SIZES_MIB, CREATION_ROUNDS, say);
    return { bench: "vfio", kernel: os.release(), rounds, pins, entries: found, creation: created };
  } finally {
    opened.close();
  }
}

if (import.meta.main) {
  const [device, native, rounds] = process.argv.slice(2);
  const say = (text: string) => console.error(text);
  console.log(JSON.stringify(here({ device: device!, native: native!, rounds: Number(rounds), say })));
}
