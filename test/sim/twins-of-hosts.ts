import { FRAME_SIZE } from "../../src/base/units.ts";
import { FakeHost, frameAt } from "../../src/sim/fake-host.ts";
import type { Settings } from "../../src/sim/settings.ts";
import type { BrokenTwin } from "./twins.ts";

/** P of what is in the balloon outlives the time there. */
export const BALLOONS: Partial<Settings> = { balloon: true, interval: 10, hostile: false, mappings: 0 };

/** Keeps what it pinned of a batch that fails. */
class HoardingHost extends FakeHost {
  override pin(...[addresses, count, handles, pages]: Parameters<FakeHost["pin"]>): void {
    for (let i = 0; i < count; i++)
      super.pin(addresses.subarray(i), 1, handles.subarray(i), pages?.subarray(i));
  }
}

class StrayHost extends FakeHost {
  override pin(...[addresses, ...others]: Parameters<FakeHost["pin"]>): void {
    super.pin(
      addresses.map((address) => address + 64 * FRAME_SIZE),
      ...others,
    );
  }
}

/** Says that a page is pinned, and pins none. */
class PromisingHost extends FakeHost {
  override pin(_addresses: Float64Array, count: number, handles: Int32Array): void {
    for (let i = 0; i < count; i++) handles[i] = i;
  }
}

/** Lets go of an extent before it pins its rest. */
class SplittingHost extends FakeHost {
  override pin(...args: Parameters<FakeHost["pin"]>): void {
    const [addresses, count] = args;
    const rest = new Set([...addresses.subarray(0, count)].map(frameAt));
    for (const { gfn, handle } of [...this.pages])
      if (rest.has(gfn) && !this.#early.has(handle)) {
        super.release(Int32Array.of(handle), 1);
        this.#early.add(handle);
      }
    super.pin(...args);
  }
  override release(handles: Int32Array, count: number): number {
    if (count === 1 && this.#early.delete(handles[0]!)) return 1;
    return super.release(handles, count);
  }
  readonly #early = new Set<number>();
}

/** Gives memory in the second mapping too. */
class GenerousHost extends FakeHost {
  protected override hasMemory(): boolean {
    return true;
  }
}

/** Never finds what was discarded. */
class BlindHost extends FakeHost {
  override discarded(_addresses: Float64Array, count: number, out: Uint8Array): void {
    out.fill(0, 0, count);
  }
}

export const hostTwins: Readonly<Record<string, BrokenTwin>> = {
  "an extent that is released before its rest is pinned": {
    twin: { backend: { makeHost: (...args) => new SplittingHost(...args) } },
    found: /unpinned while it is mapped|the host does not hold it|the guest has claimed/,
    settings: { mappings: 0 },
  },
  "a discarded page that a frame takes over": {
    twin: { backend: { makeHost: (...args) => new BlindHost(...args) } },
    found: /hits a page that the guest has given away/,
    settings: { ...BALLOONS, mappings: 8 },
  },
  "a split that gives memory to what was discarded": {
    twin: { backend: { makeHost: (...args) => new GenerousHost(...args) } },
    found: /gets memory unasked/,
    settings: BALLOONS,
    stepsMax: 2_000_000,
  },
  "a batch of pins that fails half way and keeps what it has": {
    twin: { backend: { makeHost: (...args) => new HoardingHost(...args) } },
    found: /PIN was refused|the host holds/,
  },
  "a PIN that is granted and pins nothing": {
    twin: { backend: { makeHost: (...args) => new PromisingHost(...args) } },
    found: /^PIN of frame \d+ is OK, but it is not held/,
    settings: { beforeActivation: "none", faultCapable: false },
  },
  "a fault that is granted and pins nothing": {
    twin: { backend: { makeHost: (...args) => new PromisingHost(...args) } },
    found: /^a fault on frame \d+ is granted, but it is not held/,
    // Devices are at work before a driver asks for anything.
    settings: { beforeActivation: "none", driverComes: 2, faultCapable: true },
  },
  "a pin of the wrong page": {
    twin: { backend: { makeHost: (...args) => new StrayHost(...args) } },
    found: /which is not RAM|does not/,
  },
};
