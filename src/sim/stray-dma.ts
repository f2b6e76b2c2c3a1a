import type { Random } from "../base/random.ts";
import { FRAME_SIZE, type Iova } from "../base/units.ts";
import type { FrontEndDriver } from "../driver/front-end.ts";
import {
  VIRTIO_IOMMU_FAULT_R_DOMAIN,
  VIRTIO_IOMMU_FAULT_R_MAPPING,
  VIRTIO_IOMMU_FAULT_R_UNKNOWN,
} from "../wire/virtio-iommu.ts";
import type { DmaEngine, Job } from "./dma-engine.ts";
import type { MetFault } from "./fault-checks.ts";
import type { Guest } from "./guest.ts";
import type { Operation } from "./process.ts";

/** Pages that are no RAM, and that no domain maps. */
const FIRST_PAGE = 2 ** 22;
const FEW = 3;
/** More than a device may have waiting at the host. */
const MANY = 40;

/** The part of a guest that has devices access what they must not, and reads what the IOMMU tells of it. */
export class StrayDma {
  readonly #guest: Guest;
  readonly #random: Random;
  readonly #driver: () => FrontEndDriver | undefined;
  #strays = 0;
  #ended = false;

  constructor(guest: Guest, random: Random, driver: () => FrontEndDriver | undefined) {
    this.#guest = guest;
    this.#random = random;
    this.#driver = driver;
  }

  /** At times, while others work. */
  next(): Operation | undefined {
    const { strays, engines } = this.#guest.parts;
    if (!strays || !this.#driver()?.pollFaults) return undefined;
    if (this.#random(8) === 0) this.#stray(engines[this.#random(engines.length)]!);
    return this.#random(strays) === 0 ? this.#read() : undefined;
  }

  /** When all is unmapped: devices stray once more, now without bypass. */
  last(): Operation | undefined {
    const { engines, faults } = this.#guest.parts;
    const { setBypass } = this.#driver()!;
    if (!setBypass || !engines.every((e) => e.atRest)) return undefined;
    if (faults.unread > 0) return this.#read();
    if (this.#ended) return undefined;
    return this.#operation(
      () => setBypass(false),
      () => {
        this.#ended = true;
        this.#guest.bypass = false;
        for (const engine of engines) this.#stray(engine);
      },
    );
  }

  get atRest(): boolean {
    const { faults, hostile } = this.#guest.parts;
    return hostile || !this.#driver()?.setBypass || (this.#ended && faults.unread === 0);
  }

  #stray(engine: DmaEngine): void {
    const { remapped } = this.#guest.parts;
    const device = remapped?.engine === engine ? remapped : undefined;
    if (device?.moving) return;
    const count = 1 + this.#random(this.#random(4) === 0 ? MANY : FEW);
    // As a mapping has it: what the device's addresses mean stays as it is meanwhile.
    if (device) device.mappings++;
    engine.queue({
      segments: Array.from({ length: count }, () => {
        const page = FIRST_PAGE + this.#strays++;
        return { iova: (page * FRAME_SIZE + this.#random(FRAME_SIZE)) as Iova, length: 1 + this.#random(8) };
      }),
      writes: this.#random(2) === 0,
      mayFault: () => true,
      stray: true,
      done: () => {
        if (device) device.mappings--;
      },
    });
  }

  #read(): Operation {
    const { faults } = this.#guest.parts;
    const { unread, toldSoFar } = faults;
    return this.#operation(
      () => this.#driver()!.pollFaults!(),
      () => faults.read(unread, faults.toldSoFar - toldSoFar),
    );
  }

  #operation(run: () => void, done: () => void): Operation {
    return {
      run,
      settle: (outcome) => {
        if ("value" in outcome) done();
        else if (!this.#guest.parts.hostile) throw outcome.error;
      },
    };
  }
}

/** What a fault in a job is: a job that is older than the driver writes or reads, and means one thing or the other. */
export function kindOf(guest: Guest, engine: DmaEngine, job: Job): Pick<MetFault, "writes" | "reasons"> {
  const { remapped } = guest.parts;
  const moves = remapped?.engine === engine;
  const stray = job.stray ?? false;
  const writes = stray || job.unmapped ? job.writes : undefined;
  const unmapped = guest.bypass ? VIRTIO_IOMMU_FAULT_R_UNKNOWN : VIRTIO_IOMMU_FAULT_R_DOMAIN;
  if (!moves) return { writes, reasons: [unmapped] };
  if (!stray) return { writes, reasons: [unmapped, VIRTIO_IOMMU_FAULT_R_MAPPING] };
  return { writes, reasons: [remapped.attached ? VIRTIO_IOMMU_FAULT_R_MAPPING : unmapped] };
}
