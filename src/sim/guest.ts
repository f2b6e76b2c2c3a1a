import { type Bdf, FRAME_SIZE } from "../base/units.ts";
import type { FrontEndDrivers, Places } from "../driver/front-end.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { Balloon } from "./balloon.ts";
import type { Bus } from "./bus.ts";
import type { Checks } from "./checks.ts";
import type { DmaEngine } from "./dma-engine.ts";
import type { FaultChecks, LiveEventQueue } from "./fault-checks.ts";
import type { RemappedDevice } from "./remapped-device.ts";
import type { Turns } from "./turns.ts";

/** Something that excuses failures from when it begins until it ends, and of what was under way meanwhile. */
class Disturbance {
  #active = false;
  #count = 0;

  begin(): void {
    this.#active = true;
    this.#count++;
  }
  end(): void {
    this.#active = false;
  }

  /** Whether it has begun anew since this call. */
  again(): () => boolean {
    const before = this.#count;
    return () => this.#count !== before;
  }

  /** Whether it was on at any time since this call. */
  since(): () => boolean {
    const before = this.#count;
    const active = this.#active;
    return () => active || this.#active || this.#count !== before;
  }
}

/** What a guest is made of. */
export interface GuestParts {
  readonly memory: GuestMemory;
  readonly turns: Turns;
  readonly bus: Bus;
  readonly checks: Checks;
  readonly faults: FaultChecks;
  readonly frontEnd: FrontEndDrivers;
  readonly endpoint: Bdf;
  /** A device that moves between the table and a domain. */
  readonly remapped: RemappedDevice | undefined;
  readonly engines: readonly DmaEngine[];
  /** One of them that may fault. */
  readonly faultCapable?: DmaEngine;
  /** First frame and number of those that buffers lie in; CPUs share them. */
  readonly buffers: { readonly first: number; readonly frames: number };
  readonly cpus: number;
  /** If there is one, each CPU has a frame of its own, after the buffers, that it puts there at times. */
  readonly balloon: Balloon | undefined;
  readonly hostile: boolean;
  /** Of its settings. */
  readonly strays: number;
  /** Its driver negotiates PIN_DIRTY. */
  readonly pinDirty: boolean;
  /** The driver turns PIN off and on again at times. */
  readonly restarts: boolean;
  /** Whether a CPU maps all that it can, and lets no device use it. */
  hoards(cpu: number): boolean;
  /** Whether the driver may be loaded by now. */
  mayBoot(): boolean;
  /** All RAM is pinned for as long as no driver is active. */
  allPinned(): boolean;
}

/** What the CPUs of one guest know together. */
export class Guest {
  /** Set by the CPU that boots, when its driver is active. */
  places: Places | undefined;
  /** The device has been reset behind the driver's back, as a real one tells by an interrupt. */
  needsRestart = false;
  /** The device has forgotten what it was asked: who waits for its answer gives up after a time, and is right to. */
  readonly deviceLost = new Disturbance();
  /** PIN is off. */
  readonly pinOff = new Disturbance();
  driverRestarts = 0;
  /** What is in no domain is in bypass. */
  bypass = true;
  /** No new mappings: unmap what there is, and stop. */
  draining = false;
  readonly parts: GuestParts;

  constructor(parts: GuestParts) {
    this.parts = parts;
  }

  /** The driver is active; `diedAgain`: but not on the device that it found. */
  settled(diedAgain: boolean): void {
    if (diedAgain) return;
    this.needsRestart = false;
    this.deviceLost.end();
    this.pinOff.end();
  }

  /** Of a driver that is active; `resets`: those that it did not make. */
  eventQueue(resets: number): LiveEventQueue | undefined {
    if (!this.places || this.needsRestart) return undefined;
    return { generation: this.driverRestarts + resets, buffers: this.places.eventBuffers };
  }

  /** The upper levels of a table that is in use: an honest driver changes none of it, and remembers what it found. */
  isUpperLevel(gpa: number): boolean {
    if (!this.places) return false;
    const { root, levels } = this.places.table;
    return levels > 1 && gpa >= root && gpa < root + FRAME_SIZE;
  }
}
