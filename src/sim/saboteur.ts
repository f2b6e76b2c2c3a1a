import type { Random } from "../base/random.ts";
import { FRAME_SIZE, milliseconds } from "../base/units.ts";
import { TrackingUnits } from "../driver/units.ts";
import type { GuestRegion } from "../memory/guest-memory.ts";
import { TU_PINNED } from "../wire/dtt.ts";
import type { Guest } from "./guest.ts";
import { type Operation, Process } from "./process.ts";
import { SteppedMemory } from "./stepped-memory.ts";
import type { Turns } from "./turns.ts";

/** A guest CPU that writes garbage into what guest and host share: the table, the queue, the device's registers. */
export class Saboteur {
  readonly process: Process;
  readonly #guest: Guest;
  readonly #random: Random;
  readonly #memory: SteppedMemory;
  /** Only lies about frames: then the driver lives long enough for its devices to suffer. */
  readonly #subtle: boolean;

  constructor(guest: Guest, regions: readonly GuestRegion[], turns: Turns, random: Random) {
    this.#guest = guest;
    this.#random = random;
    this.#subtle = random(2) === 0;
    this.process = new Process("saboteur", turns, () => this.#next());
    this.#memory = new SteppedMemory(regions, this.process);
  }

  #next(): Operation | undefined {
    if (this.#guest.draining) return undefined;
    const run =
      this.#random(3) === 0 ? this.#sleep() : this.#random(4) === 0 ? this.#register() : this.#word();
    return { run, settle: () => {} };
  }

  #sleep(): () => void {
    const time = milliseconds(1 + this.#random(10));
    return () => void this.process.waitFor(() => false, time);
  }

  #word(): () => void {
    const at = this.#subtle || this.#random(2) === 0 ? this.#unit() : this.#anywhere();
    const flags = this.#random(2) === 0 ? TU_PINNED : this.#random(16) * 2 ** 28 + this.#random(3);
    const value = this.#random(3) === 0 ? this.#random(2 ** 32) : flags;
    return () => this.#memory.store32(at, value | 0);
  }

  /** The unit of a buffer's frame: "pinned and idle" in it makes the host let go of what devices are using. */
  #unit(): number {
    const { places, parts } = this.#guest;
    const { memory, buffers } = parts;
    if (!places) return this.#anywhere();
    const units = new TrackingUnits(memory, places.table, parts.cpus);
    const unit = units.find(buffers.first + this.#random(buffers.frames));
    return memory.find(unit, 4) ? unit : this.#anywhere();
  }

  #anywhere(): number {
    const { places, parts } = this.#guest;
    const driver = parts.memory.regions[0]!;
    if (!places || this.#random(2) === 0) return driver.gpa + 4 * this.#random(driver.size / 4);
    const pages = [places.table.root, ...places.pages];
    const page = pages[this.#random(pages.length)]!;
    return page + 4 * this.#random(FRAME_SIZE / 4);
  }

  #register(): () => void {
    const pciFunction = this.#guest.parts.bus.seenBy(this.process);
    const at = [0, 0x1000, 0x2000, 0x3000][this.#random(4)]! + this.#random(100);
    const size = [1, 2, 4, 8][this.#random(4)]!;
    const value = BigInt(this.#random(2) === 0 ? this.#random(4) : this.#random(2 ** 32));
    return () => pciFunction.barWrite(at, size, value);
  }
}
